"""Loss and accuracy."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from pilimit.config import TrainConfig


def evaluate(
    net: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, config: TrainConfig, *, quiet: bool = True
) -> tuple[float, float]:
    """Mean loss and accuracy; with a progress bar unless it is quiet."""
    loss, correct = 0.0, 0
    with torch.no_grad():
        size = config.test_batch_size
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        for x, y in tqdm(parts, desc="eval", disable=quiet, leave=False):
            output = net(x)
            loss += float(plain_loss(output, y, config.loss)) * len(y)
            correct += int((output.argmax(1) == y).sum())
    return loss / len(labels), correct / len(labels)


def plain_loss(output: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Mean cross-entropy, or mean square distance from one-hot minus 0.1."""
    output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    if kind == "xent":
        return F.cross_entropy(output, labels)
    return F.mse_loss(output, F.one_hot(labels, output.shape[1]).to(output) - 0.1)
