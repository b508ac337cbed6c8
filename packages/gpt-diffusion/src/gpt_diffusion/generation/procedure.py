"""The procedure behind ``gpt-diffusion generate``: train runs chunk by chunk and store each chunk as one shard.

A chunk is trained whole, judged, and written with a fixed name; a generation that was killed and is started again with
the same options leaves out the shards that are there, and ends with the same zoo bit for bit (same machine and number
of threads).
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from zoo_common.layout import ParameterLayout
from zoo_common.population import Population
from zoo_common.tasks import Task, get_task
from zoo_common.zoo import Run, Zoo

from gpt_diffusion.device import choose_device
from gpt_diffusion.generation.batches import derive_seed
from gpt_diffusion.generation.schedule import SCHEDULES, random_save_points, save_points
from gpt_diffusion.generation.trainers import TRAINERS, Job, initial_vectors, strategies_for

#: Saved vectors of one chunk, in bytes, when ``chunk`` is not given.
CHUNK_BYTES = 128 * 2**20
#: Working memory of the runs that are stepped together on a CPU, in bytes: what stays in its caches.
STACK_BYTES = 4 * 2**20
#: Optimizer steps of the probe that compares the strategies.
PROBE_STEPS = 20

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Generated:
    """What a generation did."""

    runs: int
    """Finite runs that the zoo holds now."""
    dropped: int
    """Runs left out because a weight or a metric was not finite."""
    remaining: int
    """Runs not trained yet."""
    model_steps: int
    """Optimizer steps made now, all runs together."""
    seconds: float
    strategy: str
    stopped: str | None
    """None, ``interrupted`` or ``time limit``; the same command then carries on."""


@dataclass(frozen=True)
class Forecast:
    """What a generation would cost (``dry_run``)."""

    runs: int
    model_steps: int
    seconds: float
    bytes: int
    strategy: str
    model_steps_per_second: dict[str, float]
    """By strategy, as the probe measured them."""


class _Options(NamedTuple):
    """What decides the content of the zoo; recorded in it and compared when it is continued."""

    runs: int
    seed: int
    steps: int
    share_batches: int
    save_points: str
    save_count: int
    chunk: int
    device: str
    dtype: str


@dataclass(frozen=True)
class _Plan:
    """A checked generation: task data on the device, and the options."""

    task: Task
    job: Job
    options: _Options
    device: torch.device
    parts: dict[str, tuple[Tensor, Tensor]]  # metric prefix -> images, labels

    def order_seeds(self, runs: range) -> list[int]:
        """Seeds of the data orders of these runs, one per group; a group never crosses a chunk."""
        group = self.options.share_batches
        return [derive_seed(self.options.seed, "order", run // group) for run in runs[::group]]

    def init_seeds(self, runs: range) -> list[int]:
        """Seeds of the initialisations."""
        return [derive_seed(self.options.seed, "init", run) for run in runs]

    def saves(self, runs: range) -> Tensor:
        """Save points (n, c) of these runs."""
        o = self.options
        if o.save_points == "random":
            seeds = [derive_seed(o.seed, "save", run) for run in runs]
            return torch.tensor([random_save_points(o.save_count, o.steps, seed) for seed in seeds])
        return torch.tensor(save_points(o.save_points, o.save_count, o.steps)).expand(len(runs), -1)

    def width(self) -> int:
        """Runs to step together: whole groups."""
        group = self.options.share_batches
        if self.device.type != "cpu":
            return self.options.chunk
        item = self.job.images.element_size()
        batch = self.job.recipe.batch * self.job.images[0].numel() * item
        per_group = batch + group * 3 * self.job.layout.size * item
        return group * max(1, STACK_BYTES // per_group)


def generate(
    task: str | Task,
    directory: str | Path,
    *,
    runs: int,
    seed: int = 0,
    share_batches: int = 1,
    save_points: str | None = None,
    save_count: int | None = None,
    steps: int | None = None,
    strategy: str = "auto",
    device: str = "auto",
    dtype: str = "float32",
    chunk: int | None = None,
    split: Sequence[float] = (0.9, 0.05, 0.05),
    data_dir: str | Path | None = None,
    download: bool = False,
    limit_seconds: float | None = None,
    progress: bool = True,
    dry_run: bool = False,
) -> Generated | Forecast:
    """Train many runs of a supervised task and store them, with their metrics, in a zoo.

    Every run has its own initialisation and data order, both derived from ``seed`` and its index.

    Args:
        task: A task, or the name of one.
        directory: Folder of the zoo; one that holds an unfinished generation with the same options is continued.
        runs: How many runs the zoo shall have.
        seed: Of the whole zoo.
        share_batches: Groups of so many consecutive runs share one data order.
        save_points: ``geometric``, ``even`` or ``random`` (other steps for each run, as published); default: the task's.
        save_count: Checkpoints per run; default: the task's.
        steps: Optimizer steps per run; default: the task's. The learning rate is annealed over them.
        strategy: ``loop``, ``vmap``, ``stacked``, or ``auto``: the fastest in a short probe.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: Of the training, float32 or float64; the zoo stores float32.
        chunk: Runs per shard; default: as many as make a shard of 128 MiB.
        split: Fractions of training, validation and test runs.
        data_dir: Folder of the task's data.
        download: Let torchvision fetch missing data into ``data_dir``.
        limit_seconds: Stop before a chunk that would probably end later.
        progress: Show a progress bar on stderr.
        dry_run: Train nothing but a probe, and forecast.

    Raises:
        ValueError: An option is wrong, the folder cannot be written, or it holds another zoo; the message names it.
        FileNotFoundError: The data are missing.
    """
    task = get_task(task, data_dir, download=download) if isinstance(task, str) else task
    folder = Path(directory)
    _check_folder(folder)
    plan = _plan(task, runs, seed, share_batches, save_points, save_count, steps, device, dtype, chunk)
    zoo, chosen, rates = _open_zoo(plan, folder, strategy, dry_run)
    if dry_run:
        rates = rates or _probe(plan, [chosen])
        return _forecast(plan, chosen, rates)
    if zoo is None:
        zoo = _create_zoo(plan, folder, chosen, split)
    return _generate(plan, zoo, chosen, limit_seconds, progress)


def train_from(task: Task, starts: Tensor, *, seed: int, steps: int | None = None, device: str = "auto") -> Tensor:
    """Train given initialisations with the task's recipe, each in a data order of its own.

    Args:
        task: A supervised task.
        starts: Weights to start from, (n, d).
        seed: Of the data orders.
        steps: Optimizer steps; default: the task's.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        The trained weights (n, d) float32, on the CPU.

    Raises:
        ValueError: The starts are of another layout.
    """
    total = _plan(task, len(starts), seed, 1, None, None, steps, device, "float32", None).options.steps
    return trajectories_from(task, starts, [total], seed=seed, steps=steps, device=device)[:, 0]


def trajectories_from(
    task: Task,
    starts: Tensor,
    saves: Sequence[int],
    *,
    seed: int,
    steps: int | None = None,
    adam_lr: float | None = None,
    device: str = "auto",
    tick: Callable[[int], object] = lambda _: None,
) -> Tensor:
    """Train as :func:`train_from` does, and keep the weights after ``saves`` optimizer steps.

    Args:
        task: A supervised task.
        starts: Weights to start from, (n, d).
        saves: Optimizer steps (c,); 0 is the start.
        seed: Of the data orders.
        steps: Optimizer steps; default: the task's. The learning rate is annealed over them.
        adam_lr: Train with Adam and this learning rate, annealed alike, instead of the task's SGD.
        device: ``auto``, ``cpu`` or ``cuda``.
        tick: Called with the number of model-steps done since the last call.

    Returns:
        The weights (n, c, d) float32, on the CPU.

    Raises:
        ValueError: The starts are of another layout.
    """
    plan = _plan(task, len(starts), seed, 1, None, None, steps, device, "float32", None)
    if starts.ndim != 2 or starts.shape[1] != plan.job.layout.size:
        raise ValueError(f"starts: expected (n, {plan.job.layout.size}), got {tuple(starts.shape)}")
    job = plan.job
    if adam_lr is not None:
        job = replace(job, adam=True, rates=[rate * adam_lr / job.recipe.lr for rate in job.rates])
    strategy = strategies_for(job.module, job.layout)[0]
    ends = []
    for part in _parts(plan, range(len(starts))):
        points = torch.tensor(saves).expand(len(part), -1)
        vectors = starts[part.start : part.stop].to(plan.device, torch.float32)
        ends.append(TRAINERS[strategy](job, vectors, plan.order_seeds(part), 1, points, tick))
    return torch.cat(ends)


def _plan(
    task: Task,
    runs: int,
    seed: int,
    share_batches: int,
    schedule: str | None,
    save_count: int | None,
    steps: int | None,
    device: str,
    dtype: str,
    chunk: int | None,
) -> _Plan:
    """Check the options and bring the data to the device."""
    if task.recipe is None or task.splits is None:
        raise ValueError(f"task {task.name!r} has no training recipe for supervised runs")
    counts = {"runs": runs, "share_batches": share_batches, "steps": steps, "save_count": save_count, "chunk": chunk}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if schedule is not None and schedule not in SCHEDULES:
        raise ValueError(f"save_points must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    place, precision = choose_device(device), _DTYPES[dtype]
    module = task.constructor().to(place, precision).train()
    _check_network(module)
    layout = ParameterLayout.from_module(module.to(torch.float32))
    splits = task.splits()
    images, labels = splits.train.images.to(place, precision), splits.train.labels.to(place)
    if task.recipe.batch > len(images):
        raise ValueError(f"task {task.name!r}: a batch of {task.recipe.batch} needs as many images, got {len(images)}")
    total = steps or task.recipe.total_steps(len(images))
    saves = save_count or min(task.recipe.save_count, total + 1)
    if not 2 <= saves <= total + 1:
        raise ValueError(f"save_count must be 2 to steps + 1 = {total + 1}, got {saves}")
    size = chunk or max(1, CHUNK_BYTES // (saves * layout.size * 4))
    size = -(-min(size, runs) // share_batches) * share_batches
    schedule = schedule or task.recipe.save_points
    options = _Options(runs, seed, total, share_batches, schedule, saves, size, place.type, dtype)
    rates = task.recipe.learning_rates(len(images), total)
    job = Job(module.to(precision), layout, task.recipe, images, labels, rates)
    parts = (
        {"test": splits.test} if splits.validation is splits.test else {"val": splits.validation, "test": splits.test}
    )
    moved = {name: (part.images.to(place, precision), part.labels.to(place)) for name, part in parts.items()}
    return _Plan(task, job, options, place, moved)


def _check_network(module: nn.Module) -> None:
    """Refuse what the strategies would not train alike."""
    for name, _ in module.named_buffers():
        raise ValueError(f"buffer {name!r}: runs of networks with buffers (batch norm ...) cannot be generated")
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise ValueError(f"module {name!r}: runs of networks with dropout cannot be generated")


def _check_folder(folder: Path) -> None:
    """Find out before the work that the folder can be written."""
    there = folder
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{folder}: {there} is a file, not a folder; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: {there} is not writable; choose another folder")


def _open_zoo(plan: _Plan, folder: Path, strategy: str, dry_run: bool) -> tuple[Zoo | None, str, dict[str, float]]:
    """The unfinished zoo, if there is one; the strategy; and, if the strategies were probed, their speeds."""
    possible = strategies_for(plan.job.module, plan.job.layout)
    if strategy != "auto" and strategy not in possible:
        raise ValueError(f"strategy must be one of auto, {', '.join(possible)} for this network, got {strategy!r}")
    if (folder / "zoo.json").exists():
        zoo = Zoo.open(folder)
        recorded = _check_same(plan, zoo, strategy)
        return zoo, recorded, {}
    if strategy != "auto":
        return None, strategy, {}
    rates = _probe(plan, possible)
    return None, max(rates, key=lambda name: rates[name]), rates


def _check_same(plan: _Plan, zoo: Zoo, strategy: str) -> str:
    """Compare with the zoo in the folder; returns its strategy."""
    there: dict[str, Any] = {"task": zoo.task, "layout": zoo.layout.id, **zoo.attributes.get("generate", {})}
    wanted = {"task": _data_name(plan.task), "layout": plan.job.layout.id, **plan.options._asdict()}
    if strategy != "auto":
        wanted["strategy"] = strategy
    wrong = [
        f"{key} {there.get(key)!r} there, {value!r} asked for"
        for key, value in wanted.items()
        if there.get(key) != value
    ]
    if wrong:
        raise ValueError(
            f"the zoo in {zoo.path} is another one ({'; '.join(wrong)}): use its options or another folder"
        )
    return str(there["strategy"])


def _create_zoo(plan: _Plan, folder: Path, strategy: str, split: Sequence[float]) -> Zoo:
    attributes = {"generate": plan.options._asdict() | {"strategy": strategy}}
    try:
        return Zoo.create(
            folder, layout=plan.job.layout, task=_data_name(plan.task), split=split, attributes=attributes
        )
    except OSError as error:
        raise ValueError(f"{folder}: cannot make a zoo here ({error}); choose another folder") from error


def _data_name(task: Task) -> str:
    """The task without its metric: runs of ``digits_loss`` and ``digits_error`` are the same."""
    return task.name.removesuffix("_loss").removesuffix("_error")


def _generate(plan: _Plan, zoo: Zoo, strategy: str, limit: float | None, progress: bool) -> Generated:
    options, start = plan.options, time.monotonic()
    chunks = [range(i, min(i + options.chunk, options.runs)) for i in range(0, options.runs, options.chunk)]
    waiting = [runs for runs in chunks if _shard_name(runs) not in zoo.shards]
    finished = options.runs - sum(map(len, waiting))
    dropped, trained, stopped, longest = finished - len(zoo), 0, None, 0.0
    with tqdm(
        total=options.runs * options.steps,
        initial=finished * options.steps,
        desc=f"{_data_name(plan.task)} ({strategy})",
        unit="step",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for runs in waiting:
            began = time.monotonic()
            if limit is not None and began - start + longest > limit:
                stopped = "time limit"
                break
            try:
                good = _train_chunk(plan, strategy, runs, bar.update)
                if good:
                    zoo.append(good, name=_shard_name(runs))
            except KeyboardInterrupt:
                stopped = "interrupted"
                break
            trained += len(runs)
            dropped += len(runs) - len(good)
            longest = max(longest, time.monotonic() - began)
    remaining = sum(map(len, waiting)) - trained
    return Generated(len(zoo), dropped, remaining, trained * options.steps, time.monotonic() - start, strategy, stopped)


def _shard_name(runs: range) -> str:
    return f"runs-{runs[0]:07d}"


def _train_chunk(plan: _Plan, strategy: str, runs: range, tick: Callable[[int], object]) -> list[Run]:
    """Train and judge one chunk; runs that are not finite are left out."""
    saves = plan.saves(runs)
    vectors = torch.cat(
        [
            _train(plan, strategy, part, saves[part.start - runs.start :][: len(part)], tick)
            for part in _parts(plan, runs)
        ]
    )
    metrics = _judge(plan, vectors)
    good = vectors.isfinite().all(2).all(1)
    for values in metrics.values():
        good &= values.isfinite().all(1)
    group, seed = plan.options.share_batches, plan.options.seed
    configs = [
        {"index": run, "init_seed": init, "order_seed": derive_seed(seed, "order", run // group), "order": run // group}
        for run, init in zip(runs, plan.init_seeds(runs), strict=True)
    ]
    return [
        Run(
            id=f"{_data_name(plan.task)}-s{seed}-{run:07d}",
            params=vectors[i],
            steps=saves[i],
            metrics={name: values[i] for name, values in metrics.items()},
            config=configs[i],
        )
        for i, run in enumerate(runs)
        if good[i]
    ]


def _parts(plan: _Plan, runs: range) -> list[range]:
    """Cut a chunk into the stacks that are stepped together."""
    width = plan.width()
    return [runs[i : i + width] for i in range(0, len(runs), width)]


def _whole_groups(plan: _Plan, strategy: str, runs: range) -> range:
    """The runs, an incomplete last group filled up for the strategies that step groups."""
    group = plan.options.share_batches
    return runs if strategy == "loop" else range(runs.start, runs.start + -(-len(runs) // group) * group)


def _initial(plan: _Plan, runs: range) -> Tensor:
    """Initial vectors (n, d) on the device."""
    vectors = initial_vectors(plan.task.constructor, plan.job.layout, plan.init_seeds(runs))
    return vectors.to(plan.device, plan.job.images.dtype)


def _train(plan: _Plan, strategy: str, runs: range, saves: Tensor, tick: Callable[[int], object]) -> Tensor:
    """Saved vectors (n, c, d) of runs that are stepped together."""
    full = _whole_groups(plan, strategy, runs)
    rows = saves[torch.arange(len(full)).clamp(max=len(runs) - 1)]
    group = plan.options.share_batches
    saved = TRAINERS[strategy](plan.job, _initial(plan, full), plan.order_seeds(full), group, rows, tick)
    return saved[: len(runs)]


def _judge(plan: _Plan, vectors: Tensor) -> dict[str, Tensor]:
    """Metrics (n, c) of saved vectors (n, c, d): mean cross entropy, and error in percent, on every part."""
    population = Population(plan.job.module)
    flat = vectors.flatten(0, 1).to(plan.device)
    metrics = {}
    for name, (images, labels) in plan.parts.items():
        result = population.metrics(flat, images, labels)
        metrics[f"{name}_loss"] = result.loss.view(vectors.shape[:2]).cpu()
        metrics[f"{name}_error"] = result.error.view(vectors.shape[:2]).cpu()
    return metrics


def _probe(plan: _Plan, strategies: Sequence[str]) -> dict[str, float]:
    """Model-steps per second of each strategy: the best of three short trainings in turns, after a warm-up."""
    steps = min(PROBE_STEPS, plan.options.steps)
    best = dict.fromkeys(strategies, float("inf"))
    for rates in (plan.job.rates[:1], *[plan.job.rates[:steps]] * 3):
        job = replace(plan.job, rates=rates)
        for name in strategies:
            count = min(plan.options.runs, plan.width(), 2 if name == "loop" else 256)
            runs = _whole_groups(plan, name, range(count))
            initial, saves = _initial(plan, runs), torch.zeros(len(runs), 1, dtype=torch.int64)
            began = time.perf_counter()
            TRAINERS[name](job, initial, plan.order_seeds(runs), plan.options.share_batches, saves, lambda _: None)
            if plan.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - began) / (len(runs) * len(rates))
            best[name] = min(best[name], seconds) if len(rates) == steps else best[name]
    return {name: 1 / seconds for name, seconds in best.items()}


def _forecast(plan: _Plan, strategy: str, rates: dict[str, float]) -> Forecast:
    """Time and disk from the probe's speed, and from judging a few vectors."""
    o, size = plan.options, plan.job.layout.size
    vectors = initial_vectors(plan.task.constructor, plan.job.layout, range(16))
    vectors = vectors.to(plan.job.images.dtype)[:, None]
    _judge(plan, vectors)
    began = time.perf_counter()
    _judge(plan, vectors)
    per_vector = (time.perf_counter() - began) / len(vectors)
    checkpoints, steps = o.runs * o.save_count, o.runs * o.steps
    disk = checkpoints * (4 * size + 8 + 8 * 2 * len(plan.parts))
    return Forecast(o.runs, steps, steps / rates[strategy] + checkpoints * per_vector, disk, strategy, rates)
