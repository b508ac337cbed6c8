import json
from importlib.metadata import version

import pytest
import torch
from pilimit import FinMLP, InfMLP, load_net
from pilimit.building import open_net
from pilimit.cli import main
from zoo_common.checkpoint import save_checkpoint


def test_help_says_what_will_come(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "convert" in out and "Planned: transfer" in out


def test_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pilimit {version('pilimit')}\n"


@pytest.mark.parametrize("arguments", [["train"], ["train", "imagenet"], ["maml"], ["--fast"]])
def test_commands_and_data_that_do_not_exist_are_wrong_usage(arguments):
    assert main(arguments) == 2


def test_convert_writes_the_same_net_once(tmp_path, capsys):
    net = InfMLP(6, 3, 5, depth=3)
    torch.save(net.state_dict(), tmp_path / "net.th")
    arguments = ["convert", str(tmp_path / "net.th"), str(tmp_path / "own")]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == net.config | {"atoms": [5, 5, 5]}
    x = torch.randn(4, 6)
    assert torch.equal(load_net(tmp_path / "own")(x), net(x))
    assert main(arguments) == 1
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "absent.th"), str(tmp_path / "other")]) == 1
    error = capsys.readouterr().err
    assert "there is no folder or file" in error and error.count("\n") == 1


def test_sample_writes_a_finite_net_that_eval_reads(tmp_path, capsys):
    net, file = InfMLP(64, 10, 5, depth=3, last_bias_alpha=0.5), str(tmp_path / "finite.safetensors")
    torch.save(net.state_dict(), tmp_path / "net.th")
    assert main(["sample", str(tmp_path / "net.th"), file, "--width", "32", "--seed", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == net.config | {"width": 32, "seed": 3}
    found, x = open_net(tmp_path / "finite.safetensors"), torch.randn(4, 64)
    expected = FinMLP.sample(net, 32, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found(x), expected(x)) and found.layers[1].project
    assert main(["eval", file, "digits", "--test-subset-size", "50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["width"] == 32
    assert main(["sample", file, str(tmp_path / "again.safetensors")]) == 1
    assert "holds a finite net: an infinite one is needed" in capsys.readouterr().err
    save_checkpoint(tmp_path / "other.safetensors", {"x": torch.ones(2)}, {})
    assert main(["eval", str(tmp_path / "other.safetensors"), "digits"]) == 1
    assert "holds no net of `pilimit sample`" in capsys.readouterr().err
