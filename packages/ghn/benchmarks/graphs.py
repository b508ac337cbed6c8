"""Time of graph construction with its batch, against a real forward pass, an autograd walk and networkx, in one run.

    uv run packages/ghn/benchmarks/graphs.py [--models resnet50,vit_b_16] [--rounds N] [--giants] [--json]

Default: the classification models of torchvision but the two giants, vit_h_14 and regnet_y_128gf, whose real forward
pass takes long; --giants traces these with ours alone and prints the memory that it takes. Both ways run in turns on
the same initialised model with one thread; every figure is the median of the rounds, after one that warms up.
"""

import argparse
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from ghn import Graph, GraphBatch, resolve_model
from plain_graphs import PlainGraph
from torch import nn
from torchvision.models import list_models

GIANTS = ("vit_h_14", "regnet_y_128gf")


def seconds(work: Callable[[], object]) -> float:
    """Duration of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ours(model: nn.Module) -> object:
    """Our graph, and its dense batch."""
    return GraphBatch([Graph(model)], dense=True).edges


def measure(name: str, rounds: int) -> dict[str, float]:
    """Median times of both ways on one model."""
    model = resolve_model(name)
    ours(model)
    plain, fast = [], []
    for _ in range(rounds):
        plain.append(seconds(lambda: PlainGraph(model)))
        fast.append(seconds(lambda: ours(model)))
    result = {"plain": statistics.median(plain), "ours": statistics.median(fast)}
    return {**result, "ratio": result["plain"] / result["ours"]}


def peak() -> float:
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)


def measure_giant(name: str) -> dict[str, float]:
    """Time, and memory above that of the model, of ours alone."""
    model = resolve_model(name, meta=True)
    before = peak()
    return {"ours": seconds(lambda: ours(model)), "megabytes": peak() - before}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="names, with commas between")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--giants", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = [name for name in list_models(module=sys.modules["torchvision.models"]) if name not in GIANTS]
    names = args.models.split(",") if args.models else [] if args.giants else known
    ours(resolve_model("resnet18"))
    result: dict[str, dict[str, float]] = {}
    for name in [*(GIANTS if args.giants else ()), *names]:
        result[name] = measure_giant(name) if name in GIANTS else measure(name, args.rounds)
        if not args.json:
            print(name, ", ".join(f"{key} {value:.3g}" for key, value in result[name].items()), flush=True)
    ratios = [found["ratio"] for found in result.values() if "ratio" in found]
    mean = math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None
    if args.json:
        print(json.dumps({"models": result, "geometric mean": mean}))
    elif mean:
        print(f"geometric mean of {len(ratios)} models: {mean:.1f}")


if __name__ == "__main__":
    main()
