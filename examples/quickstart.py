"""Networks trained by sampling their weights, on real handwritten digits, offline, in minutes on a laptop CPU.

1. Thousands of small networks are trained with SGD on the digits of scikit-learn; their checkpoints are the zoo.
2. Diffusion models learn p(weights | starting weights, their loss, wanted loss) from the zoo.
3. Unseen random initialisations are prompted for a low loss, and stand beside SGD and beside trivial rivals.

Prompts and stored metrics are losses on the validation digits; every accuracy is a fraction of the test digits.
"""

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # waiting threads sleep: spinning ruins the speed of a busy machine

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gpt_diffusion import Pretrained, evaluate, load_config, load_pretrained, train
from gpt_diffusion.baselines import aligned_mean, best_ridge, line_to, nearest_by_metric
from gpt_diffusion.generation import generate, train_from
from gpt_diffusion.novelty import nearest_checkpoints
from gpt_diffusion.prompting import PromptCurves, prompt_alignment
from torch import Tensor
from zoo_common.population import Population
from zoo_common.tasks import Task, get_task
from zoo_common.zoo import Zoo

NOISE_SEEDS = 3  # samples behind every interval: this many for each network


@dataclass(frozen=True)
class Quickstart:
    """Options of the quick start."""

    runs: int = 2240
    """Networks to train for the zoo; nine of ten are learned from."""
    steps: int = 800
    """Optimizer steps of each model."""
    networks: int = 32
    """Unseen random initialisations to prompt."""
    seed: int = 0
    """Seed of everything; same seed and machine, same numbers."""
    folder: Path | None = None
    """Keep zoo and models here and continue from what is there (default: a temporary folder)."""
    out: Path = Path("quickstart.png")
    """Figure to write."""
    json: bool = False
    """Print one JSON object as the last line."""


#: The models: name, title in the table, what differs from the preset ``digits_loss``.
MAIN = "units_behaviour"
MODELS = [
    (MAIN, "unit tokens + behaviour term (ours)", []),
    ("units", "unit tokens (ours), plain loss", ["train.behaviour_weight=0"]),
    (
        "layers",
        "layer tokens, plain loss (published)",
        ["train.behaviour_weight=0", "transformer.tokens=layers", "transformer.split_policy=layer_by_layer"],
    ),
]


@dataclass(frozen=True)
class Unseen:
    """Runs that no model has seen, and how to measure weights (m, D)."""

    task: Task
    zoo: Zoo
    starts: Tensor  # (n, D)
    ends: Tensor  # (n, D), after the run's own SGD
    metrics: Tensor  # (n,), of the starts
    metric: Callable[[Tensor], Tensor]  # (m,), what prompts mean: here the loss on the validation digits
    score: Callable[[Tensor], Tensor]  # (m,), what is reported: here the accuracy on the test digits


@dataclass(frozen=True)
class Row:
    """One line of the table; None where a column has no meaning."""

    name: str
    score: float
    interval: float | None = None
    """Half width of the 95 % interval of the mean score over networks."""
    alignment: float | None = None
    alignment_interval: float | None = None
    shuffled_alignment: float | None = None
    own_rate: float | None = None
    """How often the update has its largest cosine with the update of its own SGD run."""
    cosine: float | None = None
    """Mean cosine with the update of its own SGD run."""


@dataclass(frozen=True)
class Prompted:
    """What prompting a model gave."""

    rows: list[Row]
    curves: PromptCurves
    samples: Tensor  # (seeds, n, D), of one prompted step
    shuffled_prompt_score: float
    scores: list[float]  # of the starts, and after each prompted step


