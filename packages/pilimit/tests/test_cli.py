import json
from importlib.metadata import version

import pytest
import torch
from pilimit import InfMLP, load_net
from pilimit.cli import main


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
    assert "there is no file" in error and error.count("\n") == 1
