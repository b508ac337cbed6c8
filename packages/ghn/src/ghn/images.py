"""The images that small hypernetworks are trained on, as 32 x 32 pixels of three channels."""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo_common.datasets import Part, Splits, load_dataset

Data = Literal["digits", "cifar10"]


def load_images(name: Data, data_dir: Path | None = None, *, download: bool = False) -> Splits:
    """Training, validation and test images ``(n, 3, 32, 32)`` with labels; digits are enlarged and repeated.

    Channels are last in memory, which makes small convolutions on a CPU a third faster.

    Args:
        name: Which images.
        data_dir: Folder with the files of CIFAR-10.
        download: Let torchvision fetch them into ``data_dir`` if they are missing.

    Raises:
        FileNotFoundError: The files of CIFAR-10 are not in ``data_dir``.
        ValueError: They are damaged.
        ImportError: The extra ``ghn[data]`` is not installed.
    """
    return Splits(
        *(Part(_fitted(part.images), part.labels) for part in load_dataset(name, data_dir, download=download))
    )


def _fitted(images: Tensor) -> Tensor:
    if images.shape[1:] != (3, 32, 32):
        images = F.interpolate(images, (32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    return images.contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``(n, c, h, w)``, each shifted by up to 4 pixels on a black ground, half of them mirrored."""
    n, _, height, width = images.shape
    dy, dx = torch.randint(9, (2, n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    rows = torch.arange(height) + dy
    columns = torch.arange(width) + dx
    columns = torch.where(flip, columns.flip(1), columns)
    rows, columns = rows[:, :, None].to(images.device), columns[:, None, :].to(images.device)
    which = torch.arange(n, device=images.device)[:, None, None]
    return F.pad(images, (4, 4, 4, 4))[which, :, rows, columns].movedim(-1, 1)
