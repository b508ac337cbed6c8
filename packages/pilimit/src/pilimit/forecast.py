"""What a training of an infinite net will need, told before it begins."""

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from pilimit.config import TrainConfig
from pilimit.infinite import InfMLP
from pilimit.recompression import reduce_atoms

_PROBE = 16_384
"""Atoms of the net that is timed, at most."""


@dataclass(frozen=True)
class Forecast:
    """Atoms, memory and time to come."""

    step: int
    steps: int
    atoms: int
    """Per layer, at the end or at most."""
    gb: float
    """Of all atoms at that number, in whole blocks."""
    base_seconds: float
    """Of a step without atoms."""
    seconds_per_atom: float
    seconds_at_end: float
    """Of the last step, or with bounded atoms of one with the most, its share of the recompression included."""
    total_seconds: float

    def seconds(self, atoms: int) -> float:
        """Of a step with so many atoms per layer, recompression left out."""
        return self.base_seconds + self.seconds_per_atom * atoms

    def text(self) -> str:
        """One line."""
        return (
            f"forecast: {self.steps - self.step:,} steps, {self.atoms:,} atoms per layer, {self.gb:.2f} GB, "
            f"{1e3 * self.seconds(0):.1f} ms per step at first, {1e3 * self.seconds_at_end:.1f} ms at the end, "
            f"{self.total_seconds / 60:.1f} minutes"
        )


def atoms_bytes(net: nn.Module) -> int:
    """Bytes of the atoms of a net, in whole blocks; 0 for a finite one."""
    layers = net.infinite_layers() if isinstance(net, InfMLP) else []
    return sum(layer.atoms.bytes_per_atom * sum(len(b.A) for b in layer.atoms.blocks) for layer in layers)


def bytes_of(net: InfMLP, atoms: int) -> int:
    """Bytes of all layers with so many atoms each."""
    total = 0
    for layer in net.infinite_layers():
        blocks = -(-atoms // layer.atoms.block_size)
        total += blocks * layer.atoms.block_size * layer.atoms.bytes_per_atom
    return total


def forecast(net: InfMLP, config: TrainConfig, step: int, steps: int, appended: Callable[[int], int]) -> Forecast:
    """Time a few steps of a copy with few and with more atoms.

    Args:
        net: At the step ``step``; it stays as it is.
        config: Of the training.
        step: Where it begins.
        steps: Where it ends.
        appended: Step to the number of atoms that a layer gets before it.

    Raises:
        ValueError: Memory will run out; the message says when, and what to do.
    """

    def atoms(at: int) -> int:
        count = now + appended(at) - appended(step)
        return count if config.max_atoms is None else min(count, config.max_atoms)

    now, rows = max(len(layer.atoms) for layer in net.infinite_layers()), config.batch_size * config.accum_steps
    end = atoms(steps)
    if config.max_memory is not None and bytes_of(net, end) > 1e9 * config.max_memory:
        _refuse(net, config.max_memory, atoms, step, steps)
    few, many = min(now, 1024), min(max(end, 4096), _PROBE)
    probe = _probe(net, few)
    base = _time_step(probe, config)
    _fill(probe, many)
    slope = max(_time_step(probe, config) - base, 0.0) / (many - few)
    start, share, mean = max(base - slope * few, 0.0), 0.0, (now + end) / 2
    if end == config.max_atoms:
        mean = (config.kept + end) / 2
        if end <= _PROBE:
            began = time.perf_counter()
            reduce_atoms(probe, config.kept)
            share = (time.perf_counter() - began) * rows / (end - config.kept)
    last, total = start + slope * end + share, (start + slope * mean + share) * (steps - step)
    return Forecast(step, steps, end, bytes_of(net, end) / 1e9, start, slope, last, total)


def _refuse(net: InfMLP, limit: float, atoms: Callable[[int], int], step: int, steps: int) -> None:
    """Say at which step memory runs out."""
    first = bisect_left(range(step, steps + 1), True, key=lambda at: bytes_of(net, atoms(at)) > 1e9 * limit) + step
    fits = atoms(first - 1) if first > step else 0
    remedy = f"raise it, or bound them with --max-atoms {fits}" if fits else "raise it"
    raise ValueError(f"atoms will exceed --max-memory ({limit} GB) at step {first} of {steps}: {remedy}")


def _probe(net: InfMLP, atoms: int) -> InfMLP:
    """A net of the same shape with so many atoms per layer."""
    probe = InfMLP(**net.config | {"dtype": net.dtype}, device=net.layers[0].A.device, readout_zero_init=True)  # type: ignore[arg-type]
    for layer in probe.infinite_layers():
        layer.atoms.clear()
    _fill(probe, atoms)
    return probe


def _fill(net: InfMLP, atoms: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in net.infinite_layers():
        count = atoms - len(layer.atoms)
        a, b = (torch.randn(count, n, generator=generator) for n in (layer.n_out, layer.n_in))
        layer.atoms.append(a.to(layer.atoms.device), F.normalize(b).to(layer.atoms.device), 1e-3)


def _time_step(net: InfMLP, config: TrainConfig) -> float:
    """Seconds of forward and backward pass, the best of three."""
    x = torch.ones(config.batch_size, net.d_in, dtype=net.dtype, device=net.layers[0].A.device)  # type: ignore[arg-type]
    times = []
    for _ in range(3):
        began = time.perf_counter()
        net(x).float().sum().backward()
        net.zero_grad()
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times) * config.accum_steps
