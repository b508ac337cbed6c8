"""Peak memory of training steps of one infinite layer, over that of its atoms.

    OMP_NUM_THREADS=1 python packages/pilimit/benchmarks/memory.py
    python packages/pilimit/benchmarks/memory.py --device cuda --dtype float16

``peak_mb`` is what the process (on a GPU: the allocator) took at most since before the layer was made; ``limit_mb`` is
the payload, two blocks and one chunk of temporaries. A block more than the payload is room for the next atoms, the other
holds what the backward pass finds again; temporaries are rows of the batch times a chunk of atoms.
"""

import argparse
import json
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from pilimit import InfPiLinearReLU, PiSGD
from pilimit.expectations import wide
from pilimit.propagation import PANEL, chunk
from tqdm import tqdm

APPENDED = 1024
"""Atoms at once while the layer is filled."""
STEPS = 10


def used(device: str) -> int:
    """Bytes now: resident ones of this process, or those that tensors have on the GPU."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(device: str) -> int:
    """Bytes at most, since the process began or, on a GPU, since the last reset."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fill(layer: InfPiLinearReLU, atoms: int) -> None:
    """Append random atoms, all from the same room: new tensors for each part would leave the heap in pieces."""
    rows = torch.empty(2, min(APPENDED, atoms), layer.n_in, device=layer.weight.device)
    for start in range(0, atoms, APPENDED):
        part = rows[:, : atoms - start].normal_()
        part[1] /= part[1].norm(dim=1, keepdim=True)
        layer.atoms.append(*part, 1e-3)


def train(layer: InfPiLinearReLU, batch: int) -> None:
    """Some steps."""
    optimizer = PiSGD(layer.parameters(), 1e-6, weight_decay=1e-5)
    g = torch.randn(batch, layer.n_in, device=layer.weight.device, requires_grad=True)
    for _ in range(STEPS):
        optimizer.zero_grad()
        layer(g).sum().backward()
        optimizer.step()


def measure(r: int, atoms: int, options: argparse.Namespace) -> dict[str, float]:
    """Megabytes, and whether they are within the limit."""
    dtype, device = getattr(torch, options.dtype), options.device
    train(InfPiLinearReLU(r, bias_alpha=0, device=device, dtype=dtype), options.batch)  # libraries take their room
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = used(device)
    layer = InfPiLinearReLU(r, bias_alpha=0, device=device, dtype=dtype, initial_atoms=0)
    fill(layer, atoms)
    train(layer, options.batch)
    taken, state = peak(device) - before, layer.atoms
    payload, block = len(state) * state.bytes_per_atom, state.block_size * state.bytes_per_atom
    temporaries = 3 * options.batch * chunk(state, options.batch) + (PANEL if dtype != wide(dtype) else 0)
    chunk_bytes = temporaries * wide(dtype).itemsize
    limit = payload + 2 * block + chunk_bytes
    return {
        "r": r, "atoms": len(state), "payload_mb": payload / 1e6, "block_mb": block / 1e6, "chunk_mb": chunk_bytes / 1e6,
        "peak_mb": taken / 1e6, "limit_mb": limit / 1e6, "within": taken <= limit,
    }  # fmt: skip


def main() -> None:
    """Print a JSON object; each size has a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--atoms", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32", "float64"], default="float32")
    parser.add_argument("--json", action="store_true", help="one line")
    options = parser.parse_args()
    rows, sizes = [], [(r, atoms) for r in options.ranks for atoms in options.atoms]
    for r, atoms in tqdm(sizes):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(measure, r, atoms, options).result())
    result = {"device": options.device, "dtype": options.dtype, "layers": rows}
    print(json.dumps(result, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
