"""The procedure behind ``gpt-diffusion generate``: check, open the zoo, fill it."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zoo_common.tasks import Task, get_task
from zoo_common.zoo import Zoo

from gpt_diffusion.cartpole.policy import Actor
from gpt_diffusion.generation import actors, supervised
from gpt_diffusion.generation.chunks import Generated, fill, one_after_the_other
from gpt_diffusion.generation.cluster import on_cluster, require_ray
from gpt_diffusion.generation.work import Forecast, Request, Work, data_name


def generate(
    task: str | Task,
    directory: str | Path,
    *,
    runs: int | None,
    seed: int = 0,
    share_batches: int = 1,
    save_points: str | None = None,
    save_count: int | None = None,
    steps: int | None = None,
    strategy: str = "auto",
    device: str = "auto",
    dtype: str = "float32",
    chunk: int | None = None,
    envs: int | None = None,
    split: Sequence[float] = (0.9, 0.05, 0.05),
    data_dir: str | Path | None = None,
    download: bool = False,
    limit_seconds: float | None = None,
    ray: bool = False,
    progress: bool = True,
    dry_run: bool = False,
) -> Generated | Forecast:
    """Train many runs of a task and store them, with their metrics, in a zoo.

    Every run has its own initialisation and data order, both derived from ``seed`` and its index. The same call goes on
    with a zoo that is not finished, and with more ``runs`` adds to one that is; another ``seed`` adds other runs, and
    several processes with a seed each can do so at the same time. With the same machine and number of threads a
    generation that was killed ends with the same zoo bit for bit as one that was not.

    Args:
        task: A task, or the name of one: image classifiers are trained by the task's recipe, cart-pole actors by PPO.
        directory: Folder of the zoo.
        runs: How many runs of this seed the zoo shall have; None: go on until stopped.
        seed: Of these runs.
        share_batches: Groups of so many consecutive runs share one data order.
        save_points: ``geometric``, ``even`` or ``random`` (other steps for each run, as published); default: the task's.
        save_count: Checkpoints per run; default: the task's.
        steps: Optimizer steps (cartpole: iterations) per run; default: the task's. The learning rate is annealed over them.
        strategy: ``loop``, ``vmap``, ``stacked``, or ``auto``: the fastest in a short probe.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: Of the training, float32 or float64; the zoo stores float32.
        chunk: Runs per shard; default: that of the zoo, or as many as make a shard of 128 MiB (cartpole: as many as
            there is work for, see :mod:`gpt_diffusion.generation.actors`).
        envs: Environments of each actor, for cartpole only; default: 512.
        split: Fractions of training, validation and test runs.
        data_dir: Folder of the task's data.
        download: Let torchvision fetch missing data into ``data_dir``.
        limit_seconds: Stop after this time; chunks that are not finished then are given up.
        ray: Spread the chunks over a Ray cluster, a CPU (or GPU) for each: the one at ``RAY_ADDRESS``, or of this machine.
        progress: Show a progress bar on stderr.
        dry_run: Train nothing but a probe, and forecast.

    Raises:
        ValueError: An option is wrong, the folder cannot be written, or it holds another zoo; the message names it.
        FileNotFoundError: The data are missing.
        ImportError: ``ray`` is asked for and not installed.
    """
    if ray:
        require_ray()
    task = get_task(task, data_dir, download=download) if isinstance(task, str) else task
    request = Request(runs, seed, share_batches, save_points, save_count, steps, strategy, device, dtype, chunk, envs)
    folder = Path(directory)
    _check_folder(folder)
    zoo = Zoo.open(folder) if (folder / "zoo.json").exists() else None
    work = _work(task, request, {} if zoo is None else zoo.attributes.get("generate", {}))
    if zoo is not None:
        _check_same(work, zoo)
    if dry_run:
        return work.forecast(work.options.chunk if runs is None else runs)
    work = work.decided()
    if zoo is None:
        zoo = _create_zoo(work, folder, split)
        work = work.with_strategy(zoo.attributes["generate"]["strategy"])
        _check_same(work, zoo)
    runner = on_cluster if ray else one_after_the_other
    return fill(zoo, work, runs, runner=runner, limit=limit_seconds, progress=progress)


def _work(task: Task, request: Request, recorded: dict[str, Any]) -> Work:
    """The work asked for; where nothing is said, as the zoo was begun."""
    request = replace(
        request,
        chunk=request.chunk or recorded.get("chunk"),
        strategy=recorded.get("strategy", "auto") if request.strategy == "auto" else request.strategy,
    )
    prepare = actors.prepare if task.constructor is Actor else supervised.prepare
    return prepare(task, request)


def _check_folder(folder: Path) -> None:
    """Find out before the work that the folder can be written."""
    there = folder
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{folder}: {there} is a file, not a folder; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: {there} is not writable; choose another folder")


def _check_same(work: Work, zoo: Zoo) -> None:
    """Compare with the zoo in the folder."""
    there: dict[str, Any] = {"task": zoo.task, "layout": zoo.layout.id, **zoo.attributes.get("generate", {})}
    wanted = {"task": data_name(work.task), "layout": work.layout.id, **work.options.recorded()}
    wrong = [
        f"{key} {there.get(key)!r} there, {value!r} asked for"
        for key, value in wanted.items()
        if there.get(key) != value
    ]
    if wrong:
        raise ValueError(
            f"the zoo in {zoo.path} is another one ({'; '.join(wrong)}): use its options or another folder"
        )


def _create_zoo(work: Work, folder: Path, split: Sequence[float]) -> Zoo:
    """Make the zoo, or open the one that another process has made since."""
    if (folder / "zoo.json").exists():
        return Zoo.open(folder)
    attributes = {"generate": work.options.recorded()}
    try:
        return Zoo.create(
            folder,
            layout=work.layout,
            task=data_name(work.task),
            split=split,
            attributes=attributes,
            exist_ok=True,
        )
    except OSError as error:
        raise ValueError(f"{folder}: cannot make a zoo here ({error}); choose another folder") from error
