"""Windows of a prepared zoo, drawn when they are needed.

Shapes: ``b`` windows of ``w`` tokens with ``i`` scalars, ``k`` tokens in a checkpoint.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sane.augmentation import Erase, add_noise
from sane.preparation import Prepared

_TOGETHER = 2**26
"""Numbers of weights from which the windows of a batch are cut at once."""


class Batch(NamedTuple):
    """Two views of the same windows."""

    views: Tensor
    """(2b, w, i): first views, then second views, with noise and erasures."""
    clean: Tensor
    """(2b, w, i) without them."""
    mask: Tensor
    """(b, w, i) bool: where weights are."""
    positions: Tensor
    """(b, w, 3)."""


@dataclass(frozen=True)
class ViewConfig:
    """How the two views of a window are made."""

    views: Literal["canonical", "mixed", "permuted"] = "canonical"
    """Both aligned (as published), the second one or both permuted at random."""
    noise: tuple[float, float] = (0.1, 0.1)
    """Multiplicative noise on each view (published experiments: 0.1)."""
    erase: bool = False
    """Erase a random rectangle."""
    shared: bool = False
    """One window start, permutation and rectangle for the whole batch, as published; else for each sample."""


class WindowDataset:
    """Batches of windows, each a function of the seed and the step alone.

    Args:
        prepared: The zoo.
        split: ``train``, ``validation`` or ``test``.
        window: Tokens in a window.
        views: How views are made.
        supersample: Windows of each checkpoint in an epoch.
        seed: Draws everything.

    Raises:
        ValueError: The split is empty, or a window is longer than a checkpoint.
    """

    def __init__(
        self,
        prepared: Prepared,
        split: str,
        *,
        window: int,
        views: ViewConfig | None = None,
        supersample: int = 1,
        seed: int = 0,
    ) -> None:
        """See the class."""
        tokens = prepared.tokenizer.shape[0]
        if not 1 <= window <= tokens:
            raise ValueError(f"window ({window}) must be from 1 to the {tokens} tokens of a checkpoint")
        self.count = len(prepared.samples[split].runs)
        if not self.count:
            raise ValueError(f"the {split} split has no checkpoints: prepare the zoo with other fractions")
        self.prepared, self.split, self.window, self.seed = prepared, split, window, seed
        self.views, self.supersample = views or ViewConfig(), supersample
        self.mask, self.positions = prepared.tokenizer.mask, prepared.tokenizer.positions

    def __len__(self) -> int:
        """Windows in an epoch."""
        return self.count * self.supersample

    def batches_per_epoch(self, size: int) -> int:
        """Full batches in an epoch.

        Raises:
            ValueError: A batch is larger than an epoch.
        """
        if not 1 <= size <= len(self):
            raise ValueError(f"batch ({size}) must be from 1 to the {len(self)} windows of an epoch")
        return len(self) // size

    def batch(self, size: int, step: int) -> Batch:
        """The batch of a step; an epoch shows every checkpoint ``supersample`` times, incomplete batches are dropped."""
        epoch, number = divmod(step, self.batches_per_epoch(size))
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self))
        chosen = order[number * size : (number + 1) * size] % self.count
        generator = self._generator(step)
        draws = 1 if self.views.shared else size
        last = self.mask.shape[0] - self.window
        starts = torch.randint(last + 1, (draws,), generator=generator).expand(size)
        index = starts[:, None] + torch.arange(self.window)
        step_size = max(1, _TOGETHER // self.prepared.tokenizer.layout.size)
        parts = [
            self._cut(chosen[i : i + step_size], index[i : i + step_size], generator) for i in range(0, size, step_size)
        ]
        first, second = (torch.cat(part) for part in zip(*parts, strict=True))
        mask = self.mask[index]
        noisy = [
            add_noise(view, sigma, generator) for view, sigma in zip((first, second), self.views.noise, strict=True)
        ]
        if self.views.erase:
            noisy = [Erase()(view, generator, shared=self.views.shared) for view in noisy]
        return Batch(torch.cat(noisy), torch.cat([first, second]), mask, self.positions[index])

    def _cut(self, chosen: np.ndarray, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Both views of some windows, without noise."""
        vectors = self.prepared.vectors(self.split, chosen)
        found: list[Tensor] = []
        permuted = {"canonical": (False, False), "mixed": (False, True), "permuted": (True, True)}[self.views.views]
        for move in permuted:
            if not move and found and not permuted[0]:
                found.append(found[0])
                continue
            tokens = self.prepared.tokens(self._permuted(vectors, generator) if move else vectors)
            found.append(tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2])))
        return found[0], found[1]

    def _permuted(self, vectors: Tensor, generator: torch.Generator) -> Tensor:
        symmetry = self.prepared.symmetry
        drawn = symmetry.random_permutations(1 if self.views.shared else len(vectors), generator)
        return symmetry.apply(vectors, [p.expand(len(vectors), -1) for p in drawn])

    def _generator(self, step: int) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, 1, step]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)
