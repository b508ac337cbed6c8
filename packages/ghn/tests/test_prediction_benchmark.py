"""The benchmark of predictions runs, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "prediction.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--archs", "squeezenet1_1"], ["--training", "--meta-batch", "2", "--images", "2"]]
)
def test_the_benchmark_prints_one_json_object_last(arguments):
    command = [sys.executable, SCRIPT, *arguments, "--rounds", "1", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert '"factor": ' in result.stdout and json.loads(result.stdout.splitlines()[-1])