def main() -> int:
    """Run the command line; returns the exit status."""
    try:
        config = tyro.cli(Quickstart, description=__doc__)
        with tempfile.TemporaryDirectory() as temporary:
            result = quickstart(config, config.folder or Path(temporary))
    except (ValueError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted; with --folder the next call goes on from here", file=sys.stderr)
        return 130
    print(json.dumps(result) if config.json else f"\n{result['seconds']:.0f} s in all; figure: {config.out}")
    return 0


def quickstart(config: Quickstart, folder: Path) -> dict[str, Any]:
    """The whole story; returns the figures."""
    for name in ("runs", "steps", "networks"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(config, name)}")
    if not config.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {config.out}: the folder {config.out.absolute().parent} does not exist")
    began = time.monotonic()
    task = get_task("digits_loss")
    say(f"1/3  training {config.runs} networks with SGD on the digits: the zoo")
    # a fixed strategy instead of the fastest in a probe: same seed, same numbers
    generate("digits_loss", folder / "zoo", runs=config.runs, seed=config.seed, strategy="stacked")
    unseen = look_at(Zoo.open(folder / "zoo"), task, config.networks)
    again = train_from(task, unseen.starts, seed=config.seed + 1)
    rows = [
        row("random initialisation", unseen.score(unseen.starts)),
        row("SGD, their own runs", unseen.score(unseen.ends), own=(1.0, 1.0)),
        row("SGD, same starts, other data order", unseen.score(again), own=own_update(again, unseen)),
    ]
    say(f"2/3  {len(MODELS)} models learn from {len(unseen.zoo.split('train'))} of the runs, {config.steps} steps each")
    results = {name: fit_and_prompt(name, title, changes, unseen, config, folder) for name, title, changes in MODELS}
    say("3/3  trivial rivals, and whether the samples are new")
    main_result = results[MAIN]
    others = rivals(unseen, main_result.curves.desired, config.seed)
    novelty = how_new(main_result.samples, unseen)
    table = rows + [r for result in results.values() for r in result.rows] + others
    print_rows(table, "test accuracy")
    explain(main_result, novelty)
    curves = {title: results[name].curves for name, title, _ in MODELS}
    plot(table, curves, config.out, "accuracy on the test digits", "validation loss")
    one_step, recursive = main_result.rows
    return {
        "random_accuracy": rows[0].score,
        "one_step_accuracy": one_step.score,
        "recursive_accuracy": recursive.score,
        "sgd_accuracy": rows[1].score,
        "line_to_mean_accuracy": next(r.score for r in others if "line" in r.name),
        "prompt_alignment": one_step.alignment,
        "shuffled_prompt_alignment": one_step.shuffled_alignment,
        "shuffled_prompt_accuracy": main_result.shuffled_prompt_score,
        "own_endpoint_rate": one_step.own_rate,
        "own_endpoint_cosine": one_step.cosine,
        "own_endpoint_cosine_ceiling": rows[2].cosine,
        "novelty": novelty,
        "table": [vars(r) for r in table],
        "figure": str(config.out),
        "seconds": round(time.monotonic() - began, 1),
    }


def look_at(zoo: Zoo, task: Task, networks: int) -> Unseen:
    """The first runs of the test split, and image classifiers' losses and accuracies."""
    population, splits = Population(task.constructor()), task.splits()

    def measure(kind: str, part: Any) -> Callable[[Tensor], Tensor]:  # noqa: ANN401 (a part of the data)
        return lambda weights: getattr(population.metrics(weights, part.images, part.labels), kind).float()

    loss, accuracy = measure("loss", splits.validation), measure("accuracy", splits.test)
    starts, ends = unseen_weights(zoo, networks)
    return Unseen(task, zoo, starts, ends, loss(starts), loss, accuracy)


def unseen_weights(zoo: Zoo, networks: int) -> tuple[Tensor, Tensor]:
    """First and last weights (n, D) of the first runs of the test split."""
    runs = zoo.split("test")[:networks]
    if len(runs) < networks or not len(zoo.split("validation")):
        raise ValueError(f"--networks {networks}: the zoo has {len(runs)} unseen runs; ask for more --runs")
    return ends_of(zoo, runs)


def ends_of(zoo: Zoo, runs: np.ndarray) -> tuple[Tensor, Tensor]:
    """First and last weights (n, D) of some runs."""
    starts, ends = (zoo.params.gather(runs, np.full_like(runs, checkpoint)) for checkpoint in (0, -1))
    return starts, ends


def fit_and_prompt(
    name: str, title: str, changes: list[str], unseen: Unseen, config: Quickstart, folder: Path
) -> Prompted:
    """Train one model on the zoo, then prompt the unseen initialisations with it."""
    settings = load_config(
        "digits_loss",
        [
            f"exp_name={name}",
            f"out_dir={folder}",
            f"dataset.path={unseen.zoo.path}",
            f"rng_seed={config.seed}",
            f"train.max_steps={config.steps}",
            *changes,
        ],
    )
    train(settings, resume=(folder / name).exists())
    return prompt(title, load_pretrained(folder / name), unseen, config.seed)


def prompt(title: str, model: Pretrained, unseen: Unseen, seed: int) -> Prompted:
    """One prompted step, recursive prompting, prompt alignment and the controls of one model."""
    n, steps = len(unseen.starts), model.config.vis.recursive_steps
    weights, metrics = unseen.starts.repeat(NOISE_SEEDS, 1), unseen.metrics.repeat(NOISE_SEEDS)
    reached = []
    for step in range(steps):
        weights = model.sample(weights, prompt=model.info.final_metric, start_metric=metrics, seed=seed + step)
        metrics = unseen.metric(weights)
        reached.append(weights.view(NOISE_SEEDS, n, -1))
    scores = [unseen.score(w.flatten(0, 1)).view(NOISE_SEEDS, n) for w in reached]
    judged = evaluate(model, unseen.task, unseen.starts, seed=seed)
    random_prompts = judged.one_step.desired.flatten()[
        torch.randperm(judged.one_step.desired.numel(), generator=torch.Generator().manual_seed(seed))[:n]
    ]
    confused = model.sample(unseen.starts, prompt=random_prompts, start_metric=unseen.metrics, seed=seed)
    aligned = prompt_alignment(judged.one_step.desired, judged.one_step.observed[:, 1:])
    alignment = (aligned, judged.shuffled_alignment)
    rows = [
        row(f"{title}: one prompted step", scores[0], alignment, own_update(reached[0], unseen)),
        row(f"{title}: {steps} prompted steps", scores[-1], own=own_update(reached[-1], unseen)),
    ]
    means = [s.mean().item() for s in (unseen.score(unseen.starts), *scores)]
    return Prompted(rows, judged.one_step, reached[0], unseen.score(confused).mean().item(), means)


def rivals(unseen: Unseen, prompts: Tensor, seed: int) -> list[Row]:
    """What needs no model: stored checkpoints, their mean, a straight line, ridge regression, noise."""
    zoo, symmetry = unseen.zoo, unseen.task.symmetry()
    best = torch.argmin if unseen.task.minimize else torch.argmax
    learned = zoo.split("train")
    fit, finals = ends_of(zoo, learned)
    counts = [zoo.runs[int(run)].checkpoints for run in learned]
    run_of, checkpoint_of = np.repeat(learned, counts), np.concatenate([np.arange(count) for count in counts])
    column = zoo.metrics[unseen.task.metric_name]
    stored = torch.from_numpy(column.gather(run_of, checkpoint_of))
    first = zoo.params.gather(run_of[[best(stored)]], checkpoint_of[[best(stored)]])
    stored_alignment = prompt_alignment(prompts, stored[nearest_by_metric(stored, prompts)])

    mean = aligned_mean(finals, symmetry)
    lines = line_to(mean, unseen.starts, symmetry)  # (n, points, D)
    on_lines = unseen.metric(lines.flatten(0, 1)).view(lines.shape[:2])
    nearest = (on_lines[:, None] - prompts[:, :, None]).abs().argmin(2)
    on_line = lines[:, best(on_lines.mean(0))]

    predicted = best_ridge((fit, finals), ends_of(zoo, zoo.split("validation")))(unseen.starts)
    noisy = finals[: len(unseen.starts)]
    noisy = noisy + 0.2 * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(seed))
    return [
        row("nearest stored checkpoint by metric", unseen.score(first), (stored_alignment, None)),
        row("aligned mean of the final checkpoints", unseen.score(mean[None])),
        row(
            "straight line to that mean",
            unseen.score(on_line),
            (prompt_alignment(prompts, on_lines.gather(1, nearest)), None),
            own_update(on_line, unseen),
        ),
        row("ridge regression, start to end", unseen.score(predicted), own=own_update(predicted, unseen)),
        row("final checkpoint + noise of size 0.2", unseen.score(noisy)),
    ]


