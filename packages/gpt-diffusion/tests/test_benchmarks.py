"""Every benchmark runs, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = {
    "actors.py": ["--actors", "2", "--envs", "4", "--iterations", "1", "--rounds", "1"],
    "generation.py": ["--models", "32", "--steps", "2"],
    "pairs.py": ["--runs", "2", "--checkpoints", "3", "--batch", "4", "--batches", "1"],
    "novelty.py": ["--checkpoints", "60", "--per-run", "4", "--samples", "3", "--images", "100"],
    "sampling.py": ["--networks", "1", "--steps", "2", "--repeats", "1"],
    "steps.py": ["--networks", "2", "--steps", "3", "2"],
    "training.py": ["--runs", "2", "--batch", "4", "--steps", "1", "--rounds", "1", "--peak-tflops", "0.1"],
}


@pytest.fixture
def run_folder(tiny_config):
    """A finished training."""
    from gpt_diffusion import train

    return train(tiny_config(), quiet=True).folder


def numbers(value):
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py")))
def test_benchmark_runs_and_prints_one_json_object_last(script, run_folder):
    command = [sys.executable, FOLDER / script, *SMALL[script], "--json"]
    command += ["--", run_folder] if script == "steps.py" else []
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = numbers(json.loads(result.stdout.splitlines()[-1]))
    assert len(found) > 3 and all(number >= 0 for number in found) and max(found) > 0
