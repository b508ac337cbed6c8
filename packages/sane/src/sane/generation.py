"""Making a zoo: image classifiers trained with varied hyper-parameters and kept after chosen epochs (SANE, appendix on zoos).

Runs are numbered. Run i of a seed draws its hyper-parameters, its initialisation and its data order from the seed and i
alone, and is trained on one thread: the same zoo comes out of one process, a killed one that went on, or a cluster.

Hyper-parameters have the names of :mod:`sane.networks` and :mod:`sane.zoo_training`.
"""

import difflib
import hashlib
import itertools
import json
import logging
import math
import os
import re
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from zoo_common.datasets import Part, Splits
from zoo_common.formats.state_dicts import read_state
from zoo_common.interrupts import deferred_interrupt
from zoo_common.layout import ParameterLayout
from zoo_common.zoo import Run, Zoo

from sane.device import choose_device
from sane.images import first_images, images_of, shaped
from sane.networks import COLOURED, build_network, input_shape
from sane.zoo_training import make_optimizer, train_run

DEFAULTS: dict[str, Any] = {
    "model::nlin": "tanh",
    "model::init_type": "kaiming_uniform",
    "model::dropout": 0.0,
    "optim::optimizer": "adam",
    "optim::lr": 1e-3,
    "optim::wd": 0.0,
    "optim::momentum": 0.9,
    "optim::scheduler": None,
    "training::batchsize": 64,
}
"""What a run has unless something else is asked for."""
_NUMBERS: dict[str, Any] = {
    **dict.fromkeys(("model::dropout", "optim::lr", "optim::wd", "optim::momentum"), int | float),
    "training::batchsize": int,
}


@dataclass(frozen=True)
class ZooPlan:
    """What a zoo consists of; recorded in it, and compared when a killed training goes on."""

    network: str
    """``model::type``; all networks of a zoo have one layout."""
    data: str = "digits"
    """digits, mnist, fashion_mnist or cifar10; images are resized to what the network takes."""
    epochs: int = 10
    save: tuple[int, ...] = ()
    """Epochs after which the weights are kept, 0 is the initialisation; empty: after every one from 1."""
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Hyper-parameter to values; each run draws one of them."""
    train_images: int | None = None
    """Training images that are used, the first ones; default: all."""
    test_images: int | None = None
    """The same for the validation images and for the test images."""
    start: str | None = None
    """File with the weights to start from (``.safetensors`` or ``.pt``), instead of random ones."""

    def saved(self) -> tuple[int, ...]:
        """Epochs after which the weights are kept."""
        return self.save or tuple(range(1, self.epochs + 1))


@dataclass(frozen=True)
class ZooReport:
    """What a session came to."""

    path: Path
    runs: int
    """In the zoo now."""
    failed: int
    """Runs of this session that are left out, because a weight or a metric is not finite."""
    seconds: float
    stopped: str | None = None
    """None, ``interrupted`` or ``time limit``; the same call then carries on."""


def run_config(plan: ZooPlan, seed: int, index: int, shape: Sequence[int], classes: int) -> dict[str, Any]:
    """Hyper-parameters of one run on images of a shape (channels, height, width): fixed ones, those drawn, and its seed."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[8:16], "little"))
    drawn = {key: values[int(rng.integers(len(values)))] for key, values in sorted(plan.settings.items())}
    network = {"model::type": plan.network, "model::channels_in": shape[0], "model::o_dim": classes}
    network["dataset::name"] = plan.data
    if plan.network == "MLP":  # one hidden layer, unless something else is drawn
        network |= {"model::i_dim": math.prod(shape), "model::h_dim": [10]}
    return {**DEFAULTS, **network, **drawn, "seed": int.from_bytes(digest[:7], "little")}


