"""Configurations: typed trees with the published keys, presets, YAML files and ``key=value`` overrides.

Keys that the published configurations do not have are ours; their meaning stands beside each field.
"""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml


@dataclass(frozen=True)
class DatasetConfig:
    """Which checkpoints are learned, and which pairs of them."""

    name: str = "digits_loss"
    """Task: what the network is and what its metric means."""
    path: str = "zoo"
    """Folder of a zoo, or of runs in the published format."""
    download: bool = True
    """Fetch a published data set whose folder is missing (``mnist``, ``cifar10`` and ``cartpole``, also ``mnist_...``)."""
    verify_done: bool = False
    """Published format: pass over folders without ``DONE.txt``."""
    train_metric: str | None = None
    """Metric that prompts mean, by its own or its published name; the task's by default."""
    split: Literal["auto", "zoo", "published"] = "auto"
    """Which runs are for testing (ours). ``published``: the last ``num_test_runs``; ``zoo``: those that the zoo chose;
    ``auto``: the zoo's, and ``published`` for runs in the published format."""
    num_test_runs: int = 500
    """Test runs, for ``split: published``."""
    target_epoch_size: int = 100_800
    """Pairs in an epoch, rounded down to a multiple of the number of runs."""
    max_train_runs: int = 1_000_000
    """Use at most this many training runs."""
    min_step_spacing: int = 1
    """Smallest distance of the two checkpoints of a pair, in save points."""
    max_step_spacing: int | None = None
    """Largest distance; unlimited by default."""
    pairs: Literal["spacing", "prompts"] = "spacing"
    """``spacing``: the distance of a pair is uniform (published). ``prompts`` (ours): half of the starts are
    initialisations, and most targets are chosen uniformly in the metric."""
    normalizer: Literal["openai", "none"] = "openai"
    """Multiply the weights by ``openai_coeff``, or leave them."""
    openai_coeff: float | None = None
    """Coefficient; 0.538 / (standard deviation of the training weights) by default."""
    augment: bool = True
    """Permute the hidden units of every pair at random (has no effect on unit tokens and is left out there)."""
    num_workers: int = 1
    """Has no effect: batches are gathered in the training process."""


@dataclass(frozen=True)
class TransformerConfig:
    """The denoiser."""

    tokens: Literal["layers", "units"] = "layers"
    """``layers``: the published chunks of layers. ``units`` (ours): one token per hidden unit, equivariant."""
    split_policy: Literal["chunk", "layer_by_layer", "chunk_within_layer", "chunk_within_input"] = "chunk_within_layer"
    chunk_size: int = 1000
    n_embd: int = 1536
    n_head: int = 16
    n_layer: int = 12
    encoder_depth: int = 1
    decoder_depth: int = 1
    dropout_prob: float = 0.0
    num_frequencies: int = 128
    max_freq_log2: float = 14
    predict_xstart: bool = True
    absolute_loss_conditioning: bool = True
    ema: bool = True
    """Keep a moving average of the weights; it is what samples."""


@dataclass(frozen=True)
class OptimConfig:
    """The training loop."""

    num_ep: int = 2000
    """Epochs, unless ``max_steps`` is given."""
    max_steps: int | None = None
    """Optimizer steps in all (ours): fixes the amount of training whatever the number of runs."""
    objective: Literal["diffusion", "flow"] = "diffusion"
    """flow: flow matching on straight lines (ours); sampled by Euler steps, whatever ``sampling.sampler``."""
    prompt_dropout: float = 0.0
    """Share of pairs that are shown without a prompt, for guidance (ours): the start's own metric stands for none."""
    mb_size: int = 1024
    base_lr: float = 4e-4
    lr_sch: Literal["cos", "fixed"] = "cos"
    warmup_epochs: float = 5
    warmup_factor: float = 0.0
    wd: float = 0.1
    beta2: float = 0.999
    grad_clip: float = 0.75
    """Largest global gradient norm; 0 switches clipping off."""
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    """Start with short averages, decay min(ema_decay, (1 + k) / (10 + k)) at step k (ours)."""
    behaviour_weight: float = 0.0
    """Weight of the KL divergence between the outputs of target and predicted network (ours; 0: published loss)."""
    behaviour_batch: int = 64
    """Training inputs for that term, drawn anew in every step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; the optimizer state stays in float32."""
    compile: bool = False
    """Compile the denoiser with torch.compile."""
    accumulate: int = 1
    """Parts in which each process computes its batch; same result, less memory."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: every process has the whole model, or a part of its parameters and of the optimizer's state."""
    checkpoint_freq: int = 250
    """Epochs between two saved training states; the last one is always saved."""
    checkpoint_steps: int | None = None
    """The same in steps (ours), instead of ``checkpoint_freq``."""
    log_freq: int = 50
    """Steps between two lines of metrics.jsonl; the loss is read from the device only then."""


