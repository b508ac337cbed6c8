"""Many networks of one architecture at once: judged, conditioned (batch norms) and fine-tuned.

Shapes: ``n`` networks of ``d`` numbers, ``b`` images, ``c`` classes.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from zoo_common.datasets import Part, Splits
from zoo_common.layout import ParameterLayout
from zoo_common.population import Population

from sane.progress import track

_TOGETHER = 64
"""Networks that are conditioned or fine-tuned at once, at most."""
_NUMBERS = 2**29
"""Weights, gradients and intermediate values of what is computed at once, at most (2 GiB)."""


class Conditioned(NamedTuple):
    """Networks whose batch norms have seen data."""

    vectors: Tensor
    """(n, d), with new running statistics."""
    buffers: dict[str, Tensor]
    """What is kept beside the vector: the number of batches seen."""


@dataclass(frozen=True)
class FineTuning:
    """How networks are trained on: the same data order for all of them."""

    epochs: int = 1
    batch: int = 64
    lr: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0
    limit: int | None = None
    """Use at most this many training images."""
    schedule: Literal["constant", "onecycle"] = "constant"
    """onecycle: over all steps, as the published zoos were trained."""


class Networks:
    """Computes n networks of one architecture at once."""

    def __init__(self, module: nn.Module) -> None:
        """Take the architecture of ``module``."""
        self.layout = ParameterLayout.from_module(module)
        self.population = Population(module)
        self.buffers = self.layout.buffers_of(module)
        self.has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
        self._module = copy.deepcopy(module).train()
        statistics = {name for name, _ in module.named_buffers()}
        self._running = [name for name in self.layout.names if name in statistics]

    def accuracy(self, vectors: Tensor, part: Part) -> Tensor:
        """Accuracy (n,) of every network in evaluation mode; 0 where the outputs are not finite."""
        found = [
            self.population.metrics(block, part.images, part.labels)
            for block in track(vectors.split(self._together(part.images[:1])), "judge")
        ]
        return torch.cat([torch.where(metrics.loss.isfinite(), metrics.accuracy, 0.0) for metrics in found])

    def ensemble_accuracy(self, vectors: Tensor, part: Part, batch: int = 256) -> float:
        """Accuracy of the mean logits of all networks, in evaluation mode and fixed order; not finite ones are wrong."""
        right, blocks = 0, vectors.split(self._together(part.images[:batch]))
        with torch.no_grad():
            for x, y in zip(part.images.split(batch), part.labels.split(batch), strict=True):
                logits = torch.stack([self.population(block, x).sum(0) for block in blocks]).sum(0)
                right += int(((logits.argmax(1) == y) & logits.isfinite().all(1)).sum())
        return right / len(part.labels)

    def train_forward(self, vectors: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, b, c) in training mode, and the running statistics (n, r) that the batch leaves behind.

        Args:
            vectors: (n, d); gradients flow to all but the running statistics.
            x: Images (b, ...) that all networks see.
        """

        def forward(vector: Tensor) -> tuple[Tensor, Tensor]:
            state = self.layout.unflatten(vector, {name: b.clone() for name, b in self.buffers.items()})
            for name in self._running:
                state[name] = state[name].detach().clone()
            output: Tensor = functional_call(self._module, state, (x,))
            left = [state[name].flatten() for name in self._running]
            return output, torch.cat(left) if left else vector[:0].detach()

        outputs: tuple[Tensor, Tensor] = vmap(forward, randomness="different")(vectors)
        return outputs

    def condition(self, vectors: Tensor, batches: Iterable[Tensor]) -> Conditioned:
        """Let the batch norms see data in training mode, without gradients; weights stay as they are.

        Args:
            vectors: (n, d).
            batches: Images (b, ...), one batch after the other.
        """
        vectors, count = vectors.clone(), 0
        with torch.no_grad():
            for x in track(batches, "condition"):
                count += 1
                for part in vectors.split(self._together(x)):
                    self.keep_statistics(part, self.train_forward(part, x)[1])
        buffers = {name: b + count if name.endswith("num_batches_tracked") else b for name, b in self.buffers.items()}
        return Conditioned(vectors, buffers)

    def finetune(
        self,
        vectors: Tensor,
        part: Part,
        config: FineTuning,
        *,
        seed: int = 0,
        after_epoch: Callable[[int, Tensor], object] | None = None,
    ) -> Tensor:
        """Train every network on, all with the same data order; returns vectors (n, d).

        Args:
            vectors: (n, d).
            part: Training images.
            config: How.
            seed: Draws the order.
            after_epoch: Called with (epoch, vectors) after each; the networks of one block at a time.
        """
        blocks = vectors.split(self._together(part.images[: config.batch]))
        return torch.cat([self._finetune(x, part, config, seed, after_epoch) for x in track(blocks, "fine-tune")])

    def finetune_judged(
        self, vectors: Tensor, splits: Splits, config: FineTuning, *, seed: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Fine-tune on training images; vectors (n, d), and accuracies (epochs + 1, n) on ``validation`` and ``test``.

        Args:
            vectors: (n, d).
            splits: Images.
            config: How.
            seed: Draws the order.
        """
        parts = {"validation": splits.validation, "test": splits.test}
        rows: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(config.epochs + 1)] for name in parts}

        def judge(epoch: int, block: Tensor) -> None:
            for name, part in parts.items():
                rows[name][epoch + 1].append(self.accuracy(block, part))

        judge(-1, vectors)
        trained = self.finetune(vectors, splits.train, config, seed=seed, after_epoch=judge)
        return trained, {name: torch.stack([torch.cat(blocks) for blocks in found]) for name, found in rows.items()}

    def _together(self, x: Tensor) -> int:
        """How many networks are computed at once on a batch (b, ...), by the size of weights and intermediate values."""
        sizes: list[int] = []
        module = copy.deepcopy(self._module).to("meta").eval()
        for part in module.modules():
            part.register_forward_hook(lambda _m, _x, y: sizes.append(y.numel() if isinstance(y, Tensor) else 0))
        module(torch.empty_like(x[:1], device="meta"))
        numbers = 5 * self.layout.size + 2 * sum(sizes) * len(x)
        return max(1, min(_TOGETHER, _NUMBERS // numbers))

    def _finetune(
        self,
        vectors: Tensor,
        part: Part,
        config: FineTuning,
        seed: int,
        after_epoch: Callable[[int, Tensor], object] | None,
    ) -> Tensor:
        weights = vectors.clone().requires_grad_()
        optimizer: torch.optim.Optimizer = (
            torch.optim.Adam([weights], lr=config.lr, weight_decay=config.weight_decay)
            if config.optimizer == "adam"
            else torch.optim.SGD([weights], lr=config.lr, weight_decay=config.weight_decay, momentum=0.9)
        )
        images, labels = part.images[: config.limit], part.labels[: config.limit]
        per_epoch = max(1, len(images) // config.batch)
        schedule = None
        if config.schedule == "onecycle" and config.epochs:
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=config.lr, total_steps=max(2, config.epochs * per_epoch)
            )
        generator = torch.Generator().manual_seed(seed)
        for step in track(range(config.epochs * per_epoch), "fine-tune"):
            epoch, k = divmod(step, per_epoch)
            if k == 0:
                order = torch.randperm(len(images), generator=generator).to(images.device)
            rows = order[k * config.batch : (k + 1) * config.batch]
            logits, running = self.train_forward(weights, images[rows])
            loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].repeat(len(weights)), reduction="none")
            optimizer.zero_grad(set_to_none=True)
            (loss.sum() / len(rows)).backward()  # each network has its own mean
            optimizer.step()
            if schedule is not None and schedule.last_epoch + 1 < schedule.total_steps:
                schedule.step()
            self.keep_statistics(weights.detach(), running)
            if k + 1 == per_epoch and after_epoch is not None:
                after_epoch(epoch, weights.detach())
        return weights.detach()

    def keep_statistics(self, vectors: Tensor, running: Tensor) -> None:
        """Write running statistics (n, r) into vectors, in place."""
        start = 0
        for name in self._running:
            span = self.layout.slices[name]
            size = span.stop - span.start
            vectors[:, span] = running[:, start : start + size].detach()
            start += size


def image_batches(part: Part, batch: int, count: int, seed: int) -> Iterator[Tensor]:
    """``count`` batches of images, shuffled; begins anew when all have been seen."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(part.images), generator=generator)
    for k in range(count):
        rows = torch.arange(k * batch, (k + 1) * batch) % len(order)
        yield part.images[order[rows].to(part.images.device)]
