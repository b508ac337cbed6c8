"""The benchmarks of steps and of memory run, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def printed(script, *options):
    command = [sys.executable, BENCHMARKS / script, *options, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_memory_of_steps_is_within_the_payload_two_blocks_and_a_chunk(dtype):
    (row,) = printed("memory.py", "--ranks", "100", "--atoms", "40000", "--dtype", dtype)["layers"]
    assert row["atoms"] == 40_080 and 0.9 * row["payload_mb"] < row["peak_mb"] <= row["limit_mb"] and row["within"]


@pytest.mark.slow
def test_the_benchmark_of_steps_prints_one_json_object():
    (row,) = printed("steps.py", "--ranks", "4", "--atoms", "100", "--rounds", "1")["steps"]
    assert row["read_gb_s"] > 0 and row["over_floor"] > 1
    assert row["ours_ms"] > 0 and row["preallocated_over_ours"] > 0 and row["concatenating_over_ours"] > 0
