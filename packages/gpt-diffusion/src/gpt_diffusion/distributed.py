"""Training on several devices or machines under ``torchrun``: who takes which part of a batch, and how they agree.

Everything random is drawn for the whole batch and cut, so that a sample sees the same noise, step and permutation
however many processes there are.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

Parallel = Literal["ddp", "fsdp"]


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

    def rows(self, size: int) -> slice:
        """The part of a batch of ``size`` samples that is this process's.

        Raises:
            ValueError: The batch cannot be divided evenly.
        """
        if size % self.world:
            raise ValueError(f"train.mb_size ({size}) must be a multiple of the number of processes ({self.world})")
        part = size // self.world
        return slice(self.rank * part, (self.rank + 1) * part)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over all processes."""
        if self.world == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.world

    def collect(self, rows: Tensor) -> Tensor:
        """The first row of each process, then the second of each, and so on; as many from each."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all get the same answer."""
        if self.world == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()

    def wrap(self, model: nn.Module, parallel: Parallel) -> nn.Module:
        """The model to call in training; ``fsdp`` shards the parameters of ``model`` itself."""
        if self.world == 1:
            return model
        if parallel == "fsdp":
            shard(model)
            return model
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device] if self.device.type == "cuda" else None, broadcast_buffers=False
        )


def shard(model: nn.Module) -> None:
    """Divide the parameters of a model among the processes, transformer block by block, then the rest."""
    stacks = [getattr(module, "blocks", None) for module in model.modules()]
    for block in (block for blocks in stacks if isinstance(blocks, nn.ModuleList) for block in blocks):
        fully_shard(block)
    fully_shard(model)


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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), world, device)
    finally:
        dist.destroy_process_group()


def synchronized(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Whether gradients are averaged over the processes: in the last part of an accumulated batch only."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not now:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    return nullcontext()


def gather(model: nn.Module, optimizer: Optimizer | None, plain: nn.Module, plain_optimizer: Optimizer | None) -> None:
    """Copy a sharded model, and its optimizer's state, into plain ones of the first process; all must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    state = get_optimizer_state_dict(model, optimizer, options=options) if optimizer is not None else {}
    if weights:
        plain.load_state_dict(weights)
        if plain_optimizer is not None:
            set_optimizer_state_dict(plain, plain_optimizer, state)


def whole(model: nn.Module, plain: nn.Module) -> nn.Module:
    """A plain model with the weights of a sharded one, in every process."""
    plain.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return plain


def scatter(model: nn.Module, optimizer: Optimizer | None, plain: nn.Module, plain_optimizer: Optimizer | None) -> None:
    """Copy a plain model, and its optimizer's state, into sharded ones; every process has the plain ones."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, plain.state_dict(), options=options)
    if optimizer is not None and plain_optimizer is not None:
        set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(plain, plain_optimizer), options=options)
