"""The study of tokens, in a reduced size."""

import json
import math
from pathlib import Path

import pytest
from support.reliability import run

SCRIPT = Path(__file__).parents[1] / "examples" / "study.py"
SMALL = ["--runs", "120", "--seconds", "0.5", "--networks", "2", "--json"]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "steps"), [("digits", 100), ("cartpole", 2)])
def test_a_study_compares_tokens_and_rivals_and_goes_on_from_its_folder(tmp_path, task, steps):
    command = [SCRIPT, task, "--folder", tmp_path / "study", "--steps", str(steps), *SMALL]
    result = run(command)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    names = [row["name"] for row in found["table"]]
    assert len(names) == len(set(names))
    assert sum("prompted step" in name for name in names) == 2 * len(found["models"])
    assert sum("unit tokens" in name for name in names) == (4 if task == "digits" else 2)
    for about in found["models"].values():
        assert len(about["scores"]) == 1 + 4
        assert all(math.isfinite(score) for score in about["scores"])
        assert about["novelty"]["counts"]["copy"] == 0
    assert (tmp_path / "study" / "results.png").read_bytes().startswith(b"\x89PNG")
    again = json.loads(run(command).stdout.splitlines()[-1])
    assert {**again, "seconds": 0} == {**found, "seconds": 0}
    assert json.loads((tmp_path / "study" / "results.json").read_text())["table"] == found["table"]


def test_missing_images_and_unseen_runs_are_named(tmp_path):
    missing = run([SCRIPT, "mnist", "--folder", tmp_path / "study", "--data-dir", tmp_path / "none"])
    assert missing.returncode == 1
    assert f"study: MNIST: there is no folder {tmp_path / 'none'}" in missing.stderr.splitlines()[-1]
    few = run([SCRIPT, "digits", "--folder", tmp_path / "few", "--runs", "4", "--steps", "2", "--networks", "9"])
    assert few.returncode == 1
    assert "ask for more --runs" in few.stderr.splitlines()[-1]
