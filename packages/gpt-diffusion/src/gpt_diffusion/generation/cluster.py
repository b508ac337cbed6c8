"""Chunks as tasks on a Ray cluster. A worker that dies is replaced and its chunk is trained anew."""

import itertools
import logging
import os
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from zoo_common.zoo import Run

from gpt_diffusion.generation.chunks import Chunks, Tick
from gpt_diffusion.generation.work import Work

#: How often a chunk is trained anew after the death of its worker.
RETRIES = 5


def require_ray() -> None:
    """Raise ``ImportError`` unless Ray is installed."""
    if find_spec("ray") is None:
        raise ImportError('--ray needs Ray: pip install "gpt-diffusion[ray]"')


def on_cluster(work: Work, chunks: Iterable[range], tick: Tick) -> Chunks:
    """Train as many chunks at a time as the cluster has CPUs (GPUs, if the work is for them), a thread each.

    The runs come back to this process, which alone writes them; the workers need the same packages, but no common disk.
    """
    ray, own = _connect()
    unit = "GPU" if work.options.device == "cuda" else "CPU"
    slots = int(ray.cluster_resources().get(unit, 0))
    if not slots:
        raise ValueError(f"--ray: the cluster has no {unit}; start a worker with one, or choose another --device")
    train = ray.remote(num_cpus=1, num_gpus=int(unit == "GPU"), max_retries=RETRIES)(_train)
    shared, waiting = ray.put(work), iter(chunks)
    running: dict[Any, range] = {}
    try:
        while True:
            for runs in itertools.islice(waiting, slots - len(running)):
                running[train.remote(shared, runs)] = runs
            if not running:
                return
            for done in ray.wait(list(running), timeout=1)[0]:
                runs = running.pop(done)
                yield runs, _result(ray, done, runs)
                tick(len(runs) * work.options.steps)
            tick(0)
    finally:
        for unfinished in running:
            ray.cancel(unfinished, force=True)
        if own:
            ray.shutdown()


def _connect() -> tuple[Any, bool]:
    """Ray, connected, and whether this function did so."""
    # read when Ray is imported: workers shall use this environment as it is, and tell nobody about it
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    own = not ray.is_initialized()
    if own:
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(f"--ray: cannot reach or start a cluster ({error}); check RAY_ADDRESS") from error
    return ray, own


def _train(work: Work, runs: range) -> list[Run]:
    """In a worker."""
    torch.set_num_threads(1)
    return work.train(runs, lambda _: None)


def _result(ray: Any, done: Any, runs: range) -> list[Run]:  # noqa: ANN401 (Ray may not be installed)
    try:
        good: list[Run] = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        where = f"runs {runs[0]} to {runs[-1]}"
        raise ValueError(
            f"--ray: {where} failed ({type(error).__name__}: {error}); the same command goes on"
        ) from error
    return good
