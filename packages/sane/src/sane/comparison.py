"""Are sampled networks better than what costs nothing, and are they new?

Shapes: ``n`` networks, ``a`` anchors, ``m`` members of a zoo, ``d`` numbers each.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from zoo_common.datasets import Splits
from zoo_common.symmetry import Symmetry
from zoo_common.tokens import ChannelTokenizer

from sane.population import FineTuning, Networks
from sane.progress import track

_CANDIDATES = 32
"""Members that are aligned with each network: the nearest ones before that."""


@dataclass(frozen=True)
class GroupScore:
    """One way to obtain networks, before and after the same fine-tuning. Accuracies are fractions, on test data."""

    name: str
    networks: int
    zero_shot: float
    zero_shot_std: float
    finetuned: tuple[float, ...]
    """Mean after each epoch."""
    finetuned_std: tuple[float, ...]
    best: float
    """Zero-shot, of the network that is best on validation data."""
    best_finetuned: float | None
    """The same after the last epoch, chosen anew."""
    ensemble: float
    """Accuracy of the mean logits after the last epoch."""


def rival_groups(
    samples: Tensor,
    anchors: Tensor,
    scores: Tensor,
    tokenizer: ChannelTokenizer,
    random: Tensor,
    seed: int = 0,
    draws: int | None = None,
) -> dict[str, Tensor]:
    """What sampled networks are compared with.

    Args:
        samples: (n, d).
        anchors: (a, d), aligned with each other.
        scores: (a,) of the anchors on validation data.
        tokenizer: Its layers scale the noise.
        random: (m, d) random initialisations.
        seed: Draws anchors and noise.
        draws: Noisy anchors, m; default: as many as samples.

    Returns:
        Name -> networks: the best anchor (1, d); anchors with noise (m, d) of the norm, in each layer, of the median
        distance between samples and their nearest anchors; the average of the anchors (1, d); random initialisations
        (m, d).
    """
    generator = torch.Generator().manual_seed(seed)
    nearest = anchors[torch.cdist(samples, anchors).argmin(1)]
    noise = torch.randn(draws or len(samples), samples.shape[1], generator=generator)
    shift = samples - nearest
    for layer in tokenizer.layers:
        for name in (layer.weight, layer.bias):
            if name is not None:
                span = tokenizer.layout.slices[name]
                size = shift[:, span].norm(dim=1).median()
                noise[:, span] *= size / noise[:, span].norm(dim=1, keepdim=True).clamp_min(1e-12)
    chosen = torch.randint(len(anchors), (len(noise),), generator=generator)
    noisy = anchors[chosen] + noise
    for name in (n for n in tokenizer.layout.names if n.endswith("running_var")):
        noisy[:, tokenizer.layout.slices[name]].clamp_min_(1e-5)
    return {
        "best anchor": anchors[scores.argmax()][None],
        "anchor + noise": noisy,
        "average of anchors": anchors.mean(0, keepdim=True),
        "random initialisation": random,
    }


def compare_groups(
    networks: Networks, groups: Mapping[str, Tensor], splits: Splits, finetuning: FineTuning, seed: int = 0
) -> list[GroupScore]:
    """Judge all groups on test data, zero-shot and after each epoch of the same fine-tuning.

    Selections use validation data alone.
    """
    sizes = [len(vectors) for vectors in groups.values()]
    joined = torch.cat(list(groups.values()))
    trained, accuracies = networks.finetune_judged(joined, splits, finetuning, seed=seed)
    scores, start = [], 0
    for name, size in zip(groups, sizes, strict=True):
        rows = slice(start, start + size)
        test, validation = (accuracies[name][:, rows] for name in ("test", "validation"))
        scores.append(
            GroupScore(
                name,
                size,
                test[0].mean().item(),
                test[0].std(correction=0).item(),
                tuple(row.mean().item() for row in test[1:]),
                tuple(row.std(correction=0).item() for row in test[1:]),
                test[0][validation[0].argmax()].item(),
                test[-1][validation[-1].argmax()].item() if finetuning.epochs else None,
                networks.ensemble_accuracy(trained[rows], splits.test),
            )
        )
        start += size
    return scores


class Nearest(NamedTuple):
    """The nearest member of a zoo for each network."""

    distance: Tensor
    """(n,) Euclidean distance, by the norm of the network, after alignment with it."""
    member: Tensor
    """(n,) index of the member."""


def nearest_members(networks: Tensor, members: Callable[[], Iterable[Tensor]], symmetry: Symmetry | None) -> Nearest:
    """Distance to the nearest member up to the order of hidden units.

    The members nearest without alignment (32 for each network) are aligned with it by weight matching, so distances are
    upper bounds. No more than one block of members is held at a time.

    Args:
        networks: (n, d), in canonical form like the members.
        members: Gives blocks (m, d) of aligned members, the same ones whenever it is called.
        symmetry: Of the networks; None compares them as they are.

    Raises:
        ValueError: No members.
    """
    rough, places = networks.new_zeros(len(networks), 0), torch.zeros(len(networks), 0, dtype=torch.int64)
    count = 0
    for block in members():
        rough = torch.cat([rough, torch.cdist(networks, block)], dim=1)
        places = torch.cat([places, torch.arange(count, count + len(block)).expand(len(networks), -1)], dim=1)
        rough, keep = rough.topk(min(_CANDIDATES, rough.shape[1]), largest=False)
        places, count = places.gather(1, keep), count + len(block)
    if not count:
        raise ValueError("there are no members to compare with")
    distance, member, start = rough.new_full((len(networks),), torch.inf), places[:, 0].clone(), 0
    for block in members():
        for k, network in track(enumerate(networks), "novelty"):
            inside = places[k][(places[k] >= start) & (places[k] < start + len(block))]
            if not len(inside):
                continue
            near = block[inside - start]
            exact = (near - network).norm(dim=1)
            if symmetry is not None:
                exact = torch.minimum(exact, (symmetry.align(near, network) - network).norm(dim=1))
            if (least := exact.min()) < distance[k]:
                distance[k], member[k] = least, inside[exact.argmin()]
        start += len(block)
    return Nearest(distance / networks.norm(dim=1).clamp_min(1e-12), member)


@dataclass(frozen=True)
class NoveltyReport:
    """Distances (by the norm) to the nearest training checkpoint, of samples and of runs that training has not seen."""

    samples: float
    """Median."""
    samples_least: float
    unseen: float | None
    """Median of unseen checkpoints; None if there are none."""
    unseen_low: float | None
    """Their 5 % quantile."""
    nearer_than_unseen: float
    """Share of samples nearer than that quantile (without unseen runs: than 1 % of the norm)."""


def novelty_report(samples: Nearest, unseen: Nearest | None) -> NoveltyReport:
    """How new samples are, in comparison with unseen runs."""
    low = None if unseen is None else float(torch.quantile(unseen.distance, 0.05))
    nearer = (samples.distance < (0.01 if low is None else low)).double().mean()
    middle = None if unseen is None else float(unseen.distance.median())
    return NoveltyReport(float(samples.distance.median()), float(samples.distance.min()), middle, low, float(nearer))