@dataclass(frozen=True)
class SamplingConfig:
    """How networks are sampled."""

    sampler: Literal["ddpm", "ddim", "dpm++"] = "ddpm"
    """dpm++ (DPM-Solver++(2M), ours): as good as ddim with fewer steps, which are spread evenly in log(signal / noise)."""
    steps: int = 1000
    """Denoising steps, at most 1000."""
    thresholding: Literal["none", "static"] = "none"
    """static: clamp predicted weights to the range of the training weights."""
    guidance: float = 1.0
    """Classifier-free guidance on the prompt (ours; Ho & Salimans 2022): 1 is none, more exaggerates the prompt."""


@dataclass(frozen=True)
class VisConfig:
    """Evaluation by prompting."""

    freq: int = 20
    """Epochs between two promptings during the training, the first after one epoch; 0: none (ours)."""
    use_ema: bool = True
    """Prompt the moving average, or else the raw weights: while training, and of a released model."""
    num_nets_per_gpu: int = 8
    """Starting networks per group (training runs, unseen runs) and process."""
    net_mb_size_per_gpu: int = 8
    """Has no effect: the size of batches does not change the result."""
    recursive_probe: bool = True
    """Prompt recursively too while training; ``eval`` always does."""
    dvo_steps: int = 20
    """Prompts per network on the desired-versus-observed curve."""
    prompt_start_coeff: float = 1.0
    """The curve ends at this multiple of the starting metric."""
    recursive_steps: int = 2
    """Prompted steps in recursive prompting."""


@dataclass(frozen=True)
class TestConfig:
    """The diffusion loss on the test runs, measured while training."""

    __test__ = False  # for pytest

    freq: int = 0
    """Epochs between two measurements, which go to ``metrics.jsonl``; 0: none."""
    mb_size: int = 1024
    """Pairs in a batch."""
    use_ema: bool = False
    """Measure the moving average."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, only with ``logger: wandb`` (extra ``wandb``)."""

    name: str | None = None
    """``exp_name`` by default."""
    group: str = "default"
    project: str = "Gpt"
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] = "offline"


