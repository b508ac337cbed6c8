"""Tasks: what is trained, on which data, and how a trained network is judged.

A task is the contract that a checkpoint model needs (constructor, data, metric, prompts). The built-in ones classify
images; each comes with a ``_loss`` variant (mean cross entropy) and an ``_error`` variant (top-1 error in percent).
Programs add theirs by :func:`register_task`, other packages through the entry-point group ``zoo_common.tasks``: the
entry's name is the task's name, its value a function ``(data_dir: Path | None) -> Task`` (or a dictionary, see there).
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_common.datasets import Splits, load_dataset
from zoo_common.symmetry import Symmetry

_GROUP = "zoo_common.tasks"


class Mlp(nn.Module):
    """The published MNIST network: flatten, Linear, ReLU, Linear; the digits use it with 64 inputs."""

    def __init__(self, inputs: int = 784, hidden: int = 10, classes: int = 10) -> None:
        """Initialise as torch's Linear does."""
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, ...)."""
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Cnn(nn.Module):
    """The published CIFAR-10 network: two 3x3 convolutions without bias, global average pooling, Linear."""

    def __init__(self) -> None:
        """Initialise as torch's Conv2d and Linear do."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 3, h, w)."""
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


@dataclass(frozen=True)
class TrainingRecipe:
    """How the runs of a supervised task are trained: SGD with Nesterov momentum and a cosine schedule."""

    batch: int
    lr: float
    steps: int | None = None
    """Optimizer steps in all; None where ``epochs`` says it."""
    epochs: int | None = None
    """Passes over the training images (incomplete last batches are dropped)."""
    anneal: Literal["step", "epoch"] = "step"
    """Whether the cosine is lowered at every step or once per epoch, as published."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augmentation: Literal["none", "flip_crop"] = "none"
    save_points: Literal["geometric", "even", "random"] = "geometric"
    save_count: int = 200

    def total_steps(self, n_train: int) -> int:
        """Optimizer steps of one run on ``n_train`` images."""
        if self.steps is not None:
            return self.steps
        return (self.epochs or 0) * (n_train // self.batch)

    def learning_rates(self, n_train: int, steps: int) -> list[float]:
        """Learning rate of each of ``steps`` steps: lr * (1 + cos(pi * progress)) / 2."""
        stride = 1 if self.anneal == "step" else max(1, n_train // self.batch)
        last = max(1, math.ceil(steps / stride))
        return [self.lr * 0.5 * (1 + math.cos(math.pi * (step // stride) / last)) for step in range(steps)]


@dataclass(frozen=True)
class Task:
    """One task of the registry.

    ``data_fn`` returns a tuple with everything expensive; ``test_fn(*data, net)`` returns the metric, or a tuple whose
    first entry it is.
    """

    name: str
    constructor: Callable[[], nn.Module]
    data_fn: Callable[[], tuple[Any, ...]]
    test_fn: Callable[..., Any]
    minimize: bool
    best_prompt: float
    """Prompt for one-step evaluation, in the units of the metric."""
    recursive_prompt: float
    metric_name: str
    """Metric of the zoo that the prompt means, for example ``val_loss``."""
    input_shape: tuple[int, ...]
    """Shape of one input of the network, without the batch axis."""
    aug_fn: Callable[..., None] | None = None
    """Hand-written function-preserving augmentation; None: derived from the network's symmetry."""
    recipe: TrainingRecipe | None = None
    """How runs are generated; None for tasks with a trainer of their own."""
    splits: Callable[[], Splits] | None = None
    """Training, validation and test images of a supervised task."""

    def symmetry(self) -> Symmetry:
        """Permutations of hidden units that leave the network's function unchanged."""
        return Symmetry.from_module(self.constructor(), torch.zeros(2, *self.input_shape))


@torch.no_grad()
def classification_loss(images: Tensor, labels: Tensor, net: nn.Module) -> float:
    """Mean cross entropy (nats) of a network on images (n, ...) with labels (n,)."""
    return F.cross_entropy(net(images), labels).item()


@torch.no_grad()
def classification_error(images: Tensor, labels: Tensor, net: nn.Module) -> float:
    """Top-1 error in percent."""
    return 100 * (net(images).argmax(1) != labels).double().mean().item()


_DIGITS = TrainingRecipe(batch=64, lr=0.05, steps=1000, save_points="geometric", save_count=42)
_MNIST = TrainingRecipe(batch=128, lr=0.1, epochs=25, anneal="epoch", save_points="random")
_CIFAR = TrainingRecipe(batch=128, lr=0.1, epochs=50, anneal="epoch", augmentation="flip_crop", save_points="random")
_DIGITS_MLP = partial(Mlp, inputs=64)


class _BuiltIn(NamedTuple):
    """What the two tasks of one data set share."""

    network: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    recipe: TrainingRecipe
    part: str  # whose metric the prompts mean
    loss_prompts: tuple[float, float]  # best, recursive
    error_prompts: tuple[float, float]  # in percent


_BUILT_IN = {
    "digits": _BuiltIn(_DIGITS_MLP, (1, 8, 8), _DIGITS, "val", (0.1, 0.1), (3.0, 3.0)),
    "mnist": _BuiltIn(Mlp, (1, 28, 28), _MNIST, "test", (0.0, 0.0), (5.0, 5.0)),
    "fashion_mnist": _BuiltIn(Mlp, (1, 28, 28), _MNIST, "test", (0.4, 0.4), (15.0, 15.0)),
    "cifar10": _BuiltIn(Cnn, (3, 32, 32), _CIFAR, "test", (1.2, 1.4), (35.0, 45.0)),
}


