"""Commands that are killed at any moment and resumed end with the files of an uninterrupted run."""

import shutil
from pathlib import Path

import pytest
from support.reliability import assert_one_error_line, assert_same_files, run, run_killed, truncate

PROGRAMS = Path(__file__).parent / "programs"


RECORD, TRAIN, TRAIN_ADAMW = ("record_zoo.py",), ("train_resumably.py",), ("train_resumably.py", "adamw")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder of each program's output when nothing goes wrong."""
    made = {}

    def folder(program):
        if program not in made:
            made[program] = tmp_path_factory.mktemp("whole")
            result = run(command(program, made[program]))
            assert result.returncode == 0, result.stderr
        return made[program]

    return folder


def command(program, folder):
    name, *options = program
    return [PROGRAMS / name, folder, *options]


def check(program, whole, folder, seed, kills):
    assert run_killed(command(program, folder), watch=folder, seed=seed, kills=kills) > 0
    assert_same_files(folder, whole)


@pytest.mark.parametrize("program", [RECORD, TRAIN], ids=" ".join)
def test_killed_once_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, program):
    check(program, uninterrupted(program), tmp_path, seed=0, kills=1)


@pytest.mark.reliability
@pytest.mark.parametrize("program", [RECORD, TRAIN, TRAIN_ADAMW], ids=" ".join)
@pytest.mark.parametrize("seed", range(1, 3))
def test_killed_often_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, program, seed):
    check(program, uninterrupted(program), tmp_path, seed=seed, kills=6)


def test_a_damaged_zoo_is_one_clear_line(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted(RECORD), tmp_path / "zoo")
    truncate(tmp_path / "zoo" / "shards" / "run-3.safetensors")
    assert_one_error_line(run(["zoo", "inspect", tmp_path / "zoo"]), "run-3.safetensors is truncated", "restore it")