def how_new(samples: Tensor, unseen: Unseen) -> dict[str, float]:
    """Are samples (seeds, n, D) copies? Distances up to permutation and scaling, beside those of unseen runs."""
    symmetry, learned = unseen.task.symmetry(), unseen.zoo.split("train")
    ours = nearest_checkpoints(samples[0], unseen.zoo, learned, symmetry).distance
    theirs = nearest_checkpoints(unseen.ends, unseen.zoo, learned, symmetry).distance
    between_seeds = (samples[0] - samples[1]).norm(dim=-1).mean().item()
    between_runs = torch.pdist(unseen.ends).mean().item()
    return {
        "nearest_training_checkpoint": ours.median().item(),
        "nearest_training_checkpoint_smallest": ours.min().item(),
        "unseen_runs_nearest_training_checkpoint": theirs.median().item(),
        "distance_between_noise_seeds": between_seeds,
        "distance_between_runs": between_runs,
        "diversity": between_seeds / between_runs,
    }


def own_update(weights: Tensor, unseen: Unseen) -> tuple[float, float]:
    """Whether updates (..., n, D) - starts point to the updates of their own SGD runs: rate and mean cosine."""
    theirs = F.normalize(unseen.ends - unseen.starts, dim=-1)
    cosines = F.normalize(weights - unseen.starts, dim=-1) @ theirs.T
    own = (cosines.argmax(-1) == torch.arange(len(theirs))).float().mean()
    return own.item(), cosines.diagonal(dim1=-2, dim2=-1).mean().item()


