"""Figures drawn with matplotlib (extra ``plot``) without a display."""

import json
from pathlib import Path

from zoo_common.files import atomic_write

_TERMS = (("loss", "loss"), ("reconstruction", "reconstruction"), ("contrast", "contrast"))
"""Key of the log and title of each panel of losses."""


def draw_curves(log: Path, path: Path) -> None:
    """Draw the losses and the R2 of properties over epochs, as PNG.

    Args:
        log: ``metrics.jsonl`` of a pretraining.
        path: File to write.
    """
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(17, 4), layout="constrained")
    *losses, scores = figure.subplots(1, len(_TERMS) + 1)
    for axes, (key, title) in zip(losses, _TERMS, strict=True):
        for name, label in ((key, "training"), (f"{key}_validation", "validation")):
            points = [(line["epoch"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
        axes.set(xlabel="epoch", title=title)
    names = sorted({key for line in lines for key in line if key.startswith("r2/")})
    for name in names:
        points = [(line["epoch"], line[name]) for line in lines if name in line]
        scores.plot(*zip(*points, strict=True), "o-", markersize=3, label=name.removeprefix("r2/"))
    scores.set(xlabel="epoch", title="R2 from mean embeddings", ylim=(-0.5, 1))
    for axes in (*losses, scores):
        if axes.has_data():
            axes.legend(fontsize="small")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
