import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from tyro.conf import Positional
from zoo_common.command import run_command


@dataclass(frozen=True)
class AddConfig:
    """Add two numbers."""

    a: Positional[int]
    b: int = 1


@dataclass(frozen=True)
class FailConfig:
    """Fail."""


def run(arguments, error=None):
    def fail(config):
        raise error

    def add(config):
        print(config.a + config.b)

    commands = {"add": (AddConfig, add), "fail": (FailConfig, fail)}
    return run_command("prog", "What it does.\n\nExamples:\n  prog add 1", commands, arguments, package="zoo-common")


def test_a_command_runs_with_its_options(capsys):
    assert run(["add", "2", "--b", "3"]) == 0
    assert capsys.readouterr().out == "5\n"


def test_a_returned_status_is_passed_on():
    def add(config):
        return 3

    assert run_command("prog", "", {"add": (AddConfig, add), "fail": (FailConfig, add)}, ["add", "1"]) == 3


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("bad\nvalue"), 1, "prog: bad value"),
        (KeyError("no metric 'x'"), 1, "prog: no metric 'x'"),
        (PermissionError(13, "Permission denied", "/a/b"), 1, "prog: Permission denied: /a/b"),
        (ImportError("pip install 'zoo-common[data]'"), 1, "prog: pip install 'zoo-common[data]'"),
        (KeyboardInterrupt(), 130, "prog: interrupted"),
    ],
)
def test_problems_are_one_line_and_a_status(capsys, error, status, line):
    assert run(["fail"], error) == status
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == line + "\n"


def test_a_reader_that_has_gone_is_no_problem_to_tell():
    reader, writer = os.pipe()
    os.close(reader)
    program = "import sys; from zoo_common.cli import main; sys.exit(main(['--help']))"
    ended = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(TypeError, match="ours"):
        run(["fail"], TypeError("ours"))


@pytest.mark.parametrize("arguments", [[], ["ad"], ["add"], ["add", "x"], ["add", "1", "--c", "2"]])
def test_wrong_usage_is_status_2(capsys, arguments):
    assert run(arguments) == 2
    assert capsys.readouterr().out == ""


def test_help_and_version(capsys):
    assert run(["--help"]) == 0
    assert "Examples:\n  prog add 1" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("prog 0.")


def test_without_commands_the_help_is_all_there_is(capsys):
    assert run_command("prog", "Nothing yet.", {}, []) == 0
    assert "Nothing yet." in capsys.readouterr().out
    assert run_command("prog", "Nothing yet.", {}, ["train"]) == 2
