"""Windows of a prepared zoo, drawn when they are needed.

Shapes: ``b`` windows of ``w`` tokens with ``i`` scalars, ``k`` tokens in a checkpoint.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from zoo_common.alignment import axis_index

from sane.augmentation import Erase, add_noise
from sane.preparation import Prepared

_TOGETHER = 2**26
"""Numbers of weights from which the windows of a batch are cut at once."""
_LARGE = 2**17
"""Numbers of a checkpoint from which on windows of at most half of them are read by rows."""

_PERMUTED = {"canonical": (False, False), "mixed": (False, True), "permuted": (True, True)}
"""Which of the two views are permuted."""


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
        size = prepared.tokenizer.layout.size
        small = 2 * window * prepared.tokenizer.token_size <= size
        self.by_rows = size >= _LARGE and small and prepared.normalization.mode != "l2_ind"
        """Whether only the rows that a window shows are read; else whole checkpoints, which is faster for small ones."""
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
            raise ValueError(
                f"batch ({size}) must be from 1 to the {len(self)} windows of an epoch: a larger supersample gives more"
            )
        return len(self) // size

    def batch(self, size: int, step: int, rows: np.ndarray | None = None) -> Batch:
        """The batch of a step; an epoch shows every checkpoint ``supersample`` times, incomplete batches are dropped.

        Args:
            size: b.
            step: Counted over all epochs.
            rows: Which windows are cut; the others are 0 (all).
        """
        epoch, number = divmod(step, self.batches_per_epoch(size))
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self))
        chosen = order[number * size : (number + 1) * size] % self.count
        generator = self._generator(step)
        draws = 1 if self.views.shared else size
        last = self.mask.shape[0] - self.window
        starts = torch.randint(last + 1, (draws,), generator=generator).expand(size)
        index = starts[:, None] + torch.arange(self.window)
        orders = [self._orders(size, generator) if move else None for move in _PERMUTED[self.views.views]]
        step_size = max(1, _TOGETHER // self.prepared.tokenizer.layout.size)
        wanted = np.arange(size) if rows is None else rows
        views = torch.zeros(2, size, self.window, self.prepared.tokenizer.token_size)
        for start in range(0, len(wanted), step_size):
            at = wanted[start : start + step_size]
            cut = self._cut(chosen[at], index[at], [o if o is None else [p[at] for p in o] for o in orders])
            views[:, at] = torch.stack(cut)
        first, second = views
        mask = self.mask[index]
        noisy = [
            add_noise(view, sigma, generator) for view, sigma in zip((first, second), self.views.noise, strict=True)
        ]
        if self.views.erase:
            noisy = [Erase()(view, generator, shared=self.views.shared) for view in noisy]
        return Batch(torch.cat(noisy), torch.cat([first, second]), mask, self.positions[index])

    def _cut(self, chosen: np.ndarray, index: Tensor, orders: list[list[Tensor] | None]) -> tuple[Tensor, Tensor]:
        """Both views of some windows, without noise; ``orders`` permute each view, or None."""
        whole = None if self.by_rows else self.prepared.vectors(self.split, chosen)

        def cut(orders: list[Tensor] | None) -> Tensor:
            if whole is None:
                return self._rows(chosen, index[:, 0].tolist(), orders)
            vectors = whole if orders is None else self.prepared.symmetry.apply(whole, orders)
            tokens = self.prepared.tokens(vectors)
            return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))

        if orders == [None, None]:
            return (cut(None),) * 2
        first, second = map(cut, orders)
        return first, second

    def _orders(self, n: int, generator: torch.Generator) -> list[Tensor]:
        """Random permutations, (n, s) per group."""
        drawn = self.prepared.symmetry.random_permutations(1 if self.views.shared else n, generator)
        return [p.expand(n, -1) for p in drawn]

    def _rows(self, chosen: np.ndarray, starts: list[int], orders: list[Tensor] | None) -> Tensor:
        """Windows (n, w, i) of which only the rows they show are read and permuted."""
        prepared, samples = self.prepared, self.prepared.samples[self.split]
        aligned = [table[torch.from_numpy(samples.rows[chosen])].long() for table in prepared.permutations]
        if aligned and orders is not None:
            orders = [p.gather(1, q) for p, q in zip(aligned, orders, strict=True)]
        orders = orders or aligned
        return torch.stack(
            [
                cut_rows(
                    prepared, prepared.zoo.params[int(run), int(checkpoint)], [p[i] for p in orders], start, self.window
                )
                for i, (run, checkpoint, start) in enumerate(
                    zip(samples.runs[chosen], samples.checkpoints[chosen], starts, strict=True)
                )
            ]
        )

    def _generator(self, step: int) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, 1, step]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)


def cut_rows(prepared: Prepared, vector: Tensor, orders: list[Tensor], start: int, window: int) -> Tensor:
    """Normalised tokens (window, i) of one checkpoint, from the rows of the tensors that they show.

    Args:
        prepared: Tokens, normalisation (not l2_ind) and symmetry.
        vector: The checkpoint (d,), as it is in the zoo.
        orders: Permutation (s,) of each group; empty: as it is.
        start: First token.
        window: Tokens.
    """
    tokenizer, size = prepared.tokenizer, prepared.tokenizer.token_size
    shapes = dict(zip(tokenizer.layout.names, tokenizer.layout.shapes, strict=True))

    def rows_of(name: str, first: int, last: int) -> Tensor:
        shape = shapes[name]
        values = vector[tokenizer.layout.slices[name]].view(shape or (1,))
        moves = prepared.symmetry.moves.get(name, {}) if orders else {}
        index = {axis: axis_index(found, shape[axis], [p[None] for p in orders])[0] for axis, found in moves.items()}
        values = values[index.pop(0)[first:last]] if 0 in index else values[first:last]
        for axis, order in index.items():
            values = values.index_select(axis, order)
        center, scale = prepared.normalization.of(name)
        return (values.float().reshape(last - first, -1) - center) / scale

    parts = []
    for layer in tokenizer.layers:
        low, high = max(start, layer.start), min(start + window, layer.stop)
        if low >= high:
            continue
        first, last = (low - layer.start) // layer.per_row, -(-(high - layer.start) // layer.per_row)
        rows = [rows_of(name, first, last) for name in (layer.weight, layer.bias) if name is not None]
        padding = torch.zeros(last - first, layer.per_row * size - layer.width)
        tokens = torch.cat([*rows, padding], dim=1).view(-1, size)
        offset = low - layer.start - first * layer.per_row
        parts.append(tokens[offset : offset + high - low])
    return torch.cat(parts)
