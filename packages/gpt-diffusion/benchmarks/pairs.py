"""Training pairs per second with augmentation: batched, against one item after the other.

    uv run packages/gpt-diffusion/benchmarks/pairs.py [--threads N] [--json]

The plain reference is the original design written out: every item reads its two records, builds the index of its
permutation in Python (arange, reshape, index, cat for every tensor) and applies it; a collate function stacks the items
of a batch. Both work on the same zoo of random vectors, in turns; every figure is the median of 5 rounds. Measured for
the original on one thread: 7,940 augmented MNIST items per second of CPU time, 8,500 for CIFAR-10. The reference here
reached 6,090 and 6,710 on one thread of a shared 2-core machine (77 and 79 %), the batched way 40,500 and 39,600.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gpt_diffusion.dataset import ParameterDataset
from gpt_diffusion.normalization import Normalizer, get_normalizer
from torch import Tensor
from zoo_common.layout import ParameterLayout
from zoo_common.symmetry import Symmetry
from zoo_common.tasks import get_task
from zoo_common.zoo import Run, Zoo

ROUNDS = 5


def mnist_rule(positions: list[Tensor]) -> list[Tensor]:
    """fc1.weight[p], fc1.bias[p], fc2.weight[:, p], fc2.bias."""
    weight, bias, out, rest = positions
    p = torch.randperm(10)
    return [weight[p], bias[p], out[:, p], rest]


def cifar10_rule(positions: list[Tensor]) -> list[Tensor]:
    """conv1.weight[p], conv2.weight[:, p][q], fc.weight[:, q], fc.bias."""
    first, second, out, rest = positions
    p, q = torch.randperm(16), torch.randperm(32)
    return [first[p], second[:, p][q], out[:, q], rest]


RULES = {"mnist": mnist_rule, "cifar10": cifar10_rule}


class Items:
    """One pair at a time, as the original's data set gives it."""

    def __init__(self, zoo: Zoo, rule: Callable[[list[Tensor]], list[Tensor]], normalizer: Normalizer) -> None:
        """Keep one mapped array of vectors and one list of metrics per run."""
        self.params = [zoo.params[run] for run in range(len(zoo))]
        self.metrics = [zoo.metrics["test_loss"][run].tolist() for run in range(len(zoo))]
        self.shapes, self.rule, self.normalizer = zoo.layout.shapes, rule, normalizer

    def permutation(self) -> Tensor:
        """A gather index for one vector."""
        positions, offset = [], 0
        for shape in self.shapes:
            size = math.prod(shape)
            positions.append(torch.arange(offset, offset + size).reshape(shape))
            offset += size
        return torch.cat([piece.flatten() for piece in self.rule(positions)])

    def __getitem__(self, i: int) -> dict[str, Tensor | float]:
        """Item i: two checkpoints of run i, the spacing uniform, then the earlier one."""
        run = i % len(self.params)
        count = len(self.params[run])
        spacing = np.random.randint(1, count)  # noqa: NPY002
        start = np.random.randint(0, count - spacing)  # noqa: NPY002
        target = start + spacing
        index, params, metrics = self.permutation(), self.params[run], self.metrics[run]
        first, second = (self.normalizer.normalize(params[k])[index] for k in (start, target))
        return {"start": first, "target": second, "start_metric": metrics[start], "target_metric": metrics[target]}

    def batch(self, order: list[int]) -> dict[str, Tensor]:
        """Collate items."""
        items = [self[i] for i in order]
        batch = {key: torch.stack([item[key] for item in items]) for key in ("start", "target")}
        return batch | {
            key: torch.tensor([item[key] for item in items], dtype=torch.float64)
            for key in ("start_metric", "target_metric")
        }


def random_zoo(folder: Path, name: str, runs: int, checkpoints: int) -> tuple[Zoo, Symmetry]:
    """A zoo of random vectors in the layout of a task."""
    task = get_task(name)
    zoo = Zoo.create(folder, layout=ParameterLayout.from_module(task.constructor()), split=(1, 0, 0))
    zoo.append(
        [
            Run(
                f"{run:04d}",
                0.1 * torch.randn(checkpoints, zoo.layout.size),
                range(checkpoints),
                {"test_loss": torch.rand(checkpoints)},
            )
            for run in range(runs)
        ]
    )
    return zoo, task.symmetry()


def measure(workloads: dict[str, Callable[[], int]]) -> dict[str, dict[str, float]]:
    """Median pairs per second of wall and of CPU time of each workload, rounds in turns."""
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in workloads}
    for round_ in range(ROUNDS + 1):
        for name, work in workloads.items():
            wall, cpu = time.perf_counter(), time.process_time()
            pairs = work()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if round_:  # the first one warms up
                figures[name].append((pairs / wall, pairs / cpu))
    return {
        name: {"wall": statistics.median(w for w, _ in rows), "cpu": statistics.median(c for _, c in rows)}
        for name, rows in figures.items()
    }


def compare(folder: Path, name: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Both ways on one zoo."""
    zoo, symmetry = random_zoo(folder, name, options.runs, options.checkpoints)
    normalizer, size = get_normalizer("openai", 4.185), options.batch
    dataset = ParameterDataset(
        zoo,
        np.arange(len(zoo)),
        metric="test_loss",
        normalizer=normalizer,
        epoch_size=100 * size,
        augment=symmetry,
    )
    items, counter = Items(zoo, RULES[name], normalizer), iter(range(10**9))

    def batched() -> int:
        for _ in range(options.batches):
            dataset.batch(size, next(counter))
        return options.batches * size

    def one_by_one() -> int:
        items.batch(torch.randint(dataset.epoch_size, (size,)).tolist())
        return size

    return measure({"one by one": one_by_one, "batched": batched})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--checkpoints", type=int, default=50)
    parser.add_argument("--batch", type=int, default=512, help="pairs in a batch")
    parser.add_argument("--batches", type=int, default=8, help="batches per measurement of the batched way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures, ratios = {}, {}
    for name in RULES:
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = compare(Path(folder) / "zoo", name, options)
        ratios[name] = figures[name]["batched"]["cpu"] / figures[name]["one by one"]["cpu"]
    if options.json:
        print(json.dumps({"pairs_per_second": figures, "ratios": ratios, "threads": options.threads}))
        return
    for name, rows in figures.items():
        for way, row in rows.items():
            print(f"{name:8} {way:12} {row['wall']:10.0f} pairs/s {row['cpu']:10.0f} pairs per CPU second")
        print(f"{name:8} {'ratio':12} {ratios[name]:10.2f} (target 5)")


if __name__ == "__main__":
    main()