@dataclass(frozen=True)
class Config:
    """Everything that defines one experiment."""

    exp_name: str = "digits_loss"
    out_dir: str = "results"
    resume_path: str | None = None
    """Model to begin with: a released one by its name, or a ``.pt`` file."""
    test_only: bool = False
    """Judge the model of ``resume_path`` instead of training."""
    rng_seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: bool = False
    """Mixed precision: the same as ``train.precision: bf16`` (published: float16)."""
    num_gpus: int = 1
    """Only 1: a training uses one device."""
    debug_mode: bool = False
    """Learn the first run alone, from its first checkpoint on; prompt it for metrics of its own training."""
    logger: Literal["jsonl", "wandb"] = "jsonl"
    """Where metrics go beside ``metrics.jsonl`` (ours)."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    train: OptimConfig = field(default_factory=OptimConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    vis: VisConfig = field(default_factory=VisConfig)
    test: TestConfig = field(default_factory=TestConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        """Reject settings that would only fail later."""
        positive = {
            "train.mb_size": self.train.mb_size,
            "train.num_ep": self.train.num_ep,
            "train.max_steps": 1 if self.train.max_steps is None else self.train.max_steps,
            "train.checkpoint_freq": self.train.checkpoint_freq,
            "train.checkpoint_steps": 1 if self.train.checkpoint_steps is None else self.train.checkpoint_steps,
            "train.log_freq": self.train.log_freq,
            "train.accumulate": self.train.accumulate,
            "test.mb_size": self.test.mb_size,
            "train.behaviour_batch": self.train.behaviour_batch,
            "sampling.steps": self.sampling.steps,
            "vis.num_nets_per_gpu": self.vis.num_nets_per_gpu,
            "vis.recursive_steps": self.vis.recursive_steps,
            "dataset.max_train_runs": self.dataset.max_train_runs,
        }
        not_negative = {
            "vis.freq": self.vis.freq,
            "test.freq": self.test.freq,
            "train.base_lr": self.train.base_lr,
            "train.warmup_epochs": self.train.warmup_epochs,
            "train.wd": self.train.wd,
            "train.grad_clip": self.train.grad_clip,
            "train.behaviour_weight": self.train.behaviour_weight,
            "dataset.num_test_runs": self.dataset.num_test_runs,
        }
        for key, number in not_negative.items():
            if number < 0:
                raise ValueError(f"{key} must be at least 0, got {number}")
        for key, value in positive.items():
            if value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        fractions = {
            "train.prompt_dropout": self.train.prompt_dropout,
            "train.beta2": self.train.beta2,
            "train.ema_decay": self.train.ema_decay,
            "transformer.dropout_prob": self.transformer.dropout_prob,
        }
        for key, number in fractions.items():
            if not 0 <= number < 1:
                raise ValueError(f"{key} must be at least 0 and below 1, got {number}")
        if self.sampling.guidance != 1 and self.train.prompt_dropout == 0:
            raise ValueError("sampling.guidance needs a model trained with train.prompt_dropout above 0")
        if self.train.objective == "flow" and not self.transformer.predict_xstart:
            raise ValueError("train.objective=flow needs transformer.predict_xstart=true")
        if self.sampling.steps > 1000:
            raise ValueError(f"sampling.steps must be at most 1000, got {self.sampling.steps}")
        if self.vis.dvo_steps < 2:
            raise ValueError(f"vis.dvo_steps must be at least 2, got {self.vis.dvo_steps}")
        if self.num_gpus != 1:
            raise ValueError(f"num_gpus must be 1, got {self.num_gpus}: a training uses one device")
        if self.test_only and not self.resume_path:
            raise ValueError("test_only needs resume_path, the model to judge")
        if not self.exp_name or Path(self.exp_name).name != self.exp_name:
            raise ValueError(f"exp_name must be a plain folder name, got {self.exp_name!r}")

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.out_dir) / self.exp_name


_DIGITS_LOSS: dict[str, Any] = {
    "exp_name": "digits_loss",
    "dataset": {"name": "digits_loss", "path": "zoo", "target_epoch_size": 6400, "pairs": "prompts"},
    "transformer": {"tokens": "units", "n_embd": 128, "n_head": 4, "n_layer": 4},
    "train": {
        "max_steps": 1500,
        "mb_size": 64,
        "base_lr": 3e-3,
        "warmup_epochs": 0.5,
        "wd": 0.01,
        "beta2": 0.99,
        "grad_clip": 1.0,
        "ema_decay": 0.995,
        "ema_warmup": True,
        "behaviour_weight": 0.3,
        "checkpoint_steps": 500,
    },
    "sampling": {"sampler": "dpm++", "steps": 20},
    "vis": {"num_nets_per_gpu": 32, "freq": 0},
}

_NAMES = ("mnist_loss", "mnist_error", "cifar10_loss", "cifar10_error", "cartpole")


class _Row(NamedTuple):
    """Values of one key in the published configurations."""

    mnist_loss: Any
    mnist_error: Any
    cifar10_loss: Any
    cifar10_error: Any
    cartpole: Any


def _per_data(mnist: Any, cifar10: Any, cartpole: Any) -> _Row:  # noqa: ANN401 (values of a table)
    return _Row(mnist, mnist, cifar10, cifar10, cartpole)


_LOSS, _ERROR = "avg_test_loss", "avg_test_err"
_ROWS = {
    "exp_name": _Row(*_NAMES),
    "dataset.name": _Row(*_NAMES),
    "dataset.path": _per_data(*(f"checkpoint_datasets/{name}" for name in ("mnist", "cifar10", "cartpole"))),
    "dataset.train_metric": _Row(_LOSS, _ERROR, _LOSS, _ERROR, "train_ret"),
    "dataset.num_test_runs": _per_data(500, 2050, 2050),
    "dataset.openai_coeff": _per_data(4.185, 1.646, 2.06),
    "dataset.target_epoch_size": _per_data(100_800, 100_800, 806_400),
    "transformer.split_policy": _per_data("chunk_within_layer", "chunk_within_layer", "layer_by_layer"),
    "transformer.chunk_size": _per_data(1000, 576, 2048),
    "transformer.n_embd": _per_data(1536, 2048, 1536),
    "transformer.n_head": _per_data(16, 16, 12),
    "train.grad_clip": _per_data(0.75, 0.1, 0.0),
    "train.warmup_epochs": _per_data(5, 5, 10),
    "train.base_lr": _per_data(4e-4, 4e-4, 2e-4),
    "train.num_ep": _per_data(2000, 15000, 2000),
    "train.checkpoint_freq": _per_data(250, 500, 500),
    "train.mb_size": _Row(1024, 512, 550, 550, 8192),
    "test.mb_size": _Row(1024, 512, 550, 550, 8192),
    "test.freq": _Row(20, 10, 10, 10, 10),
    "vis.freq": _per_data(20, 20, 10),
    "vis.num_nets_per_gpu": _per_data(8, 16, 8),
    "vis.net_mb_size_per_gpu": _per_data(8, 16, 8),
    "vis.prompt_start_coeff": _per_data(0.9, 1.0, 1.0),
    "vis.recursive_probe": _per_data(False, False, False),
    "wandb.entity": _per_data("learn2learn", "learn2learn", "learn2learn"),
    "wandb.mode": _per_data("online", "online", "online"),
}
"""Where the published training files differ from the defaults above."""
_TEST_ROWS = _ROWS | {
    "out_dir": _per_data("test_results", "test_results", "test_results"),
    "resume_path": _Row(*(f"{name}.pt" for name in _NAMES)),
    "test_only": _per_data(True, True, True),
    "train.mb_size": _Row(1024, 512, 500, 550, 8192),
    "test.mb_size": _Row(1024, 512, 500, 550, 8192),
    "vis.num_nets_per_gpu": _Row(16, 16, 32, 128, 16),
    "vis.net_mb_size_per_gpu": _Row(16, 16, 32, 64, 16),
    "vis.recursive_probe": _per_data(True, True, True),
}
"""The same for the published test files."""


def _presets() -> dict[str, dict[str, Any]]:
    presets = {"digits_loss": _DIGITS_LOSS}
    for ending, rows in (("", _ROWS), ("_test", _TEST_ROWS)):
        for name in _NAMES:
            tree: dict[str, Any] = {}
            for key, row in rows.items():
                tree = _with(tree, key, getattr(row, name))
            presets[name + ending] = tree
    return presets


def _with(tree: Any, key: str, value: Any) -> dict[str, Any]:  # noqa: ANN401 (a tree of YAML values)
    """The tree with another value of a dotted key."""
    first, _, rest = key.partition(".")
    below = tree.get(first) or {} if rest else None
    if rest and not isinstance(below, Mapping):
        raise ValueError(f"{key}: {first} is no group of keys, but {below!r}")
    return {**tree, first: _with(below, rest, value) if rest else value}


#: Built-in configurations by name: ours, and the ten published files (``<name>`` to train, ``<name>_test``).
PRESETS = _presets()


def preset_name(name: str | Path) -> str:
    """Name of a preset by any of its names: ``mnist-loss``, ``configs/test/mnist_loss.yaml``, ``cifar_loss`` ..."""
    text = str(name).replace("-", "_").removeprefix("configs/").removesuffix(".yaml")
    text = text.removeprefix("train/")
    text = f"{text.removeprefix('test/')}_test" if text.startswith("test/") else text
    return re.sub("^cifar_", "cifar10_", text)


def load_config(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """A preset or YAML file, changed by ``key=value`` overrides.

    Args:
        name_or_path: Name of a preset, or a YAML file with the same tree of keys (also a published one: references
            ``${group.key}`` are followed, the groups ``hydra`` and ``defaults`` are passed over).
        overrides: For example ``train.base_lr=1e-3``; values are read as YAML.

    Raises:
        FileNotFoundError: Neither a preset nor a file; the message has the nearest preset.
        ValueError: Unknown key or unfit value; the message names both.
    """
    name = preset_name(name_or_path)
    if Path(name_or_path).is_file():
        tree: Any = _read_yaml(Path(name_or_path))
    elif name in PRESETS:
        tree = PRESETS[name]
    else:
        near = "".join(f"; did you mean {match!r}?" for match in difflib.get_close_matches(name, PRESETS, n=1))
        raise FileNotFoundError(
            f"configuration {str(name_or_path)!r} is neither a file nor built in{near or '.'} Built in: {', '.join(PRESETS)}"
        )
    for override in overrides:
        tree = _override(tree, override)
    if isinstance(tree, Mapping):
        tree = {key: value for key, value in tree.items() if key != "defaults" and not str(key).startswith("hydra")}
    return config_from_dict(_resolved(tree, tree))


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """Build a configuration from nested dictionaries; absent keys have their defaults."""
    config: Config = _build(Config, tree, "")
    return config


def config_to_yaml(config: Config) -> str:
    """All keys with their values, readable by :func:`load_config`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _read_yaml(path: Path) -> Any:  # noqa: ANN401 (checked by _build)
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None


