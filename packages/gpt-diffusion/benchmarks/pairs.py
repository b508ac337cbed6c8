"""Training pairs per second with augmentation: batched, against one item after the other.

    uv run packages/gpt-diffusion/benchmarks/pairs.py [--threads N] [--json]

The plain references are the original design written out: every item reads its two records, builds the index of its
permutation in Python (arange, reshape, index, cat for every tensor) and applies it; the items of a batch are stacked as
torch's DataLoader does it. One of them reads the records of an LMDB environment per run, as the published data sets are (environments stay
open, values are decoded to tensors), the other the mapped arrays of the zoo. All three work on the same random vectors, in
turns; figures are medians of rounds, ratios those of CPU time. Measured for the original on one thread: 7,940 augmented
MNIST items per second of CPU time, 8,500 for CIFAR-10. What a training step waits for its batch: see training.py.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from gpt_diffusion.dataset import ParameterDataset
from gpt_diffusion.normalization import Normalizer, get_normalizer
from torch import Tensor
from torch.utils.data import default_collate
from zoo_common.layout import ParameterLayout
from zoo_common.symmetry import Symmetry
from zoo_common.tasks import get_task
from zoo_common.zoo import Run, Zoo

ROUNDS = 15


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


class LmdbRecords:
    """The checkpoints of a run as float32 records of an LMDB environment, read one by one."""

    def __init__(self, folder: Path, vectors: Tensor) -> None:
        """Write the vectors (C, D) and open what was written."""
        self.keys = [f"000000/ep000_it{i:05d}.pt".encode() for i in range(len(vectors))]
        with lmdb.open(str(folder), map_size=2**30) as env, env.begin(write=True) as transaction:
            for key, vector in zip(self.keys, vectors, strict=True):
                transaction.put(key, vector.numpy().tobytes())
        self.env = lmdb.open(
            str(folder), map_size=10 * 2**20, readonly=True, lock=False, readahead=False, meminit=False
        )

    def __len__(self) -> int:
        """Checkpoints of the run."""
        return len(self.keys)

    def __getitem__(self, i: int) -> Tensor:
        """Checkpoint i (D,)."""
        with self.env.begin() as transaction:
            return torch.from_numpy(np.frombuffer(transaction.get(self.keys[i]), dtype="<f4").copy())


class Items:
    """One pair at a time, as the original's data set gives it."""

    def __init__(
        self,
        zoo: Zoo,
        params: Sequence[Tensor | LmdbRecords],
        rule: Callable[[list[Tensor]], list[Tensor]],
        normalizer: Normalizer,
    ) -> None:
        """Keep the checkpoints and one list of metrics per run."""
        self.params = params
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

    def __getitem__(self, i: int) -> dict[str, Tensor | float | str]:
        """Item i: two checkpoints of run i, the spacing uniform, then the earlier one."""
        run = i % len(self.params)
        count = len(self.params[run])
        spacing = np.random.randint(1, count)  # noqa: NPY002
        start = np.random.randint(0, count - spacing)  # noqa: NPY002
        target = start + spacing
        index, params, metrics = self.permutation(), self.params[run], self.metrics[run]
        first, second = (self.normalizer.normalize(params[k])[index] for k in (start, target))
        keys = {"checkpoint_key_0": f"{run:06d}/{start}", "checkpoint_key_1": f"{run:06d}/{target}"}
        metrics = {"test_loss_0": metrics[start], "test_loss_1": metrics[target]}
        return {
            "parameters_0": first,
            "parameters_1": second,
            **metrics,
            **keys,
            "run": f"{run:06d}",
            "spacing": spacing,
        }

    def batch(self, order: list[int]) -> dict[str, Any]:
        """Collate items as a DataLoader does."""
        collated: dict[str, Any] = default_collate([self[i] for i in order])
        return collated


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
    """Medians over rounds, in which all workloads have their turn.

    Pairs per second of wall and of CPU time, and how many times as many the batched way does (of CPU time).
    """
    rounds: list[dict[str, tuple[float, float]]] = []
    for _ in range(ROUNDS + 1):  # the first one warms up
        rounds.append({})
        for name, work in workloads.items():
            wall, cpu = time.perf_counter(), time.process_time()
            pairs = work()
            rounds[-1][name] = (pairs / (time.perf_counter() - wall), pairs / (time.process_time() - cpu))
    return {
        name: {
            "wall": statistics.median(row[name][0] for row in rounds[1:]),
            "cpu": statistics.median(row[name][1] for row in rounds[1:]),
            "batched_against_it": statistics.median(row["batched"][1] / row[name][1] for row in rounds[1:]),
        }
        for name in workloads
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
    mapped = [zoo.params[run] for run in range(len(zoo))]
    records = [LmdbRecords(folder.with_name(f"lmdb{run}"), vectors) for run, vectors in enumerate(mapped)]
    ways = {
        way: Items(zoo, params, RULES[name], normalizer) for way, params in (("LMDB items", records), ("items", mapped))
    }
    counter = iter(range(10**9))

    def batched() -> int:
        for _ in range(options.batches):
            dataset.batch(size, next(counter))
        return options.batches * size

    def one_by_one(items: Items) -> int:
        items.batch(torch.randint(dataset.epoch_size, (size,)).tolist())
        return size

    return measure({way: partial(one_by_one, items) for way, items in ways.items()} | {"batched": batched})


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
    figures = {}
    for name in RULES:
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = compare(Path(folder) / "zoo", name, options)
    if options.json:
        print(json.dumps({"pairs_per_second": figures, "threads": options.threads}))
        return
    for name, rows in figures.items():
        for way, row in rows.items():
            print(f"{name:8} {way:12} {row['wall']:10.0f} pairs/s {row['cpu']:10.0f} pairs per CPU second")
        for way, target in (("LMDB items", 10), ("items", 5)):
            print(f"{name:8} batched against {way}: {rows[way]['batched_against_it']:.2f} (target {target})")


if __name__ == "__main__":
    main()
