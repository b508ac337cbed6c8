"""The benchmark of bounded training runs, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bounded.py"


@pytest.mark.slow
def test_the_benchmark_prints_one_json_object():
    sizes = ["--steps", "100", "--max-atoms", "40", "--keep-atoms", "20", "--r", "8"]
    result = subprocess.run([sys.executable, SCRIPT, *sizes], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["recompressions"] > 20 and measured["late_over_early"] > 0 and measured["largest_output_change"] < 1
