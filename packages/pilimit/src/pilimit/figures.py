"""Figures drawn with matplotlib (extra ``plot``) without a display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo_common.files import atomic_write


def new_figure(columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes (a list if there are several).

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'pilimit[plot]'") from error
    figure = Figure(figsize=(6.5 * columns, 4.5), layout="constrained")
    return figure, figure.subplots(1, columns)


def draw_curves(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Losses, accuracies and atoms over epochs, as PNG.

    Args:
        lines: Those of ``metrics.jsonl`` that end an epoch.
        path: File to write.
    """
    figure, (left, middle, right) = new_figure(3)
    epochs = [line["epoch"] for line in lines]
    for part in ("train", "test"):
        left.plot(epochs, [line[f"{part}_loss"] for line in lines], "o-", markersize=3, label=part)
        middle.plot(epochs, [line[f"{part}_acc"] for line in lines], "o-", markersize=3, label=part)
    for layer, _ in enumerate(lines[0]["atoms"] if lines else ()):
        right.plot(epochs, [line["atoms"][layer] for line in lines], "o-", markersize=3, label=f"layer {layer + 1}")
    for axes, name in ((left, "loss"), (middle, "accuracy"), (right, "atoms")):
        axes.set(xlabel="epoch", ylabel=name)
        if axes.has_data():
            axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
