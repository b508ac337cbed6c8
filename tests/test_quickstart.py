"""The quick start in a reduced size: the command a stranger types first."""

import json
import math
from pathlib import Path

import pytest
from support.reliability import assert_one_error_line, run

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
SMALL = ["--runs", "160", "--steps", "25", "--networks", "5"]


def figures(folder, *options):
    result = run([SCRIPT, *SMALL, "--out", folder / "figure.png", "--json", *options])
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def without_time(found):
    return {name: value for name, value in found.items() if name not in ("seconds", "figure")}


def test_the_quick_start_reports_what_it_promises(tmp_path):
    found = figures(tmp_path)
    fractions = ["random_accuracy", "one_step_accuracy", "recursive_accuracy", "sgd_accuracy", "line_to_mean_accuracy"]
    assert all(0 <= found[name] <= 1 for name in [*fractions, "own_endpoint_rate"])
    assert found["random_accuracy"] < 0.3
    assert found["sgd_accuracy"] > 0.9
    assert found["one_step_accuracy"] > found["random_accuracy"]
    assert found["prompt_alignment"] <= 1
    assert math.isfinite(found["shuffled_prompt_alignment"])
    novelty = found["novelty"]
    assert novelty["nearest_training_checkpoint"] > 0
    assert novelty["unseen_runs_nearest_training_checkpoint"] > 0
    assert found["seconds"] > 0
    assert len(found["table"]) == 3 + 2 * 3 + 5
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_a_kept_folder_continues(tmp_path):
    kept = ["--folder", str(tmp_path / "kept")]
    first, again, other = figures(tmp_path, *kept), figures(tmp_path, *kept), figures(tmp_path, "--seed", "1")
    assert without_time(figures(tmp_path)) == without_time(first) == without_time(again)
    assert other["one_step_accuracy"] != first["one_step_accuracy"]


@pytest.mark.parametrize("option", ["--runs", "--steps", "--networks"])
def test_zero_counts_are_refused(tmp_path, option):
    result = run([SCRIPT, option, "0", "--out", tmp_path / "figure.png"])
    assert_one_error_line(result, f"{option} must be at least 1, got 0")
    assert not list(tmp_path.iterdir())


def test_too_few_unseen_runs_are_named(tmp_path):
    result = run([SCRIPT, "--runs", "12", "--networks", "30", "--out", tmp_path / "figure.png"])
    assert result.returncode == 1
    assert "ask for more --runs" in result.stderr.splitlines()[-1]
