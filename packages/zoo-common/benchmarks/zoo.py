"""Zoos on disk: random reads, opening, and storing differences, each against the plain way in the same run.

    uv run packages/zoo-common/benchmarks/zoo.py [--zoo FOLDER] [--json]

``reads``: 1,000 random checkpoints of 2,000 with 10,000 parameters, gathered from one zoo, against ``torch.load`` of one
``.pt`` file each (warm cache). ``open``: 10,000 runs of 5 checkpoints in 20 shards, and in 10,000 (as a recorder writes
them). ``flat``: one random checkpoint of zoos with 100, 1,000 and 10,000 runs in a shard each, all opened and read
before. ``delta10``: sizes of the same runs, and the change of their test loss and error (points: percent of the images)
when the networks are read back; the runs are those of ``--zoo`` (``gpt-diffusion generate digits FOLDER --runs 64``), or
16 networks trained on the digits here. Medians of 5 rounds on one thread.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from zoo_common import ParameterLayout, Population, Run, Zoo, get_task
from zoo_common.coding import STORAGES

ROUNDS = 5


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """Median seconds of a piece of work; the first round warms up."""
    figures = []
    for round_ in range(ROUNDS + 1):
        start = time.perf_counter()
        for _ in range(times):
            work()
        if round_:
            figures.append((time.perf_counter() - start) / times)
    return statistics.median(figures)


def layout_of(size: int) -> ParameterLayout:
    """One tensor."""
    return ParameterLayout.from_state_dict({"w": torch.zeros(size)})


def reads(folder: Path) -> dict[str, float]:
    """Milliseconds for 1,000 random checkpoints."""
    vectors = torch.randn(2000, 10_000)
    zoo = Zoo.create(folder / "zoo", layout=layout_of(10_000))
    zoo.append([Run(f"{i}", vectors[i : i + 40], range(40)) for i in range(0, 2000, 40)])
    for i, vector in enumerate(vectors):
        torch.save(vector.clone(), folder / f"{i}.pt")
    chosen = np.random.default_rng(0).permutation(2000)[:1000]
    runs, checkpoints = np.divmod(chosen, 40)
    names = [folder / f"{i}.pt" for i in chosen]
    from_files = torch.stack([torch.load(name) for name in names])
    assert torch.equal(zoo.params.gather(runs, checkpoints), from_files)
    found = {
        "zoo": 1e3 * seconds(lambda: zoo.params.gather(runs, checkpoints)),
        "pt files": 1e3 * seconds(lambda: [torch.load(name) for name in names]),
    }
    return found | {"pt files / zoo": found["pt files"] / found["zoo"]}


def many_runs(folder: Path, runs: int, shards: int) -> Zoo:
    """A zoo of runs with 5 checkpoints of 1,000 parameters and two metrics."""
    zoo = Zoo.create(folder, layout=layout_of(1000))
    each = runs // shards
    vectors = torch.randn(5 * each, 1000)
    metrics = {"loss": torch.rand(5), "error": torch.rand(5)}
    for shard in range(shards):
        parts = [
            Run(f"{shard}-{i}", vectors[5 * i : 5 * i + 5], range(5), metrics, {"seed": i, "lr": 0.1})
            for i in range(each)
        ]
        zoo.append(parts, name=f"{shard:06d}")
    return zoo


def open_and_read(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds to open zoos (and count their runs), microseconds of a random read."""
    opened: dict[str, float] = {}
    read: dict[str, float] = {}
    rng = np.random.default_rng(0)
    for runs, shards in ((10_000, 20), (100, 100), (1000, 1000), (10_000, 10_000)):
        path = folder / f"{runs}-{shards}"
        many_runs(path, runs, shards)
        opened[f"{runs:,} runs in {shards:,} files"] = seconds(lambda path=path: len(Zoo.open(path)))
        zoo = Zoo.open(path)
        zoo.params.gather(np.arange(runs), np.zeros(runs, int))
        wanted = iter(np.stack([rng.integers(runs, size=6000), rng.integers(5, size=6000)], axis=1).tolist())
        one = seconds(lambda zoo=zoo, wanted=wanted: zoo.params[tuple(next(wanted))].sum(), times=1000)
        read[f"{runs:,} runs in {shards:,} files"] = 1e6 * one
        shutil.rmtree(path)
    return {"open, s": opened, "random read, us": read}


