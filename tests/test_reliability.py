"""Commands that are killed at any moment and resumed end with the files of an uninterrupted run."""

import shutil
from pathlib import Path

import pytest
from support.reliability import assert_one_error_line, assert_same_files, run, run_killed, truncate
from zoo_common.verify import verify_zoo

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder of each program's output when nothing goes wrong."""
    made = {}

    def folder(program):
        if program not in made:
            made[program] = tmp_path_factory.mktemp("whole")
            result = run([PROGRAMS / program, made[program]])
            assert result.returncode == 0, result.stderr
        return made[program]

    return folder


@pytest.mark.parametrize("program", ["record_zoo.py", "train_resumably.py"])
@pytest.mark.parametrize(
    ("seed", "kills"), [(0, 1), *(pytest.param(seed, 8, marks=pytest.mark.reliability) for seed in range(1, 6))]
)
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, program, seed, kills):
    killed = run_killed([PROGRAMS / program, tmp_path], watch=tmp_path, seed=seed, kills=kills)
    assert killed > 0
    assert_same_files(tmp_path, uninterrupted(program))
    if (tmp_path / "zoo.json").exists():
        assert not verify_zoo(tmp_path).problems


def test_a_damaged_zoo_is_one_clear_line(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted("record_zoo.py"), tmp_path / "zoo")
    truncate(tmp_path / "zoo" / "shards" / "run-3.safetensors")
    assert_one_error_line(run(["zoo", "inspect", tmp_path / "zoo"]), "run-3.safetensors is truncated", "restore it")
