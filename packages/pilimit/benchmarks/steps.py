"""CPU seconds per training step of one infinite layer (forward, backward, append) against two plain implementations.

    OMP_NUM_THREADS=1 python packages/pilimit/benchmarks/steps.py
    python packages/pilimit/benchmarks/steps.py --device cuda --dtype float16 --ranks 400 --atoms 1000000

The implementations take turns within each round, so noise of the machine meets all of them; a ratio is the median over
the rounds of the ratios within a round. Small layers make several steps in a turn, as a training does. ``read_gb_s`` is
the bandwidth of a sum over A and B, and ``over_floor`` the time of a step over that of reading both twice.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from pilimit import InfPiLinearReLU, PiSGD
from plain import Concatenating, Preallocated
from torch.nn import functional as F
from tqdm import tqdm

LR, DECAY = 1e-6, 1e-5
WARM_UP = 2
"""Rounds that do not count."""


def steps_of(
    r: int, atoms: int, batch: int, device: str, dtype: torch.dtype, rounds: int
) -> dict[str, Callable[[], None]]:
    """A function per implementation that makes one training step; all start from the same state."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"device": device, "dtype": dtype, "generator": generator}
    a, b = torch.randn(atoms, r, **options), F.normalize(torch.randn(atoms, r, **options))
    amult = torch.full((atoms,), 1e-3, device=device, dtype=dtype)
    g, d = torch.randn(batch, r, **options), torch.randn(batch, r, **options)
    layer = InfPiLinearReLU(r, bias_alpha=0, device=device, dtype=dtype, initial_atoms=0)
    layer.atoms.append(a, b, amult)
    optimizer = PiSGD(layer.parameters(), LR, weight_decay=DECAY / LR)
    leaf = g.clone().requires_grad_()

    def ours() -> None:
        optimizer.zero_grad()
        leaf.grad = None
        y = layer(leaf)
        y.backward(d.to(y.dtype))
        optimizer.step()

    def plain(reference: Concatenating | Preallocated) -> Callable[[], None]:
        def step() -> None:
            reference.forward(g)
            reference.backward(d)
            reference.step(LR, DECAY)

        return step

    preallocated = plain(Preallocated(a, b, amult, batch * steps_in_turn(atoms) * (rounds + WARM_UP)))
    return {"ours": ours, "preallocated": preallocated, "concatenating": plain(Concatenating(a, b, amult))}


def steps_in_turn(atoms: int) -> int:
    """So many that code and data of the last turn, of another implementation, do not count."""
    return min(8, max(1, 100_000 // atoms))


def seconds(step: Callable[[], object], device: str, calls: int = 1) -> float:
    """Of one call: CPU seconds of this process, or on a GPU those of the clock."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    for _ in range(calls):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / calls


def measure(r: int, atoms: int, options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds and ratios for one size."""
    steps = steps_of(r, atoms, options.batch, options.device, getattr(torch, options.dtype), options.rounds)
    if atoms > options.concatenate_at_most:
        del steps["concatenating"]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds + WARM_UP):
        for name, step in steps.items():
            times[name].append(seconds(step, options.device, steps_in_turn(atoms)))
    times = {name: values[WARM_UP:] for name, values in times.items()}
    result = {"r": r, "atoms": atoms}
    for name, values in times.items():
        result[f"{name}_ms"] = round(1e3 * statistics.median(values), 3)
    for name in set(steps) - {"ours"}:
        ratios = [theirs / own for theirs, own in zip(times[name], times["ours"], strict=True)]
        result[f"{name}_over_ours"] = round(statistics.median(ratios), 3)
    payload = torch.ones(2 * atoms, r, device=options.device, dtype=getattr(torch, options.dtype))
    read = min(seconds(payload.sum, options.device) for _ in range(10))
    floor = {"state_mb": payload.nbytes / 1e6, "read_gb_s": payload.nbytes / read / 1e9}
    return result | floor | {"over_floor": result["ours_ms"] / (2e3 * read)}


def main() -> None:
    """Print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--atoms", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32", "float64"], default="float32")
    parser.add_argument("--concatenate-at-most", type=int, default=100_000, help="above, it is left out")
    parser.add_argument("--json", action="store_true", help="one line")
    options = parser.parse_args()
    sizes = [(r, atoms) for r in options.ranks for atoms in options.atoms]
    rows = [measure(r, atoms, options) for r, atoms in tqdm(sizes)]
    result = {"threads": torch.get_num_threads(), "torch": torch.__version__, "batch": options.batch, "steps": rows}
    print(json.dumps(result, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
