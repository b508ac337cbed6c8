"""New networks from the latents of given ones.

Shapes: ``a`` anchors and ``n`` samples of ``k`` tokens with ``l`` latent numbers; checkpoints of ``d`` numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from sane.model import Halo, SaneModel
from sane.progress import track

Mode = Literal["individual", "token", "joint"]
Score = Callable[[Tensor], Tensor]
"""Quality (n,) of checkpoints (n, d), the larger the better; measured on a split that is named by who gives it."""


@dataclass(frozen=True)
class KernelDensity:
    """Gaussian kernel density estimate around the latents of anchors.

    ``joint`` draws one anchor for a whole network, ``token`` one for each token, ``individual`` one for each number; noise
    of the bandwidth is added to every number.
    """

    mode: Mode = "token"
    bandwidth: float = 0.2
    shared_noise: bool = False
    """The published behaviour: all estimates share one seed, so that every mode draws around one anchor, and its noise is
    one number (individual), one vector (token) or full (joint); the same in every call."""
    relative: bool = False
    """The bandwidth is in standard deviations of each latent number over the anchors; else absolute, as published."""

    def __post_init__(self) -> None:
        """Reject what is no density."""
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        if not 0 <= self.bandwidth < math.inf:
            raise ValueError(f"bandwidth must not be negative and must be finite, got {self.bandwidth}")

    def draw(self, anchors: Tensor, n: int, seed: int = 42) -> Tensor:
        """Latents (n, k, l) in the dtype of the anchors (a, k, l).

        Raises:
            ValueError: No anchors.
        """
        if not len(anchors):
            raise ValueError("there are no anchors to sample around")
        if self.shared_noise:
            return self._published(anchors, n, seed)
        generator = torch.Generator(anchors.device).manual_seed(seed)
        k, width = anchors.shape[1:]
        shape = {"joint": (n, 1, 1), "token": (n, k, 1), "individual": (n, k, width)}[self.mode]
        index = torch.randint(len(anchors), shape, generator=generator, device=anchors.device)
        chosen = anchors.gather(0, index.expand(n, k, width))
        noise = torch.randn(chosen.shape, generator=generator, device=anchors.device, dtype=anchors.dtype)
        return chosen.add_(self._width(anchors) * noise)

    def _width(self, anchors: Tensor) -> float | Tensor:
        """Standard deviation of the noise, for all numbers or (k, l)."""
        return self.bandwidth * anchors.std(0, correction=0) if self.relative else self.bandwidth

    def _published(self, anchors: Tensor, n: int, seed: int) -> Tensor:
        """The closed form of what the original draws with one estimate per token or number."""
        random = np.random.RandomState(seed)
        k, width = anchors.shape[1:]
        index = torch.from_numpy((random.uniform(0, 1, n) * len(anchors)).astype(np.int64))
        shape = {"individual": (n, 1, 1), "token": (n, 1, width), "joint": (n, k, width)}[self.mode]
        noise = torch.from_numpy(random.normal(0, 1, int(np.prod(shape))).reshape(shape)).to(anchors.device)
        return (anchors[index.to(anchors.device)].double() + self._width(anchors) * noise).to(anchors)


def random_anchors(n: int, tokens: int, latent: int, sigma: float = 10.0, seed: int = 0) -> Tensor:
    """Latents (n, tokens, latent) of N(0, sigma), to begin a bootstrap without any network."""
    return sigma * torch.randn(n, tokens, latent, generator=torch.Generator().manual_seed(seed))


class Round(NamedTuple):
    """One iteration of a bootstrap."""

    kept_mean: float
    kept_std: float
    dropped_mean: float
    dropped_std: float


class Sampled(NamedTuple):
    """Sampled networks, best first where they were scored."""

    vectors: Tensor
    """(n, d)."""
    scores: Tensor | None
    """(n,) on the split that chose them; None if nothing was chosen."""
    rounds: tuple[Round, ...] = ()


@dataclass(frozen=True)
class Sampler:
    """Draws latents around anchors and decodes them; all networks of a draw are decoded as one batch of windows.

    Args:
        model: Decodes.
        anchors: Latents (a, k, l), as :meth:`SaneModel.encode` gives them.
        density: How latents are drawn.
        halo: Windows to decode in; default: whole sequences.
        repair: Applied to every batch of decoded checkpoints (n, d), for example conditioning of batch norms.
    """

    model: SaneModel
    anchors: Tensor
    density: KernelDensity
    halo: Halo | None = None
    repair: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        """Check the latents against the model."""
        expected = (self.model.tokenizer.shape[0], self.model.autoencoder.config.latent)
        if self.anchors.ndim != 3 or tuple(self.anchors.shape[1:]) != expected:
            raise ValueError(
                f"anchors must be latents (a, {expected[0]}, {expected[1]}), got {tuple(self.anchors.shape)}"
            )

    def decode(self, latents: Tensor) -> Tensor:
        """Checkpoints (n, d), repaired."""
        vectors = self.model.decode(latents, self.halo)
        return vectors if self.repair is None else self.repair(vectors)

    def plain(self, n: int, seed: int = 42) -> Sampled:
        """Draw n networks."""
        return Sampled(self.decode(self.density.draw(self.anchors, n, seed)), None)

    def subsampled(self, n: int, score: Score, *, draws: int, seed: int = 42) -> Sampled:
        """Draw many networks and keep the n best ones.

        Raises:
            ValueError: Fewer draws than networks wanted.
        """
        _check_at_least("draws", draws, n)
        vectors = self.decode(self.density.draw(self.anchors, draws, seed))
        scores = score(vectors)
        best = _ranked(scores)[:n]
        return Sampled(vectors[best], scores[best])

    def bootstrapped(self, n: int, score: Score, *, draws: int, keep: int, iterations: int, seed: int = 42) -> Sampled:
        """Again and again draw networks and make the latents of the best ones the anchors; the n best of the last draw.

        Raises:
            ValueError: Fewer draws than networks wanted or kept, or no iteration.
        """
        _check_at_least("draws", draws, max(n, keep))
        _check_at_least("iterations", iterations, 1)
        _check_at_least("keep", keep, 1)
        anchors, rounds = self.anchors, []
        for iteration in track(range(iterations), "rounds"):
            latents = self.density.draw(anchors, draws, seed + iteration)
            vectors = self.decode(latents)
            scores = score(vectors)
            order = _ranked(scores)
            anchors = latents[order[:keep]]
            kept, dropped = scores[order[:keep]], scores[order[keep:]]
            pairs = [
                (s.mean().item(), s.std(correction=0).item()) if len(s) else (np.nan, np.nan) for s in (kept, dropped)
            ]
            rounds.append(Round(*pairs[0], *pairs[1]))
        best = order[:n]
        return Sampled(vectors[best], scores[best], tuple(rounds))


def _ranked(scores: Tensor) -> Tensor:
    """Indices, the best score first; NaN is the worst, not the largest as for torch."""
    return torch.where(scores.isnan(), -torch.inf, scores).argsort(descending=True)


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