def trained() -> list[Run]:
    """Sixteen networks trained on the digits, 42 checkpoints each."""
    task = get_task("digits_loss")
    population, (images, labels) = Population(task.constructor()), task.splits().train  # type: ignore[misc]
    generator = torch.Generator().manual_seed(0)
    layout = ParameterLayout.from_module(task.constructor())
    vectors = torch.stack([layout.flatten(task.constructor()).detach() for _ in range(16)])
    momentum, saved = torch.zeros_like(vectors), []
    steps = np.unique(np.geomspace(1, 1000, 55).astype(int)) - 1
    for step in range(1000):
        if step in steps:
            saved.append(vectors.clone())
        batch = torch.randint(len(images), (64,), generator=generator)
        vectors.requires_grad_()
        logits = population(vectors, images[batch]).transpose(1, 2)
        loss = nn.functional.cross_entropy(logits, labels[batch].expand(16, -1), reduction="none").mean(1).sum()
        momentum = 0.9 * momentum + torch.autograd.grad(loss, vectors)[0]
        vectors = vectors.detach() - 0.05 * momentum
    return [Run(f"{i}", run, range(len(saved))) for i, run in enumerate(torch.stack(saved, dim=1))]


def coding(folder: Path, source: Path | None, data_dir: Path | None) -> dict[str, dict[str, float]]:
    """Size, and change of test loss and error, of the same runs in every storage."""
    task_name = "digits_loss"
    if source is None:
        runs = trained()
    else:
        zoo = Zoo.open(source)
        task_name = zoo.task or task_name
        runs = [zoo.run(i) for i in range(len(zoo))]
    task = get_task(task_name, data_dir)
    population, (images, labels) = Population(task.constructor()), task.splits().test  # type: ignore[misc]
    found: dict[str, dict[str, float]] = {}
    exact: tuple[Tensor, Tensor] | None = None
    for storage in STORAGES:
        zoo = Zoo.create(folder / storage, layout=ParameterLayout.from_module(task.constructor()), dtype=storage)
        name = zoo.append(runs, name="all")
        vectors = torch.cat([zoo.params[i] for i in range(len(zoo))]).float()
        metrics = population.metrics(vectors, images, labels)
        loss, error = metrics.loss.double(), metrics.error.double()
        exact = exact or (loss, error)
        rounding = zoo.rounding()
        found[storage] = {
            "MB": zoo.shards[name].file.path.stat().st_size / 1e6,
            "relative RMS error": rounding.relative_rms if rounding else 0.0,
            "loss, largest change": (loss - exact[0]).abs().max().item(),
            "loss, mean change": (loss - exact[0]).abs().mean().item(),
            "points, largest change": (error - exact[1]).abs().max().item(),
            "points, mean change": (error - exact[1]).abs().mean().item(),
            "points, change of the mean": (error - exact[1]).mean().abs().item(),
        }
        found[storage]["float32 / this"] = found["float32"]["MB"] / found[storage]["MB"]
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, help="real zoo to store in all ways")
    parser.add_argument("--data-dir", type=Path, help="images of its task")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        for part in ("reads", "many", "coding"):
            (Path(name) / part).mkdir()
        found = {"1,000 random reads, ms": reads(Path(name) / "reads")}
        found |= open_and_read(Path(name) / "many")
        found |= coding(Path(name) / "coding", options.zoo, options.data_dir)
    if options.json:
        print(json.dumps(found))
        return
    targets = {"pt files / zoo": "at least 15", "open, s": "below 1", "float32 / this": "delta10: at least 2.5"}
    for title, figures in found.items():
        print(f"{title}{f' (target: {targets[title]})' if title in targets else ''}")
        for name, value in figures.items():
            print(f"  {name:32} {value:10.4g}{f'  (target: {targets[name]})' if name in targets else ''}")


if __name__ == "__main__":
    main()
