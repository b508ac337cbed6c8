"""A trained model with everything that sampling needs, in one file."""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from zoo_common.checkpoint import load_checkpoint, save_checkpoint
from zoo_common.hub import fetch_file, push_file
from zoo_common.layout import ParameterLayout

from gpt_diffusion.config import Config, TransformerConfig, config_from_dict
from gpt_diffusion.diffusion import Diffusion, Flow, ModelMeanType
from gpt_diffusion.model import GptModel
from gpt_diffusion.normalization import Normalizer, get_normalizer
from gpt_diffusion.sampling import sample
from gpt_diffusion.units import UnitModel, UnitTokens

#: Recorded in every model file; a reader refuses other kinds.
KIND = "gpt-diffusion model"
#: Name of a model's file in the folder of a run, and in a repository.
FILE = "model.safetensors"


@dataclass(frozen=True)
class ModelInfo:
    """What is known of the checkpoints a model has learned from."""

    layout: ParameterLayout
    metric: str
    """Metric of the zoo that prompts mean."""
    metric_log: bool
    """Whether unit tokens see the logarithm of the metric."""
    metric_scale: float
    """Typical size of the metric."""
    openai_coeff: float
    weight_range: tuple[float, float]
    """Smallest and largest training weight."""
    best_metric: float
    """Best metric of a training run."""
    final_metric: float
    """Median of the last metric of the training runs: a prompt that the model knows well."""
    worst_metric: float | None = None
    """Worst metric of a training run, at any checkpoint; unknown of released models."""
    units: UnitTokens | None = None
    """Where the weights of each hidden unit stand; only for unit tokens."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        simple = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("layout", "units")}
        return simple | {"layout": self.layout.to_json(), "units": self.units.to_json() if self.units else None}

    def outside(self, prompt: float) -> str | None:
        """A warning if a prompt is better or worse than every checkpoint that the model has learned from."""
        if self.worst_metric is None:
            return None
        low, high = sorted((self.best_metric, self.worst_metric))
        if low <= prompt <= high:
            return None
        return (
            f"the prompt {prompt:g} is outside of what the model has seen: {self.metric} from {low:.4g} to {high:.4g}"
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ModelInfo":
        """Inverse of :meth:`to_json`."""
        units = UnitTokens.from_json(data["units"]) if data["units"] else None
        layout = ParameterLayout.from_json(data["layout"])
        return cls(**{**data, "layout": layout, "units": units, "weight_range": tuple(data["weight_range"])})


def build_model(config: TransformerConfig, info: ModelInfo) -> GptModel | UnitModel:
    """An untrained denoiser; it returns the start.

    Raises:
        ValueError: Sizes that do not fit each other.
    """
    if config.tokens == "units":
        if info.units is None:
            raise ValueError("unit tokens need the unit map of the task network")
        return UnitModel(
            info.units,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            metric_log=info.metric_log,
            metric_scale=info.metric_scale,
            metric_floor=info.best_metric,
        )
    return GptModel(
        info.layout.sizes,
        info.layout.names,
        predict_xstart=config.predict_xstart,
        absolute_loss_conditioning=config.absolute_loss_conditioning,
        split_policy=config.split_policy,
        chunk_size=config.chunk_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        encoder_depth=config.encoder_depth,
        decoder_depth=config.decoder_depth,
        max_freq_log2=config.max_freq_log2,
        num_frequencies=config.num_frequencies,
        dropout_prob=config.dropout_prob,
    )


@dataclass(frozen=True)
class Pretrained:
    """A denoiser ready to sample networks."""

    model: GptModel | UnitModel
    config: Config
    info: ModelInfo

    @cached_property
    def normalizer(self) -> Normalizer:
        """Map between weights and the space of the diffusion process."""
        return get_normalizer(self.config.dataset.normalizer, self.info.openai_coeff)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def sample(
        self,
        start: Tensor,
        *,
        prompt: Tensor | float,
        start_metric: Tensor,
        seed: int = 0,
        batch_size: int | None = 512,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """One prompted step: networks that should reach the prompted metric, from their starts.

        Args:
            start: Weights (n, D), raw.
            prompt: Metric wanted, one value or (n,), in its own units; :meth:`ModelInfo.outside` tells what it knows.
            start_metric: Metric of the starts (n,).
            seed: Seed of the noise.
            batch_size: Networks in one pass through the model.
            progress: Called with (steps done, steps in all).

        Returns:
            Weights (n, D), raw, on the model's device.

        Raises:
            ValueError: Starts of another layout, or non-finite starts, prompts or metrics.
        """
        device, sampling = self.device, self.config.sampling
        if start.ndim != 2 or start.shape[1] != self.info.layout.size:
            raise ValueError(
                f"start: the model was trained on networks of {self.info.layout.size} weights, "
                f"got a tensor of shape {tuple(start.shape)}"
            )
        prompts = torch.as_tensor(prompt, dtype=torch.float32, device=device).expand(len(start))
        metrics = start_metric.to(device, torch.float32)
        for name, value in (("start", start), ("prompt", prompts), ("start_metric", metrics)):
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} has NaN or infinite values; nothing can be sampled from it")
        clip = self.normalizer.range(*self.info.weight_range) if sampling.thresholding == "static" else None
        out = sample(
            self.model,
            self._diffusion,
            start=self.normalizer.normalize(start.to(device, torch.float32)),
            prompt=prompts,
            start_metric=metrics,
            sampler=sampling.sampler,
            guidance=sampling.guidance,
            clip=clip,
            generator=torch.Generator(device).manual_seed(seed),
            batch_size=batch_size,
            progress=progress,
        )
        return self.normalizer.unnormalize(out)

    @cached_property
    def _diffusion(self) -> Diffusion | Flow:
        return make_diffusion(self.config, self.config.sampling.steps)

    def save(self, path: Path) -> None:
        """Write the model to a safetensors file."""
        metadata = {"kind": KIND, "config": dataclasses.asdict(self.config), "info": self.info.to_json()}
        save_checkpoint(path, self.model.state_dict(), metadata)

    def push(self, repo: str, *, revision: str | None = None, private: bool = False) -> str:
        """Upload the model to a hub (see :func:`zoo_common.push_file`); returns the new commit."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(file := Path(folder) / FILE)
            return push_file(file, repo, FILE, revision=revision, private=private)