def train_zoo(
    plan: ZooPlan,
    folder: str | Path,
    *,
    runs: int,
    seed: int = 0,
    chunk: int = 10,
    split: tuple[float, float, float] = (0.7, 0.15, 0.15),
    data_dir: Path | None = None,
    download: bool = False,
    device: str = "auto",
    ray: bool = False,
    limit_seconds: float | None = None,
    quiet: bool = True,
) -> ZooReport:
    """Train runs of a plan until a zoo has as many of this seed; what is there is left out.

    Args:
        plan: What to train.
        folder: Folder of the zoo.
        runs: Networks of this seed that the zoo shall have.
        seed: Several processes can fill one zoo, each with its own.
        chunk: Runs that are written together; what is not written is trained again after a kill.
        split: Fractions of training, validation and test runs.
        data_dir: Folder with the images, unless they come with scikit-learn.
        download: Let torchvision fetch them into ``data_dir`` if they are missing.
        device: ``auto``, ``cpu`` or ``cuda``.
        ray: Train on a Ray cluster, a CPU (or GPU) for each run.
        limit_seconds: Stop after this time.
        quiet: No bar on stderr.

    Raises:
        ValueError: The plan cannot be carried out, or the folder holds another zoo.
        FileNotFoundError: The images are missing.
        ImportError: ``ray`` is asked for and not installed.
    """
    began, place = time.monotonic(), choose_device(device)
    if ray and find_spec("ray") is None:
        raise ImportError('--ray needs Ray: pip install "sane[tune]"')
    _check(plan, runs, chunk)
    channels = 3 if plan.data == "cifar10" or plan.network in COLOURED else 1
    shape = input_shape({"model::type": plan.network, "model::i_dim": 0, "model::channels_in": channels})
    images = images_of({"data": plan.data}, None, data_dir=data_dir, download=download)
    splits = _on(images, plan, shape if len(shape) > 1 else None, place)
    work = ZooWork(plan, splits, seed)
    work.check()
    zoo = Zoo.create(
        folder,
        layout=ParameterLayout.from_module(build_network(work.config(0))),
        creator="sane",
        split=split,
        attributes={"plan": json.loads(json.dumps(asdict(plan)))},
        exist_ok=True,
    )
    parts = _missing(zoo, seed, runs, chunk)
    todo, failed, stopped = sum(map(len, parts)), 0, None
    bar = tqdm(total=runs, initial=runs - todo, desc=plan.network, unit="run", disable=quiet, leave=False, delay=1)
    with bar, deferred_interrupt() as interrupted, closing(_trained(work, parts, ray=ray)) as results:
        for part in parts:
            done: list[Run | None] = []
            for run in itertools.islice(results, len(part)):
                done.append(run)
                bar.update()
                late = limit_seconds is not None and time.monotonic() - began > limit_seconds
                stopped = "interrupted" if interrupted() else "time limit" if late else None
                if stopped:
                    break
            good = [run for run in done if run is not None]
            failed += len(done) - len(good)
            if good:
                zoo.append(good, name=f"runs-s{seed}-{part[0]:06d}-{part[0] + len(done) - 1:06d}")
            if stopped:
                break
    zoo.refresh()
    return ZooReport(Path(folder), len(zoo), failed, time.monotonic() - began, stopped)


def _on(splits: Splits, plan: ZooPlan, shape: tuple[int, ...] | None, place: torch.device) -> Splits:
    """The images that are used, in the shape of the inputs, on a device."""
    limits = (plan.train_images, plan.test_images, plan.test_images)
    parts = [shaped(first_images(part, limit), shape) for part, limit in zip(splits, limits, strict=True)]
    return Splits(*(Part(part.images.to(place), part.labels.to(place)) for part in parts))


