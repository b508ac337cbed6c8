from importlib.metadata import version

import pytest
from ghn.cli import main


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "check" in out and "graph" in out


def test_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ghn {version('ghn')}\n"


@pytest.mark.parametrize("arguments", [["absent"], ["--fast"], []])
def test_commands_that_do_not_exist_are_wrong_usage(arguments):
    assert main(arguments) == 2