def make_diffusion(config: Config, kept_steps: int = 1000) -> Diffusion | Flow:
    """The process of a configuration: the published one (linear schedule, 1000 steps; respaced if fewer are kept), or a flow."""
    if config.train.objective == "flow":
        return Flow(kept_steps)
    mean_type = ModelMeanType.START_X if config.transformer.predict_xstart else ModelMeanType.EPSILON
    even = f"snr{kept_steps}" if config.sampling.sampler == "dpm++" else [kept_steps]
    return Diffusion(respacing=even if kept_steps < 1000 else "", mean_type=mean_type)


def load_pretrained(
    name: str | Path,
    device: str | torch.device = "cpu",
    *,
    config: str | Path | Config | None = None,
    weights: Literal["ema", "raw"] | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> Pretrained:
    """Read a model: a file, the one in the folder of a training run, a released one, or one on a hub.

    Args:
        name: File, folder, name of a released model (``mnist_loss.pt``; fetched to ``pretrained_models`` at first use),
            or repository ``owner/name`` or ``owner/name@revision``.
        device: Where to put the model.
        config: Configuration of a ``.pt`` file, which holds none; default: by its name, or else by its shapes.
        weights: ``ema`` (default: as configured) or ``raw`` weights of a ``.pt`` file; other files hold the average.
        revision: Branch, tag or commit of the repository; default: ``main``.
        offline: Fetch nothing; take a repository from the cache alone.

    Raises:
        FileNotFoundError: No such file or repository, or a run folder without a model.
        ValueError: Not a model of this package, a damaged one, or one of another configuration.
        OSError: The server or hub cannot be reached or refuses.
    """
    from gpt_diffusion.released import find_released, load_released

    if (released := find_released(name, offline=offline)) is not None:
        return load_released(released, device, config=config, weights=weights)
    if config is not None or weights is not None:
        raise ValueError(f"{name} is no .pt file: its configuration and weights cannot be chosen")
    file = fetch_file(name, FILE, revision=revision, offline=offline)
    if not file.exists():
        raise FileNotFoundError(f"{name} holds no {FILE}; finish the run with `gpt-diffusion train`")
    checkpoint = load_checkpoint(file, device)
    if checkpoint.metadata.get("kind") != KIND:
        raise ValueError(f"{file} is not a model of gpt-diffusion, but weights of something else")
    settings = config_from_dict(checkpoint.metadata["config"])
    info = ModelInfo.from_json(checkpoint.metadata["info"])
    model = build_model(settings.transformer, info)
    try:
        model.load_state_dict(checkpoint.state)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit its own configuration: {' '.join(str(error).split())}") from None
    return Pretrained(model.to(device).requires_grad_(False).eval(), settings, info)
