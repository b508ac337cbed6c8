"""The quick start runs, in a smaller size."""

import runpy
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "examples" / "quickstart.py"


def test_the_quick_start_runs_and_prints_its_numbers(tmp_path, capsys):
    program = runpy.run_path(str(PROGRAM))
    numbers = program["main"](program["Sizes"](runs=60, zoo_epochs=2, epochs=2, folder=tmp_path))
    out = capsys.readouterr().out
    assert "zoo: 60 runs of 2 checkpoints with 760 weights" in out and "sampled networks: test accuracy" in out
    assert 0 <= numbers["sampled_accuracy"] <= 1 and numbers["relative_error"] > 0
