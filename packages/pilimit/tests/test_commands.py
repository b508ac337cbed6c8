"""The commands kernel, eval and widths."""

import json

import pytest
import torch
from pilimit import InfMLP, save_net
from pilimit.cli import main

SUBSET = ["--train-subset-size", "300", "--test-subset-size", "100", "--quiet"]


def output(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def folder(tmp_path):
    save_net(tmp_path / "net", InfMLP(64, 10, 20, depth=2, generator=torch.Generator().manual_seed(0)))
    return str(tmp_path / "net")


def test_kernels_classify_digits(capsys, folder):
    found = {}
    for kind in (["nngp"], ["ntk"], ["ntk", "--mode", "legacy"], ["features", "--model", folder]):
        (row,) = output(capsys, "kernel", "digits", "--kernel", *kind, *SUBSET)["results"]
        assert row["train"] == 300 and row["test"] == 100 and row["residual"] < 1e-9
        assert row["test_acc"] > 0.85
        found["".join(kind[:3])] = row["test_acc"]
    rows = output(capsys, "kernel", "digits", "--multiple-regs", *SUBSET)["results"]
    assert [row["kernel_reg"] for row in rows] == [1e-5, 1e-4, 1e-3]
    (single,) = output(capsys, "kernel", "digits", "--memory-budget", "0.0093", *SUBSET)["results"]
    assert single["dtype"] == "float32" and single["test_acc"] == rows[1]["test_acc"]


def test_eval_samples_finite_nets(capsys, folder):
    limit = output(capsys, "eval", folder, "digits")
    assert output(capsys, "eval", folder, "digits", "--mapped", "--width", "0") == limit
    wide = output(capsys, "eval", folder, "digits", "--width", "2048")
    assert wide["width"] == 2048 and abs(wide["test_loss"] - limit["test_loss"]) < 0.05


def test_widths_draws_the_convergence(capsys, tmp_path):
    arguments = ["--widths", "16", "64", "256", "--steps", "3", "--r", "8", "--quiet", "--nets", "6"]
    study = output(capsys, "widths", "digits", *arguments, "--plot", str(tmp_path / "widths.png"))
    assert -0.9 < study["slope"] < -0.2 and len(study["errors"]) == 3
    assert (tmp_path / "widths.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernel", "digits", "--kernel", "features"], "belong together"),
        (["kernel", "digits", "--depth", "0"], "--depth must be at least 1"),
        (["kernel", "digits", "--varw", "-1"], "--varw must be at least 0"),
        (["kernel", "digits", "--kernel-reg", "0"], "the ridge must be positive"),
        (["kernel", "mnist"], "MNIST: no data folder given; name the folder that holds its files with --data-root"),
        (["kernel", "digits", "--memory-budget", "0.001"], "the memory budget is 0.00 GB"),
        (["eval", "absent", "digits"], "there is no folder or file absent"),
        (["widths", "digits", "--widths", "16"], "a slope needs two widths"),
    ],
    ids=str,
)
def test_wrong_options_are_one_line(capsys, arguments, message):
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