def _built_in(name: str, data_dir: Path | None, download: bool) -> Task:
    data, kind = name.rsplit("_", 1)
    shared = _BUILT_IN[data]
    best, recursive = shared.loss_prompts if kind == "loss" else shared.error_prompts

    def splits() -> Splits:
        return load_dataset(data, data_dir, download=download)

    return Task(
        name=name,
        constructor=shared.network,
        data_fn=lambda: tuple(splits().validation),
        test_fn=classification_loss if kind == "loss" else classification_error,
        minimize=True,
        best_prompt=best,
        recursive_prompt=recursive,
        metric_name=f"{shared.part}_{kind}",
        input_shape=shared.input_shape,
        recipe=shared.recipe,
        splits=splits,
    )


_METADATA = ("task_test_fn", "constructor", "data_fn", "minimize", "best_prompt", "recursive_prompt")
_OPTIONAL = ("aug_fn", "metric_name", "input_shape", "recipe", "splits")
_registered: dict[str, Mapping[str, Any]] = {}


def register_task(name: str, metadata: Mapping[str, Any]) -> None:
    """Add a task to this process by the six published keys, or replace one added before.

    Args:
        name: Its name; one of the built-in tasks cannot be replaced.
        metadata: ``task_test_fn``, ``constructor``, ``data_fn``, ``minimize``, ``best_prompt`` and ``recursive_prompt``,
            as in :class:`Task` (``data_fn`` is called once). Optional: ``aug_fn``, ``metric_name``, ``input_shape``,
            ``recipe`` and ``splits``. Without an ``input_shape`` the inputs are the first tensor that ``data_fn``
            returns, of shape (n, *input_shape); without an ``aug_fn`` the symmetry of the network is found from them.

    Raises:
        ValueError: A name that is taken, or missing or unknown keys; the message names them.
    """
    wanted = _normal(name)
    if wanted in _BUILT_IN or (wanted.rsplit("_", 1)[0] in _BUILT_IN and wanted.endswith(("_loss", "_error"))):
        raise ValueError(f"task {name!r} is built in: choose another name")
    _registered[wanted] = _checked(name, metadata)


def _checked(name: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    if missing := [key for key in _METADATA if key not in metadata]:
        raise ValueError(f"task {name!r} lacks {', '.join(missing)}")
    for key in metadata:
        if key not in _METADATA + _OPTIONAL:
            near = difflib.get_close_matches(key, _METADATA + _OPTIONAL, n=1, cutoff=0)[0]
            raise ValueError(f"task {name!r}: unknown key {key!r}; did you mean {near!r}?")
    return {**metadata, "name": name, "data_fn": cache(metadata["data_fn"])}


def _described(checked: Mapping[str, Any]) -> Task:
    """The task with this metadata."""
    metadata = dict(checked)
    shape = metadata.pop("input_shape", None)
    if shape is None:
        inputs = next((item for item in metadata["data_fn"]() if isinstance(item, Tensor)), None)
        if inputs is None and metadata.get("aug_fn") is None:
            raise ValueError(
                f"task {metadata['name']!r}: data_fn returns no tensor of inputs; give aug_fn or input_shape"
            )
        shape = () if inputs is None else inputs.shape[1:]
    return Task(
        test_fn=metadata.pop("task_test_fn"),
        metric_name=metadata.pop("metric_name", ""),
        input_shape=tuple(shape),
        **metadata,
    )


def _normal(name: str) -> str:
    return name.lower().replace("-", "_")


def _foreign(entry: EntryPoint, folder: Path | None) -> Task:
    """The task of an installed package."""
    package = f" of {entry.dist.name} {entry.dist.version}" if entry.dist else ""
    where = f"task {entry.name!r}: the entry point {entry.value!r}{package}"
    try:
        task = entry.load()(folder)
        if isinstance(task, Mapping):
            task = _described(_checked(entry.name, task))
    except Exception as error:  # whatever a stranger's package does wrong
        raise ValueError(f"{where} fails ({type(error).__name__}: {error}): repair or uninstall it") from error
    if not isinstance(task, Task) or task.name != entry.name:
        what = f"a Task named {task.name!r}" if isinstance(task, Task) else type(task).__name__
        raise ValueError(f"{where} returns {what}, not a Task of its own name: repair or uninstall the package")
    return task


def task_names() -> list[str]:
    """All tasks: the built-in ones, those registered and those of installed packages."""
    own = [f"{data}_{kind}" for data in _BUILT_IN for kind in ("loss", "error")]
    own += sorted(metadata["name"] for metadata in _registered.values())
    return own + sorted(entry.name for entry in entry_points(group=_GROUP))


def get_task(name: str, data_dir: Path | str | None = None, *, download: bool = False) -> Task:
    """Look a task up.

    Args:
        name: For example ``mnist_error``; ``-`` counts as ``_``, and a bare ``mnist`` means ``mnist_loss``.
        data_dir: Folder with the data files; read only when the data are asked for.
        download: Allow torchvision to fetch missing files into ``data_dir``.

    Raises:
        ValueError: Unknown name (the message has the nearest one), or a package's entry point that does not work (the
            message names both).
    """
    folder = None if data_dir is None else Path(data_dir)
    wanted = _normal(name)
    wanted = f"{wanted}_loss" if wanted in _BUILT_IN else wanted
    if wanted.rsplit("_", 1)[0] in _BUILT_IN and wanted.endswith(("_loss", "_error")):
        return _built_in(wanted, folder, download)
    if wanted in _registered:
        return _described(_registered[wanted])
    for entry in entry_points(group=_GROUP):
        if _normal(entry.name) == wanted:
            return _foreign(entry, folder)
    near = difflib.get_close_matches(wanted, [*task_names(), *_BUILT_IN], n=1, cutoff=0)
    raise ValueError(f"unknown task {name!r}; did you mean {near[0]!r}? Tasks: {', '.join(task_names())}")