def _override(tree: Any, override: str) -> dict[str, Any]:  # noqa: ANN401 (a tree of YAML values)
    key, separator, text = override.lstrip("+").partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} must have the form key=value, for example train.mb_size=32")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    return _with(tree, key, value)


_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def _resolved(value: Any, root: Any, depth: int = 0) -> Any:  # noqa: ANN401 (a tree of YAML values)
    """The tree with the value of ``group.key`` for every ``${group.key}`` in it."""
    if isinstance(value, Mapping):
        return {key: _resolved(below, root, depth) for key, below in value.items()}
    if not isinstance(value, str) or not (found := _REFERENCE.search(value)):
        return value
    there = root
    for part in found[1].split("."):
        there = there.get(part) if isinstance(there, Mapping) else None
    if there is None or isinstance(there, Mapping) or depth > 10:
        raise ValueError(f"the configuration refers to {found[0]}, which has no value")
    whole = found[0] == value
    return _resolved(there if whole else value.replace(found[0], str(there)), root, depth + 1)


def _build(kind: type, tree: Any, where: str) -> Any:  # noqa: ANN401 (one of the dataclasses above)
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where or 'configuration'}: expected a group of keys, got {tree!r}")
    hints = get_type_hints(kind)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0)[0]
            raise ValueError(f"unknown configuration key {where + str(key)!r}; did you mean {where + near!r}?")
    values = {}
    for key, value in tree.items():
        hint = hints[key]
        nested = dataclasses.is_dataclass(hint) and isinstance(hint, type)
        values[key] = _build(hint, value, f"{where}{key}.") if nested else _fit(value, hint, where + key)
    return kind(**values)


def _fit(value: Any, hint: Any, key: str) -> Any:  # noqa: ANN401 (a YAML value and a type)
    if get_origin(hint) in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        hint = next(option for option in options if option is not type(None))
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        near = difflib.get_close_matches(str(value), get_args(hint), n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{key}: expected one of {', '.join(map(str, get_args(hint)))}, got {value!r}{meant}")
    if hint is float:
        try:  # YAML 1.1 reads 1e-3 as text
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        return number if math.isfinite(number) else _fail(value, hint, key)
    if isinstance(value, bool) is (hint is bool) and isinstance(value, hint):
        return value
    if hint is str and not isinstance(value, (Mapping, list)) and value is not None:
        return str(value)
    return _fail(value, hint, key)


def _fail(value: Any, hint: type, key: str) -> None:  # noqa: ANN401 (any YAML value)
    raise ValueError(f"{key}: expected {'true or false' if hint is bool else hint.__name__}, got {value!r}")
