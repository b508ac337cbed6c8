"""Runs of image classifiers: many trained at once by the task's recipe."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from zoo_common.layout import ParameterLayout
from zoo_common.population import Population
from zoo_common.tasks import Task
from zoo_common.zoo import Run

from gpt_diffusion.device import choose_device
from gpt_diffusion.generation.batches import derive_seed
from gpt_diffusion.generation.schedule import saves_of
from gpt_diffusion.generation.trainers import TRAINERS, Job, initial_vectors, strategies_for
from gpt_diffusion.generation.work import CHUNK_BYTES, Forecast, Options, Request, run_id

#: Working memory of the runs that are stepped together on a CPU, in bytes: what stays in its caches.
STACK_BYTES = 4 * 2**20
#: Optimizer steps of the probe that compares the strategies.
PROBE_STEPS = 20

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Supervised:
    """Checked :class:`~gpt_diffusion.generation.work.Work`, with the task's data on the device."""

    task: Task
    job: Job
    seed: int
    options: Options
    device: torch.device
    parts: dict[str, tuple[Tensor, Tensor]]  # metric prefix -> images, labels

    @property
    def layout(self) -> ParameterLayout:
        """Of a checkpoint."""
        return self.job.layout

    def order_seeds(self, runs: range) -> list[int]:
        """Seeds of the data orders of these runs, one per group; a group never crosses a chunk."""
        group = self.options.share_batches
        return [derive_seed(self.seed, "order", run // group) for run in runs[::group]]

    def init_seeds(self, runs: range) -> list[int]:
        """Seeds of the initialisations."""
        return [derive_seed(self.seed, "init", run) for run in runs]

    def saves(self, runs: range) -> Tensor:
        """Save points (n, c) of these runs."""
        o = self.options
        return saves_of(o.save_points, o.save_count, o.steps, [derive_seed(self.seed, "save", run) for run in runs])

    def stacks(self, runs: range) -> list[range]:
        """Cut a chunk into whole groups that are stepped together."""
        group, width = self.options.share_batches, len(runs)
        if self.device.type == "cpu":
            item = self.job.images.element_size()
            batch = self.job.recipe.batch * self.job.images[0].numel() * item
            width = group * max(1, STACK_BYTES // (batch + group * 3 * self.layout.size * item))
        return [runs[i : i + width] for i in range(0, len(runs), width)]

    def decided(self) -> "Supervised":
        """The same with the strategy that is fastest in a short probe."""
        possible = strategies_for(self.job.module, self.layout)
        if self.options.strategy in possible:
            return self
        if self.options.strategy != "auto":
            raise ValueError(
                f"strategy must be one of auto, {', '.join(possible)} for this network, got {self.options.strategy!r}"
            )
        rates = probe(self, possible)
        return self.with_strategy(max(rates, key=lambda name: rates[name]))

    def with_strategy(self, name: str) -> "Supervised":
        """The same with another strategy."""
        return replace(self, options=replace(self.options, strategy=name))

    def train(self, runs: range, tick: Callable[[int], object]) -> list[Run]:
        """Train and judge one chunk; runs that are not finite are left out."""
        saves, group = self.saves(runs), self.options.share_batches
        trained = []
        for part in self.stacks(runs):
            vectors = train_stack(self, part, saves[part.start - runs.start :][: len(part)], tick)
            trained.append((vectors, _judge(self, vectors)))  # here, so that progress is steady
        vectors = torch.cat([vectors for vectors, _ in trained])
        metrics = {name: torch.cat([judged[name] for _, judged in trained]) for name in trained[0][1]}
        good = vectors.isfinite().all(2).all(1)
        for values in metrics.values():
            good &= values.isfinite().all(1)
        return [
            Run(
                id=run_id(self.task, self.seed, run),
                params=vectors[i],
                steps=saves[i],
                metrics={name: values[i] for name, values in metrics.items()},
                config={
                    "index": run,
                    "init_seed": init,
                    "order_seed": derive_seed(self.seed, "order", run // group),
                    "order": run // group,
                },
            )
            for i, (run, init) in enumerate(zip(runs, self.init_seeds(runs), strict=True))
            if good[i]
        ]

    def forecast(self, runs: int) -> Forecast:
        """Time and disk from a probe's speed, and from judging a few vectors."""
        o, size = self.options, self.layout.size
        possible = strategies_for(self.job.module, self.layout)
        rates = probe(self, possible if o.strategy == "auto" else [self.decided().options.strategy])
        strategy = max(rates, key=lambda name: rates[name])
        vectors = initial_vectors(self.task.constructor, self.layout, range(16)).to(self.job.images.dtype)[:, None]
        _judge(self, vectors)
        began = time.perf_counter()
        _judge(self, vectors)
        per_vector = (time.perf_counter() - began) / len(vectors)
        checkpoints, steps = runs * o.save_count, runs * o.steps
        disk = checkpoints * (4 * size + 8 + 8 * 2 * len(self.parts))
        return Forecast(runs, steps, steps / rates[strategy] + checkpoints * per_vector, disk, strategy, rates)


def prepare(task: Task, request: Request) -> Supervised:
    """Check the options and bring the data to the device."""
    if task.recipe is None or task.splits is None:
        raise ValueError(f"task {task.name!r} has no training recipe for supervised runs")
    if request.envs is not None:
        raise ValueError(f"envs is for cartpole: task {task.name!r} has no environments")
    if request.dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {request.dtype!r}")
    place, precision = choose_device(request.device), _DTYPES[request.dtype]
    module = task.constructor().to(place, precision).train()
    _check_network(module)
    layout = ParameterLayout.from_module(module.to(torch.float32))
    splits = task.splits()
    images, labels = splits.train.images.to(place, precision), splits.train.labels.to(place)
    if task.recipe.batch > len(images):
        raise ValueError(f"task {task.name!r}: a batch of {task.recipe.batch} needs as many images, got {len(images)}")
    total = request.steps or task.recipe.total_steps(len(images))
    saves = request.saves(task.recipe.save_count, total)
    options = Options(
        steps=total,
        save_points=request.save_points or task.recipe.save_points,
        save_count=saves,
        chunk=request.chunk_size(CHUNK_BYTES // (saves * layout.size * 4)),
        device=place.type,
        dtype=request.dtype,
        strategy=request.strategy,
        share_batches=request.share_batches,
    )
    rates = task.recipe.learning_rates(len(images), total)
    job = Job(module.to(precision), layout, task.recipe, images, labels, rates)
    parts = (
        {"test": splits.test} if splits.validation is splits.test else {"val": splits.validation, "test": splits.test}
    )
    moved = {name: (part.images.to(place, precision), part.labels.to(place)) for name, part in parts.items()}
    return Supervised(task, job, request.seed, options, place, moved)


def _check_network(module: nn.Module) -> None:
    """Refuse what the strategies would not train alike."""
    for name, _ in module.named_buffers():
        raise ValueError(f"buffer {name!r}: runs of networks with buffers (batch norm ...) cannot be generated")
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise ValueError(f"module {name!r}: runs of networks with dropout cannot be generated")


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
    total = prepare(task, Request(len(starts), seed, steps=steps, device=device)).options.steps
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
    work = prepare(task, Request(len(starts), seed, steps=steps, device=device))
    if starts.ndim != 2 or starts.shape[1] != work.layout.size:
        raise ValueError(f"starts: expected (n, {work.layout.size}), got {tuple(starts.shape)}")
    job = work.job
    if adam_lr is not None:
        job = replace(job, adam=True, rates=[rate * adam_lr / job.recipe.lr for rate in job.rates])
    strategy = strategies_for(job.module, job.layout)[0]
    found = []
    for part in work.stacks(range(len(starts))):
        points = torch.tensor(saves).expand(len(part), -1)
        vectors = starts[part.start : part.stop].to(work.device, torch.float32)
        found.append(TRAINERS[strategy](job, vectors, work.order_seeds(part), 1, points, tick))
    return torch.cat(found)


def _whole_groups(work: Supervised, strategy: str, runs: range) -> range:
    """The runs, an incomplete last group filled up for the strategies that step groups."""
    group = work.options.share_batches
    return runs if strategy == "loop" else range(runs.start, runs.start + -(-len(runs) // group) * group)


def _initial(work: Supervised, runs: range) -> Tensor:
    """Initial vectors (n, d) on the device."""
    vectors = initial_vectors(work.task.constructor, work.layout, work.init_seeds(runs))
    return vectors.to(work.device, work.job.images.dtype)


def train_stack(work: Supervised, runs: range, saves: Tensor, tick: Callable[[int], object]) -> Tensor:
    """Saved vectors (n, c, d) of runs that are stepped together."""
    o = work.options
    full = _whole_groups(work, o.strategy, runs)
    rows = saves[torch.arange(len(full)).clamp(max=len(runs) - 1)]
    trainer = TRAINERS[o.strategy]
    saved = trainer(work.job, _initial(work, full), work.order_seeds(full), o.share_batches, rows, tick)
    return saved[: len(runs)]


def _judge(work: Supervised, vectors: Tensor) -> dict[str, Tensor]:
    """Metrics (n, c) of saved vectors (n, c, d): mean cross entropy, and error in percent, on every part."""
    population = Population(work.job.module)
    flat = vectors.flatten(0, 1).to(work.device)
    metrics = {}
    for name, (images, labels) in work.parts.items():
        result = population.metrics(flat, images, labels)
        metrics[f"{name}_loss"] = result.loss.view(vectors.shape[:2]).cpu()
        metrics[f"{name}_error"] = result.error.view(vectors.shape[:2]).cpu()
    return metrics


def probe(work: Supervised, strategies: Sequence[str]) -> dict[str, float]:
    """Model-steps per second of each strategy: the best of three short trainings in turns, after a warm-up."""
    steps, stack = min(PROBE_STEPS, work.options.steps), len(work.stacks(range(work.options.chunk))[0])
    best = dict.fromkeys(strategies, float("inf"))
    for rates in (work.job.rates[:1], *[work.job.rates[:steps]] * 3):
        job = replace(work.job, rates=rates)
        for name in strategies:
            runs = _whole_groups(work, name, range(min(stack, 2 if name == "loop" else 256)))
            initial, saves = _initial(work, runs), torch.zeros(len(runs), 1, dtype=torch.int64)
            began = time.perf_counter()
            TRAINERS[name](job, initial, work.order_seeds(runs), work.options.share_batches, saves, lambda _: None)
            if work.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - began) / (len(runs) * len(rates))
            best[name] = min(best[name], seconds) if len(rates) == steps else best[name]
    return {name: 1 / seconds for name, seconds in best.items()}
