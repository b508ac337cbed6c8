"""Configurations of the pretraining: typed trees, presets, YAML files and ``key=value`` overrides."""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from sane.optimization import OptimizationConfig


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the autoencoder."""

    window: int = 32
    """Tokens in a training window (published: CNN 64, ResNet-18 256)."""
    d_model: int = 128
    heads: int = 4
    layers: int = 3
    """Blocks of the encoder, and as many of the decoder."""
    latent: int = 32
    dropout: float = 0.0
    max_positions: tuple[int, ...] = ()
    """Rows of the position tables; default: what the zoo needs."""


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop and its objective."""

    epochs: int = 50
    batch: int = 32
    """Windows, each seen in two views."""
    accumulate: int = 1
    """Parts in which a batch is computed; the contrast is within a part."""
    supersample: int = 1
    """Windows of each checkpoint in an epoch."""
    gamma: float = 0.05
    """Share of the contrast in the loss."""
    temperature: float = 0.1
    contrast: Literal["simclr", "positive", "legacy_positive"] = "simclr"
    reduction: Literal["mean", "sum"] = "mean"
    mask_normalize: bool = False
    """Take the mean over weights instead of all entries (published: all, padding included)."""
    loss_normalization: Literal["none", "token"] = "none"
    z_var_penalty: float = 0.0
    z_norm_penalty: float = 0.0
    target: Literal["noised", "clean"] = "noised"
    """What is reconstructed: the view with its noise (as published), or without."""
    views: Literal["canonical", "mixed", "permuted"] = "canonical"
    noise: tuple[float, float] = (0.1, 0.1)
    erase: bool = False
    shared: bool = False
    """One window start, permutation and rectangle for all samples of a batch, as published."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 (with a gradient scaler) need CUDA."""
    compile: bool = False
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between two saved states."""
    test_every: int = 10
    """Epochs between two judgements (loss on validation windows, R2 of properties); 0: none."""
    properties: tuple[str, ...] = ("test_acc", "epoch", "ggap")
    """Predicted at each judgement, if the zoo has them."""
    test_checkpoints: int = 500
    """Checkpoints of each split that a judgement embeds at most."""


@dataclass(frozen=True)
class Config:
    """Everything that defines one pretraining."""

    name: str = "sane"
    out_dir: str = "results"
    prepared: str = "prepared.safetensors"
    """File of ``sane preprocess``."""
    zoo: str | None = None
    """Where the zoo is, if it was moved since."""
    start: str | None = None
    """Model file, or folder of a training, whose weights to begin with; default: random ones."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the log too (extra ``wandb``)."""
    seed: int = 0
    device: str = "auto"
    model: ModelSizes = field(default_factory=ModelSizes)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optim: OptimizationConfig = field(default_factory=OptimizationConfig)

    def __post_init__(self) -> None:
        """Reject settings that would only fail later."""
        t = self.training
        positive = {"epochs": t.epochs, "batch": t.batch, "accumulate": t.accumulate, "supersample": t.supersample}
        positive |= {"log_every": t.log_every, "save_every": t.save_every, "test_checkpoints": t.test_checkpoints}
        for name, value in positive.items():
            if value < 1:
                raise ValueError(f"training.{name} must be at least 1, got {value}")
        if t.test_every < 0:
            raise ValueError(f"training.test_every must not be negative, got {t.test_every}")
        if len(t.noise) != 2 or min(t.noise) < 0:
            raise ValueError(f"training.noise must be two numbers that are not negative, got {t.noise}")
        if t.batch % t.accumulate or t.batch // t.accumulate < 2:
            raise ValueError(
                f"training.accumulate ({t.accumulate}) must divide the batch ({t.batch}) into parts of two or more"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to below 2**63, got {self.seed}")
        if not self.name or self.name == ".." or Path(self.name).name != self.name:
            raise ValueError(f"name must be a plain folder name, got {self.name!r}")

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.out_dir) / self.name


