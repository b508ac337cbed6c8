"""The benchmark of steps runs, in small, and what it compares does the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "steps.py"


@pytest.mark.slow
def test_the_benchmark_prints_one_json_object():
    command = [sys.executable, SCRIPT, "--ranks", "4", "--atoms", "100", "--rounds", "1", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["steps"]
    assert row["ours_ms"] > 0 and row["preallocated_over_ours"] > 0 and row["concatenating_over_ours"] > 0
