from importlib.metadata import version

import pytest
from pilimit.cli import main


def test_help_says_what_will_come(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "no features yet" in out
    assert "pilimit train" in out or "pilimit pretrain" in out


def test_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pilimit {version('pilimit')}\n"


@pytest.mark.parametrize("arguments", [["train"], ["--fast"]])
def test_commands_that_do_not_exist_yet_are_wrong_usage(arguments):
    assert main(arguments) == 2
