"""Bars: shown where the command line asks for them, one at a time."""

import pytest
from sane import progress
from sane.progress import progress_bars, track


@pytest.mark.parametrize(("shown", "bars"), [(True, {"outer"}), (False, set())])
def test_the_outermost_loop_has_a_bar_if_bars_are_shown(shown, bars, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    with progress_bars(shown):
        pairs = [(a, b) for a in track(range(2), "outer") for b in track("xy", "inner")]
    assert pairs == [(0, "x"), (0, "y"), (1, "x"), (1, "y")]
    seen = capsys.readouterr().err
    assert {name for name in ("outer", "inner") if name in seen} == bars


def test_one_item_leaves_the_bar_to_the_loop_within(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    with progress_bars(True):
        for _ in track([0], "outer"):
            list(track(range(3), "inner"))
        list(track(range(2), "next"))
    seen = capsys.readouterr().err
    assert "outer" not in seen and "inner" in seen and "next" in seen


def test_a_loop_that_ends_early_leaves_nothing_behind(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    with progress_bars(True):
        with pytest.raises(KeyboardInterrupt):
            for _ in track(range(3), "cut"):
                raise KeyboardInterrupt
        list(track(range(2), "after"))
    assert "after" in capsys.readouterr().err.split("cut")[-1]
