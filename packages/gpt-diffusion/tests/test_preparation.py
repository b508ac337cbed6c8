"""Bad runs, the coefficient and the prior term of a zoo."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from gpt_diffusion.cli import main
from gpt_diffusion.preparation import excluded, prepare
from support.reliability import flip_bit, truncate
from zoo_common import ParameterLayout, Run, Zoo

SIZE, CHECKPOINTS = 40, 6


def run(i, scale=0.3):
    params = scale * torch.randn(CHECKPOINTS, SIZE, generator=torch.Generator().manual_seed(i))
    return Run(f"r{i}", params, range(CHECKPOINTS), {"val_loss": range(CHECKPOINTS)}, {"index": i})


@pytest.fixture
def zoo(tmp_path):
    """Four shards of five runs."""
    layout = ParameterLayout.from_state_dict({"weight": torch.empty(SIZE)})
    zoo = Zoo.create(tmp_path / "zoo", layout=layout, split=(0.8, 0.1, 0.1))
    for shard in range(4):
        zoo.append([run(5 * shard + i) for i in range(5)], name=f"s{shard}")
    return zoo


def spoil(zoo):
    """Two more shards with bad runs."""
    infinite, large = run(20), run(21)
    infinite.params[3, 7], large.params[0, 1] = math.nan, -11
    zoo.append([infinite, run(22), large], name="s4")
    bad = run(23)
    bad.params[0] = math.inf
    zoo.append([bad], name="s5")


def test_the_figures_are_those_of_plain_formulas(zoo):
    report = prepare(zoo.path, pairs=20_000, progress=False)
    assert (report.runs, report.bad_runs, report.bad_files) == (20, {}, {})
    train = torch.stack([zoo.params[int(i)] for i in zoo.split("train")]).double()
    assert report.std == pytest.approx(train.std().item(), rel=0.01)  # 20,000 draws of about 96 vectors
    assert report.openai_coeff == pytest.approx(0.538 / report.std)
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.prod(1 - beta)
    second = alpha_bar * (report.openai_coeff**2 * train.square().mean().item())
    prior = 0.5 * (second + (1 - alpha_bar) - 1 - math.log(1 - alpha_bar)) / math.log(2)
    assert report.prior_bpd == pytest.approx(prior, rel=0.03)
    assert prepare(zoo.path, pairs=20_000, progress=False) == report
    assert prepare(zoo.path, pairs=20_000, seed=1, progress=False).std != report.std


def test_every_value_drawn_counts_once(tmp_path):
    """One run with one checkpoint: the standard deviation is that of its weights, over repetitions."""
    layout = ParameterLayout.from_state_dict({"weight": torch.empty(SIZE)})
    zoo = Zoo.create(tmp_path / "zoo", layout=layout, split=(1, 0, 0))
    values = torch.randn(1, SIZE)
    zoo.append([Run("r", values, [0])])
    report = prepare(zoo.path, pairs=3, progress=False)
    assert report.std == pytest.approx(values.double().repeat(3, 1).std().item(), rel=1e-6)


def test_bad_runs_are_listed_and_left_out_of_everything(zoo, tmp_path):
    clean = prepare(zoo.path, progress=False)
    spoil(zoo)
    before = sorted(path.name for path in (zoo.path / "shards").iterdir())
    dry = prepare(zoo.path, dry_run=True, delete=True, progress=False)
    assert excluded(zoo.path) == set()
    report = prepare(zoo.path, progress=False)
    assert dry == report
    expected = {"r20": "non-finite weights", "r21": "a weight of 11, above 10", "r23": "non-finite weights"}
    assert report.bad_runs == expected
    assert excluded(zoo.path) == set(expected)
    assert report.std == pytest.approx(clean.std, rel=0.02)
    assert sorted(path.name for path in (zoo.path / "shards").iterdir()) == before
    assert prepare(zoo.path, max_abs=0.01, progress=False).std is None


def test_bad_runs_and_files_are_moved(zoo):
    spoil(zoo)
    flip_bit_of_params(zoo.path / "shards" / "s0.safetensors")
    truncate(zoo.path / "shards" / "s1.safetensors")
    listed = prepare(zoo.path, progress=False)
    assert list(listed.bad_files) == ["s1.safetensors"]
    assert "wrong SHA-256 of params in s0.safetensors" in listed.bad_runs["r0"]
    report = prepare(zoo.path, delete=True, progress=False)
    assert (report.bad_runs, report.removed) == (listed.bad_runs, True)
    rest = Zoo.open(zoo.path)
    assert rest.verify().problems == ()
    assert set(rest.run_ids) == {f"r{i}" for i in [*range(10, 20), 22]}
    assert torch.equal(rest.params["r22"], run(22).params)
    assert rest.runs[rest.index("r22")].config == {"index": 22}
    assert rest.metrics["val_loss"]["r22"].tolist() == list(range(CHECKPOINTS))
    names = sorted(path.name for path in (zoo.path / "removed").iterdir())
    assert names == [f"s{i}.safetensors" for i in (0, 1, 4, 5)]
    after = prepare(zoo.path, delete=True, progress=False)
    assert (after.runs, after.bad_runs, after.bad_files, after.std) == (11, {}, {}, report.std)


def flip_bit_of_params(path):
    for seed in range(100):
        content = path.read_bytes()
        flip_bit(path, seed)
        try:
            if Zoo.open(path.parents[1]).shards[path.stem].file.damaged() == ["params"]:
                return
        except ValueError:
            pass
        path.write_bytes(content)
    raise AssertionError("no bit of the parameters was hit")


def test_training_leaves_out_what_is_listed(digits_zoo, tmp_path, caplog):
    import shutil

    from gpt_diffusion.config import DatasetConfig
    from gpt_diffusion.training_data import good_runs

    shutil.copytree(digits_zoo, tmp_path / "zoo")
    zoo = Zoo.open(tmp_path / "zoo")
    everything = good_runs(zoo, DatasetConfig(), "val_loss", "train")
    largest = max(zoo.params[int(i)].abs().max().item() for i in zoo.split("train"))
    report = prepare(zoo.path, max_abs=0.999 * largest, progress=False)
    with caplog.at_level(logging.WARNING):
        left = good_runs(zoo, DatasetConfig(), "val_loss", "train")
    assert 0 < len(left) < len(everything)
    assert {zoo.runs[i].id for i in everything} - {zoo.runs[i].id for i in left} == set(report.bad_runs) & {
        zoo.runs[i].id for i in everything
    }
    assert "listed in prepared.json" in caplog.text
    (zoo.path / "prepared.json").write_text("[]")
    with pytest.raises(ValueError, match=r"prepared.json is damaged: no table 'excluded'"):
        good_runs(zoo, DatasetConfig(), "val_loss", "train")


def test_the_command(capsys, zoo, tmp_path):
    spoil(zoo)
    assert main(["prepare", str(zoo.path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert set(found["bad_runs"]) == {"r20", "r21", "r23"}
    assert json.loads((zoo.path / "prepared.json").read_text())["openai_coeff"] == found["openai_coeff"]
    truncate(zoo.path / "shards" / "s1.safetensors")
    assert main(["prepare", str(zoo.path), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "openai_coeff: " in out and "s1.safetensors" in out and "--delete" in err
    for arguments, message in (
        ([tmp_path / "absent"], "there is no zoo in"),
        ([zoo.path, "--max-abs", "0"], "max_abs must be positive, got 0.0"),
        ([zoo.path, "--pairs", "-1"], "pairs must be at least 0, got -1"),
    ):
        assert main(["prepare", *map(str, arguments)]) == 1
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1
