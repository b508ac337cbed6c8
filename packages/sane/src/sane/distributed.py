"""Training on several devices or machines under ``torchrun``: who takes which windows, and how the processes agree."""

import datetime
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """The processes of one training; a single one without ``torchrun``."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    def windows(self, batch: int, accumulate: int) -> np.ndarray:
        """Which windows of a batch are this process's: in each of the accumulated parts, its own part."""
        return np.arange(batch).reshape(accumulate, self.world, -1)[:, self.rank].ravel()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call in training: gradients of all processes are averaged while they are computed."""
        if self.world == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def averaged(self, model: nn.Module, now: bool) -> AbstractContextManager[None]:
        """Whether gradients are averaged over the processes: in the last part of an accumulated batch only."""
        return nullcontext() if now or self.world == 1 else model.no_sync()  # type: ignore[operator]

    def rows_of_all(self, z: Tensor) -> Tensor:
        """Rows of all processes; the gradient is so large that its mean over them is that of one with all rows."""
        if self.world == 1:
            return z
        parts = [torch.empty_like(z) for _ in range(self.world)]
        dist.all_gather(parts, z.detach().contiguous())
        parts[self.rank] = z.detach() + self.world * (z - z.detach())
        return torch.cat(parts)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over all processes."""
        if self.world == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.world

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.world == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` has started, and leave them at the end."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    waits = datetime.timedelta(days=1)  # for the judgements of the first process
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=waits)
    try:
        yield Processes(dist.get_rank(), world, device)
    finally:
        dist.destroy_process_group()
