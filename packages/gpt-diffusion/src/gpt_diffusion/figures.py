"""Figures of an evaluation, drawn with matplotlib (extra ``plot``) without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from zoo_common.files import atomic_write

from gpt_diffusion.against import Rival
from gpt_diffusion.curves import GRADIENT, KINDS, Curves, curve_name
from gpt_diffusion.evaluation import Evaluation, mean_and_band

_NAMES = {"training_set": "training runs", "test_set": "unseen runs"}


def check_matplotlib() -> None:
    """Find out before the work that figures can be drawn.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'gpt-diffusion[plot]'") from error


def draw_evaluation(
    evaluations: Mapping[str, Evaluation],
    optima: Mapping[str, float],
    metric: str,
    stem: Path,
    curves: Mapping[str, Curves],
    beside: Mapping[str, Curves],
) -> list[Path]:
    """Desired versus observed metrics, and recursive prompting; thin lines are networks, bands 95 % intervals.

    Args:
        evaluations: By group.
        optima: Best metric of the runs of each group.
        metric: Name of the metric.
        stem: Path and beginning of the file names.
        curves: Of these evaluations, by the names of the published files; an optimizer's line is taken from there.
        beside: The same of another evaluation.

    Returns:
        The files written.
    """
    from matplotlib.figure import Figure

    dvo, recursive = (Figure(figsize=(6.5 * len(evaluations), 5)) for _ in range(2))
    for place, (group, judged) in enumerate(evaluations.items(), start=1):
        left, right = (figure.add_subplot(1, len(evaluations), place) for figure in (dvo, recursive))
        desired, observed = judged.one_step.desired.cpu(), judged.one_step.observed.cpu()[:, 1:]
        left.plot(desired.T, observed.T, color="#7a9cc6", linewidth=0.5, alpha=0.5)
        _band(left, desired.double().mean(0).tolist(), *mean_and_band(observed), label="one prompted step")
        left.axline((0, 0), slope=1, color="grey", linestyle="--", label="desired = observed")
        left.set(xlabel=f"prompt: desired {metric}", ylabel=f"observed {metric}")
        left.set_title(f"{_NAMES.get(group, group)}: prompt alignment {judged.alignment:.3f}")
        steps = list(range(judged.recursive.observed.shape[1]))
        right.plot(steps, judged.recursive.observed.cpu().T, color="#7a9cc6", linewidth=0.5, alpha=0.5)
        _band(right, steps, *mean_and_band(judged.recursive.observed.cpu()), label="recursive prompting")
        right.set(xlabel="prompted steps", ylabel=f"observed {metric}", xticks=steps)
        right.set_title(_NAMES.get(group, group))
        for kind, axes in zip(KINDS, (left, right), strict=True):
            _add_lines(axes, curves, beside, curve_name(kind, group))
            axes.axhline(optima[group], color="#b04a5a", linestyle=":", label="best of the runs")
            axes.legend()
    return [_save(dvo, stem, "dvo"), _save(recursive, stem, "recursive")]


def _add_lines(axes: Any, curves: Mapping[str, Curves], beside: Mapping[str, Curves], name: str) -> None:  # noqa: ANN401
    """What an optimizer did, and the same figure of another evaluation: mean and band of its networks."""
    for source, origin in ((curves, ""), (beside, ", other evaluation")):
        if name not in source:
            continue
        lines = list(zip(source[name]["x"], source[name]["y"], source[name]["key"], strict=True))
        for x, y, _ in (line for line in lines if line[2] == GRADIENT):
            axes.plot(x, y, color="#3a7d44", linestyle="--" if origin else "-", label=GRADIENT + origin)
        networks = [(x, y) for x, y, key in lines if key.startswith("dnn_")]
        if origin and networks:
            prompts, reached = (torch.tensor(values, dtype=torch.float64) for values in zip(*networks, strict=True))
            _band(axes, prompts.mean(0).tolist(), *mean_and_band(reached), label=f"networks{origin}")


def draw_rivals(judged: Evaluation, rivals: Sequence[Rival], metric: str, stem: Path) -> Path:
    """Metric over optimizer steps beside that of one prompt."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5))
    axes = figure.add_subplot()
    last = max(rival.limit for rival in rivals)
    for rival in rivals:
        median = "never" if rival.median is None else f"{rival.median:,} steps"
        label = f"{rival.optimizer.upper()}, lr {rival.lr:g}: reaches it after {median}"
        _band(axes, rival.steps, rival.mean, rival.band, label=label)
    mean, band = mean_and_band(judged.reached[:, None])
    _band(axes, [0, last], mean.expand(2).tolist(), band.expand(2).tolist(), label="one prompted step")
    axes.set_xscale("symlog", linthresh=1)
    axes.set(xlabel="optimizer steps", ylabel=f"observed {metric}", xlim=(0, last), title="unseen runs")
    axes.legend()
    return _save(figure, stem, "against")


def _band(axes: Any, x: Sequence[float], mean: Any, band: Any, label: str) -> None:  # noqa: ANN401 (matplotlib)
    low, high = ([m + sign * b for m, b in zip(mean, band, strict=True)] for sign in (-1, 1))
    (line,) = axes.plot(x, mean, label=label)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _save(figure: Any, stem: Path, name: str) -> Path:  # noqa: ANN401 (matplotlib)
    path = stem.with_name(f"{stem.name}-{name}.png")
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path
