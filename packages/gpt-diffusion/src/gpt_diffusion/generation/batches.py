"""Seeds, data order and augmentation of runs, all derived from the run's index and the zoo's seed alone.

Shapes: ``k`` data orders drawn side by side, ``b`` images in a batch, ``n`` training images.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: Zero padding of the published crop, and the number of offsets it draws from: 0..7, 8 never occurs.
CROP_PADDING, CROP_OFFSETS = 4, 8


def derive_seed(seed: int, purpose: str, index: int) -> int:
    """A 63-bit seed for one purpose (``init``, ``order``) of one run or group of runs."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Batches:
    """Batches of several independent data orders, forever: each epoch is a fresh permutation, its rest is dropped.

    What an order yields depends on its seed (and the kind of device, whose generator draws it) alone, not on the orders
    beside it.
    """

    def __init__(self, images: Tensor, labels: Tensor, seeds: Sequence[int], *, batch: int, augmentation: str) -> None:
        """Prepare the orders.

        Args:
            images: (n, ...) on the device of the training.
            labels: (n,) int64.
            seeds: One for each of the k orders.
            batch: b, at most n.
            augmentation: ``none`` or ``flip_crop``.
        """
        self.images, self.labels, self.batch = images, labels, batch
        self._flat = images.flatten(1)
        self._augment = augmentation == "flip_crop"
        self._generators = [torch.Generator(images.device).manual_seed(seed) for seed in seeds]
        self._buffer = torch.empty(len(seeds) * batch, self._flat.shape[1], dtype=images.dtype, device=images.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (k, b, ...) images, valid until the next batch, and (k, b) labels."""
        n, k, b = len(self.images), len(self._generators), self.batch
        per_epoch = n // b
        shape = (k, b, *self.images.shape[1:])
        while True:
            drawn = (torch.randperm(n, generator=g, device=g.device)[: per_epoch * b] for g in self._generators)
            order = torch.stack(list(drawn))
            labels = self.labels[order]
            draws = self._draw(per_epoch * b) if self._augment else None
            for span in (slice(i * b, (i + 1) * b) for i in range(per_epoch)):
                torch.index_select(self._flat, 0, order[:, span].flatten(), out=self._buffer)
                x = self._buffer.view(shape)
                if draws is not None:
                    x = flip_crop(x.flatten(0, 1), draws[:, span].flatten(0, 1)).view(shape)
                yield x, labels[:, span]

    def _draw(self, count: int) -> Tensor:
        """Random numbers of an epoch's augmentation: (k, count, 3) of flip (0, 1) and two offsets."""
        high = torch.tensor([2, CROP_OFFSETS, CROP_OFFSETS], device=self.images.device)
        return torch.stack(
            [torch.randint(2**30, (count, 3), generator=g, device=g.device) % high for g in self._generators]
        )


def flip_crop(images: Tensor, draws: Tensor) -> Tensor:
    """The published CIFAR-10 augmentation of normalised images (n, c, h, w): flip, zero-pad by 4, crop.

    Args:
        images: To augment.
        draws: (n, 3) int64: whether to flip, row offset, column offset.
    """
    n, _, h, w = images.shape
    padded = torch.nn.functional.pad(images, (CROP_PADDING,) * 4)
    rows = draws[:, 1, None] + torch.arange(h, device=images.device)
    columns = torch.arange(w, device=images.device)
    columns = torch.where(draws[:, :1] == 1, w - 1 + 2 * CROP_PADDING - columns - draws[:, 2:], columns + draws[:, 2:])
    which = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