@dataclass(frozen=True)
class ZooWork:
    """Trains single runs of a plan."""

    plan: ZooPlan
    splits: Splits
    seed: int

    def config(self, index: int) -> dict[str, Any]:
        """Hyper-parameters of a run."""
        shape, labels = self.splits.train.images.shape[1:], self.splits.train.labels
        return run_config(self.plan, self.seed, index, shape, int(labels.max()) + 1)

    def __call__(self, index: int) -> Run | None:
        """Train a run; None if a number in it is not finite."""
        config, plan = self.config(index), self.plan
        trained = train_run(config, self.splits, plan.epochs, plan.saved(), plan.start)
        return trained.run(
            f"{plan.data}-{plan.network}-s{self.seed}-{index:06d}", plan.saved(), {**config, "index": index}
        )

    def check(self) -> None:
        """Refuse, before the work, values that cannot be built or do not belong to one layout."""
        first = None
        for key, values in [*self.plan.settings.items(), ("", (None,))]:
            for value in values:
                config = self.config(0) | ({key: value} if key else {})
                network = build_network(config)
                make_optimizer(network, config)
                layout = ParameterLayout.from_module(network)
                if layout != (first := first or layout):
                    raise ValueError(f"{key}={value}: the networks of a zoo have one layout; make a zoo for each value")
                if not 1 <= config["training::batchsize"] <= len(self.splits.train.images):
                    raise ValueError(
                        f"training::batchsize {config['training::batchsize']}: use 1 to {len(self.splits.train.images)}, the "
                        "number of training images"
                    )
        if self.plan.start is not None:
            network, state = build_network(self.config(0)), read_state(Path(self.plan.start))
            if not all(tensor.float().isfinite().all() for tensor in state.values()):
                raise ValueError(f"{self.plan.start} has weights that are not finite: start from others")
            try:
                network.load_state_dict(state)
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{self.plan.start} does not fit {self.plan.network}: {reason}") from None


def _check(plan: ZooPlan, runs: int, chunk: int) -> None:
    saved = plan.saved()
    if min(runs, chunk, plan.epochs) < 1:
        raise ValueError(f"runs ({runs}), chunk ({chunk}) and epochs ({plan.epochs}) must be at least 1")
    if [*saved] != sorted({*saved}) or saved[0] < 0 or saved[-1] > plan.epochs:
        raise ValueError(f"save: expected rising epochs from 0 to {plan.epochs}, got {list(saved)}")
    known = {*DEFAULTS, "model::h_dim", "model::use_bias"}
    for key, values in plan.settings.items():
        if key in _NUMBERS and not all(type(v) is not bool and isinstance(v, _NUMBERS[key]) and v >= 0 for v in values):
            raise ValueError(f"{key}: expected numbers of at least 0, got {', '.join(map(repr, values))}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise ValueError(
                f"unknown hyper-parameter {key!r}; did you mean {near!r}? There are {', '.join(sorted(known))}"
            )
    for name in ("train_images", "test_images"):
        if (count := getattr(plan, name)) is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _missing(zoo: Zoo, seed: int, runs: int, chunk: int) -> list[range]:
    """Chunks of the runs of a seed that no shard covers."""
    names = [re.fullmatch(rf"runs-s{seed}-(\d+)-(\d+)", name) for name in zoo.shards]
    there = {i for match in names if match for i in range(int(match[1]), int(match[2]) + 1)}
    todo = [i for i in range(runs) if i not in there]
    return [
        range(part[0], part[-1] + 1)
        for _, group in itertools.groupby(enumerate(todo), key=lambda pair: (pair[1] - pair[0], pair[1] // chunk))
        if (part := [i for _, i in group])
    ]


def _trained(work: ZooWork, parts: Sequence[range], *, ray: bool) -> Generator[Run | None]:
    """Train runs in order, here or on a cluster."""
    indices = [index for part in parts for index in part]
    yield from _on_cluster(work, indices) if ray else map(work, indices)


def _on_cluster(work: ZooWork, indices: Sequence[int]) -> Generator[Run | None]:
    """Train runs on a Ray cluster, in order, twice as many at a time as it has places; dead workers are replaced."""
    # read when Ray is imported: workers shall use this environment as it is, and tell nobody about it
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    unit = "GPU" if work.splits.train.images.is_cuda else "CPU"
    places = int(ray.cluster_resources().get(unit, 0))
    if not places:
        raise ValueError(f"--ray: the cluster has no {unit}; start a worker with one, or choose another --device")
    shared = ray.put(work)
    train: Any = ray.remote(num_cpus=1, num_gpus=int(unit == "GPU"), max_retries=5)(lambda work, index: work(index))
    waiting, running = iter(indices), deque[Any]()
    try:
        while True:
            running.extend(train.remote(shared, i) for i in itertools.islice(waiting, 2 * places - len(running)))
            if not running:
                return
            yield ray.get(running.popleft())
    finally:
        for unfinished in running:
            ray.cancel(unfinished, force=True)
        if own:
            ray.shutdown()