PRESETS: dict[str, dict[str, Any]] = {
    "small": {"name": "small"},
    "cnn": {
        "name": "cnn",
        "model": {
            "window": 64,
            "d_model": 1024,
            "heads": 8,
            "layers": 8,
            "latent": 128,
            "max_positions": [100, 10, 40],
        },
        "optim": {"lr": 1e-4},
    },
    "resnet18": {
        "name": "resnet18",
        "model": {
            "window": 256,
            "d_model": 2048,
            "heads": 16,
            "layers": 8,
            "latent": 128,
            "max_positions": [55000, 100, 550],
        },
        "training": {"supersample": 50},
        "optim": {"lr": 1e-4},
    },
}
"""``small`` for two cores; ``cnn`` and ``resnet18`` are the published sizes."""


def load_config(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """A preset or YAML file, changed by ``key=value`` overrides such as ``training.gamma=0.5``.

    Raises:
        FileNotFoundError: Neither a preset nor a file.
        ValueError: Unknown key or unfit value; the message names both.
    """
    if Path(name_or_path).is_file():
        try:
            tree: Any = yaml.safe_load(Path(name_or_path).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{name_or_path}: not a YAML file: {' '.join(str(error).split())}") from None
    elif str(name_or_path) in PRESETS:
        tree = PRESETS[str(name_or_path)]
    else:
        near = "".join(f"; did you mean {m!r}?" for m in difflib.get_close_matches(str(name_or_path), PRESETS, n=1))
        raise FileNotFoundError(
            f"configuration {str(name_or_path)!r} is neither a file nor built in{near or '.'} Built in: {', '.join(PRESETS)}"
        )
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ValueError(f"override {override!r} must have the form key=value, for example training.batch=64")
        tree = _with(tree, key.split("."), yaml_value(text))
    config: Config = _build(Config, tree, "")
    return config


def yaml_value(text: str) -> Any:  # noqa: ANN401 (a YAML value)
    """What a text says as YAML; ``ValueError`` if it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{text!r} is no YAML value: close its brackets and quotes, for example [0.1, 0.2]") from None


def config_to_yaml(config: Config) -> str:
    """All keys with their values, readable by :func:`load_config`."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def _plain(value: Any) -> Any:  # noqa: ANN401 (a tree of YAML values)
    if isinstance(value, Mapping):
        return {key: _plain(below) for key, below in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _with(tree: Any, keys: list[str], value: Any) -> dict[str, Any]:  # noqa: ANN401 (a tree of YAML values)
    below = dict(tree) if isinstance(tree, Mapping) else {}
    below[keys[0]] = _with(below.get(keys[0], {}), keys[1:], value) if len(keys) > 1 else value
    return below


def _build(kind: type, tree: Any, where: str) -> Any:  # noqa: ANN401 (one of the dataclasses above)
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where.rstrip('.') or 'configuration'}: expected a group of keys, got {tree!r}")
    hints = get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise ValueError(
                f"unknown configuration key {where + str(key)!r}; did you mean {_nearest(key, where, hints)!r}?"
            )
        nested = dataclasses.is_dataclass(hints[key])
        values[key] = _build(hints[key], value, f"{where}{key}.") if nested else _fit(value, hints[key], where + key)
    return kind(**values)


def _nearest(key: Any, where: str, hints: Mapping[str, Any]) -> str:  # noqa: ANN401 (a YAML key)
    """The key most like an unknown one: of its own group, or of a group below, as lr is optim.lr."""
    keys = {name: where + name for name in hints}
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            keys |= {f.name: f"{where}{name}.{f.name}" for f in dataclasses.fields(hint) if f.name not in keys}
    return keys[difflib.get_close_matches(str(key), keys, n=1, cutoff=0)[0]]


def _fit(value: Any, hint: Any, key: str) -> Any:  # noqa: ANN401 (a YAML value and a type)
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ValueError(f"{key}: expected one of {', '.join(map(str, get_args(hint)))}, got {value!r}")
    if get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            return tuple(_fit(item, get_args(hint)[0], key) for item in value)
        if isinstance(value, str) and "," in value:
            raise ValueError(f"{key}: write several values as [{value}], got {value!r}")
        return (_fit(value, get_args(hint)[0], key),)
    if hint is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3 as text
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, bool) is (hint is bool) and isinstance(value, hint):
        return value
    elif hint is str and isinstance(value, int | float):
        return str(value)
    raise ValueError(f"{key}: expected {'true or false' if hint is bool else hint.__name__}, got {value!r}")
