"""Model files in the published format: a dictionary ``G``, ``G_ema`` and ``optim``, without a configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from zoo_common.layout import ParameterLayout
from zoo_common.tasks import Task, get_task
from zoo_common.untrusted import load_untrusted

from gpt_diffusion.config import PRESETS, Config, load_config, preset_name
from gpt_diffusion.downloads import find_model, model_name
from gpt_diffusion.model import GptModel
from gpt_diffusion.optim import param_groups
from gpt_diffusion.pretrained import ModelInfo, Pretrained, build_model

_SUFFIXES = (".pt", ".pth")
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Released:
    """Content of a file, checked against its configuration."""

    config: Config
    raw: State
    """State dict of the model."""
    average: State | None
    """The same of its moving average."""
    optimizer: dict[str, Any] | None
    """State dict of AdamW over :func:`gpt_diffusion.optim.param_groups`."""
    epoch: int
    """Epochs that it was trained for, by the name of the file (``0250.pt``); 0 where that does not tell."""


def find_released(name: str | Path, *, offline: bool = False) -> Path | None:
    """A ``.pt`` file, or that of a released model by its name, fetched if needed; None: ``name`` is something else."""
    path = Path(name)
    if path.suffix not in _SUFFIXES or path.is_dir():
        return None
    if path.is_file():
        return path
    return find_model(name, offline=offline) if len(path.parts) == 1 and model_name(name) else None


def load_released(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    config: str | Path | Config | None = None,
    weights: Literal["ema", "raw"] | None = None,
) -> Pretrained:
    """A model ready to sample; see :func:`gpt_diffusion.pretrained.load_pretrained`."""
    if weights not in (None, "ema", "raw"):
        raise ValueError(f"weights must be ema or raw, got {weights!r}")
    content = read_released(path, config)
    settings = content.config
    if settings.sampling.thresholding == "static":
        raise ValueError(f"sampling.thresholding=static: {path} does not tell the range of the training weights")
    chosen = weights or ("ema" if settings.vis.use_ema and content.average is not None else "raw")
    state = content.raw if chosen == "raw" else content.average
    if state is None:
        raise ValueError(f"{path} holds no moving average (G_ema); choose the raw weights")
    task = get_task(settings.dataset.name)
    info = released_info(settings, task)
    with torch.device("meta"):
        model = build_model(settings.transformer, info)
    model.load_state_dict(state, assign=True)
    return Pretrained(model.to(device).requires_grad_(False).eval(), settings, info)


def read_released(path: str | Path, config: str | Path | Config | None = None) -> Released:
    """Read and check a file without running any code in it.

    Args:
        path: File.
        config: Its configuration; default: the preset that the file is named after, or else the only one that fits.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another kind of file, or not of this configuration; one message lists all missing, unexpected and
            wrongly shaped tensors.
    """
    path = Path(path)
    content = load_untrusted(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("G"), Mapping):
        kind = (
            f"a dictionary of {', '.join(map(repr, list(content)[:5]))}"
            if isinstance(content, Mapping)
            else "something else"
        )
        raise ValueError(f"{path} is no model in the published format (a dictionary with 'G'), but {kind}")
    settings = _settings(path, content["G"], config)
    expected = _expected(settings)
    for part in ("G", "G_ema"):
        if content.get(part) is not None and (problems := _problems(content[part], expected.state_dict())):
            raise ValueError(
                f"{path}: {part} is not a model of the configuration {settings.exp_name!r}: {'; '.join(problems)}"
            )
    optimizer = content.get("optim")
    if optimizer is not None and (problems := _optimizer_problems(optimizer, expected)):
        raise ValueError(f"{path}: optim is not the state of AdamW for {settings.exp_name!r}: {'; '.join(problems)}")
    epoch = path.name.split(".")[0]
    return Released(settings, content["G"], content.get("G_ema"), optimizer, int(epoch) if epoch.isdecimal() else 0)


def released_info(config: Config, task: Task) -> ModelInfo:
    """What is known of the checkpoints that a released model has learned from: the prompts of the task."""
    return ModelInfo(
        layout=ParameterLayout.from_module(task.constructor()),
        metric=config.dataset.train_metric or task.metric_name,
        metric_log=False,
        metric_scale=1.0,
        openai_coeff=config.dataset.openai_coeff or 1.0,
        weight_range=(-float("inf"), float("inf")),
        best_metric=task.best_prompt,
        final_metric=task.best_prompt,
    )


def _settings(path: Path, state: State, config: str | Path | Config | None) -> Config:
    if isinstance(config, Config):
        return config
    if config is not None:
        return load_config(config)
    if preset_name(path.stem) in PRESETS:
        return load_config(preset_name(path.stem))
    names = [name for name in PRESETS if name.endswith("_test")]
    fitting = [name for name in names if not _problems(state, _expected(load_config(name)).state_dict())]
    if len(fitting) == 1:
        return load_config(fitting[0].removesuffix("_test"))
    found = f"fits {' and '.join(name.removesuffix('_test') for name in fitting)}" if fitting else "fits none of ours"
    raise ValueError(f"{path}: the configuration is not known, the model {found}: give it (config=, or --config)")


def _expected(config: Config) -> GptModel:
    """The model of a configuration, without memory."""
    if config.transformer.tokens != "layers":
        raise ValueError(
            f"files in the published format have layer tokens, not transformer.tokens={config.transformer.tokens}"
        )
    with torch.device("meta"):
        model = build_model(config.transformer, released_info(config, get_task(config.dataset.name)))
    return model  # type: ignore[return-value]


def _problems(found: object, expected: State) -> list[str]:
    """Missing, unexpected and wrongly shaped tensors."""
    if not isinstance(found, Mapping):
        return [f"it is no dictionary, but {type(found).__name__}"]
    gaps = {"missing": [n for n in expected if n not in found], "unexpected": [n for n in found if n not in expected]}
    problems = [f"{kind}: {', '.join(map(str, names))}" for kind, names in gaps.items() if names]
    for name, tensor in expected.items():
        if name in found:
            there = _kind(found[name])
            if there != _kind(tensor):
                problems.append(f"{name!r}: expected {_kind(tensor)}, got {there}")
    return problems


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _optimizer_problems(found: Any, model: GptModel) -> list[str]:  # noqa: ANN401 (from a file)
    """What is wrong with the state of an optimizer; its order of parameters is that of ``param_groups``."""
    groups = [group["params"] for group in param_groups(model, 0.1)]
    try:
        counts = [list(group["params"]) for group in found["param_groups"]]
        state = {index: dict(entry) for index, entry in found["state"].items()}
    except (TypeError, KeyError, ValueError, AttributeError):
        return ["it has no 'state' and 'param_groups'"]
    if list(map(len, counts)) != list(map(len, groups)):
        return [f"expected groups of {list(map(len, groups))} parameters, got {list(map(len, counts))}"]
    parameters = [p for group in groups for p in group]
    problems = []
    for index, parameter in zip([i for group in counts for i in group], parameters, strict=True):
        entry = state.get(index, {})
        if state and not isinstance(entry.get("step"), (int, float, Tensor)):
            problems.append(f"step of parameter {index} is missing")
        for key in ("exp_avg", "exp_avg_sq"):
            value = entry.get(key)
            if state and (not isinstance(value, Tensor) or value.shape != parameter.shape):
                problems.append(f"{key} of parameter {index}: expected {list(parameter.shape)}, got {_kind(value)}")
    return problems