def row(
    name: str,
    scores: Tensor,
    alignment: tuple[Tensor | None, float | None] = (None, None),
    own: tuple[float | None, float | None] = (None, None),
) -> Row:
    """A line of the table from scores (n,) or (seeds, n) and alignments (n,); intervals are over networks."""
    aligned, shuffled = alignment
    found = (None, None) if aligned is None else mean_and_interval(aligned)
    return Row(name, *mean_and_interval(scores.reshape(-1, scores.shape[-1]).mean(0)), *found, shuffled, *own)


def mean_and_interval(values: Tensor) -> tuple[float, float | None]:
    """Mean of values (n,), and half width of its 95 % interval."""
    half_width = 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return values.mean().item(), half_width


def print_rows(table: list[Row], score: str, digits: int = 3) -> None:
    """The table in columns."""

    def number(value: float | None, interval: float | None, digits: int) -> str:
        spread = "" if interval is None else f" ±{interval:.{digits}f}"
        return "" if value is None else f"{value:.{digits}f}{spread}"

    lines = [["", score, "align", "shuffled", "own run", "cosine"]]
    for r in table:
        others = (number(value, None, 3) for value in (r.shuffled_alignment, r.own_rate, r.cosine))
        lines.append(
            [r.name, number(r.score, r.interval, digits), number(r.alignment, r.alignment_interval, 3), *others]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, strict=True)
        print("  ".join(f"{text:<{w}}" if i < 3 else f"{text:>{w}}" for i, (text, w) in enumerate(cells)))


def explain(main_result: Prompted, novelty: dict[str, float]) -> None:
    """What the columns mean, and how new the samples are."""
    print(
        "\nalign: prompt alignment, 1 is perfect; shuffled: the same with the prompts of each network in another order;"
        "\nown run: how often the update points to the one of its own SGD run; cosine: with that update, on average."
        f"\nOne step with random prompts: accuracy {main_result.shuffled_prompt_score:.3f}."
        f" Two noise seeds differ by {novelty['distance_between_noise_seeds']:.1f}, two runs by"
        f" {novelty['distance_between_runs']:.1f}."
        "\nNearest training checkpoint up to permutation and scaling:"
        f" {novelty['nearest_training_checkpoint']:.2f} from a sample,"
        f" {novelty['unseen_runs_nearest_training_checkpoint']:.2f} from an unseen SGD run (a copy would have 0)."
    )


def plot(table: list[Row], curves: dict[str, PromptCurves], path: Path, score: str, metric: str) -> None:
    """Scores beside desired versus observed metrics."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 5.5), width_ratios=[1.2, 1])
    left.barh([r.name for r in table], [r.score for r in table], xerr=[r.interval or 0 for r in table], color="#7a9cc6")
    left.invert_yaxis()
    left.set_xlabel(f"{score} (bars: 95 % interval over networks)")
    for title, curve in curves.items():
        right.plot(curve.desired.mean(0), curve.observed[:, 1:].mean(0), "o-", label=title)
    right.axline((0, 0), slope=1, color="grey", linestyle="--", label="desired = observed")
    right.set(xlabel=f"prompt: desired {metric}", ylabel=f"observed {metric}")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def say(text: str) -> None:
    """Progress goes to stderr, results to stdout."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
