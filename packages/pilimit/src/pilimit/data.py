"""The images of a training, and their augmentation."""

import torch
from torch import Tensor
from zoo_common.datasets import Splits, load_dataset

from pilimit.config import TrainConfig


def choose_data(config: TrainConfig) -> Splits:
    """The data set, cut to the subsets.

    Raises:
        FileNotFoundError: It is not in the folder.
        ValueError: There are fewer images than asked for.
    """
    try:
        splits = load_dataset(config.dataset.replace("-", "_"), config.data_root)
    except FileNotFoundError as error:
        problem = str(error).partition(";")[0]
        raise FileNotFoundError(f"{problem}; name the folder that holds its files with --data-root") from None
    train, test = splits.train, splits.test
    parts = []
    for part, size, name in ((train, config.train_subset_size, "train"), (test, config.test_subset_size, "test")):
        if size is not None and size > len(part.labels):
            raise ValueError(f"--{name}-subset-size {size}: there are {len(part.labels)} images")
        parts.append(type(part)(part.images[:size], part.labels[:size]))
    return Splits(parts[0], splits.validation, parts[1])


def augment(x: Tensor, background: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images (b, c, h, w), then crop each at random after padding by 4 with the background (c,)."""
    b, c, h, w = x.shape
    flip = torch.rand(b, generator=generator) < 0.5
    top, left = (torch.randint(9, (b,), generator=generator).to(x.device) for _ in range(2))
    x = torch.where(flip.to(x.device)[:, None, None, None], x.flip(3), x)
    padded = background.view(1, c, 1, 1).expand(b, c, h + 8, w + 8).clone()
    padded[:, :, 4 : 4 + h, 4 : 4 + w] = x
    rows, columns = (start[:, None] + torch.arange(n, device=x.device) for start, n in ((top, h), (left, w)))
    return padded[torch.arange(b, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
