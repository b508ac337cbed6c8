"""Images on which the networks of a zoo are judged and trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from zoo_common.datasets import Part, Splits, load_dataset
from zoo_common.tasks import get_task


def images_of(
    facts: Mapping[str, Any],
    shape: tuple[int, ...] | None,
    data: str | None = None,
    data_dir: Path | None = None,
    *,
    download: bool = False,
) -> Splits:
    """Images for the networks that the facts of a zoo or model name, in the shape of their inputs.

    A data set without a validation part of its own (MNIST, CIFAR-10) gives a tenth of its training images for that, so
    that nothing is selected on test images.

    Args:
        facts: Those of :func:`sane.preparation.facts_of`.
        shape: Of one input; None: as the data set has them.
        data: Data set, if the facts name none.
        data_dir: Folder with its files.
        download: Let torchvision fetch them into ``data_dir`` if they are missing.

    Raises:
        FileNotFoundError: The data are not there.
        ValueError: No data set is named.
    """
    name = data or facts.get("data")
    if name is not None:
        splits = load_dataset(name, data_dir, download=download)
    elif facts.get("task"):
        task = get_task(facts["task"], data_dir, download=download)
        if task.splits is None:
            raise ValueError(f"task {task.name!r} has no images: networks of it cannot be judged here")
        splits = task.splits()
    else:
        raise ValueError("on which data the networks of the zoo were trained is not known: say it with --data")
    if splits.validation.images is splits.test.images:
        cut = len(splits.train.images) * 9 // 10
        train, held = (Part(*(x[rows] for x in splits.train)) for rows in (slice(cut), slice(cut, None)))
        splits = Splits(train, held, splits.test)
    return Splits(*(shaped(part, shape) for part in splits))


def first_images(part: Part, limit: int | None) -> Part:
    """At most ``limit`` images of a part."""
    return Part(part.images[:limit], part.labels[:limit])


def shaped(part: Part, shape: tuple[int, ...] | None) -> Part:
    """The images in the shape of one input; grey ones are repeated for networks that take three channels.

    Raises:
        ValueError: They do not fit.
    """
    images = part.images
    if shape is None or tuple(images.shape[1:]) == tuple(shape):
        return part
    if len(shape) == 1 and images[0].numel() == shape[0]:
        return part._replace(images=images.flatten(1))
    if len(shape) == 3 and images.shape[1] in (1, shape[0]):
        images = images.expand(-1, shape[0], -1, -1)
        return part._replace(images=F.interpolate(images, size=shape[1:], mode="bilinear", align_corners=False))
    raise ValueError(f"images of shape {tuple(images.shape[1:])} do not fit networks with inputs {tuple(shape)}")
