"""Benchmarks run, in a small size, and their claims hold roughly."""

import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_closed_form_draws_are_those_of_the_loop_and_far_faster(capsys, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    runpy.run_path(str(FOLDER / "sampling.py"))["main"](small=True)
    found = re.search(r"(\d+)x, apart (\S+)", capsys.readouterr().out)
    assert int(found[1]) > 20 and float(found[2]) < 1e-6
