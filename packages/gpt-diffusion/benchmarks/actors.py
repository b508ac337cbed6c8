"""Speed of training cart-pole actors at once against one after the other, in iterations of PPO per second, all together.

    uv run packages/gpt-diffusion/benchmarks/actors.py [--actors N] [--envs N] [--device cpu|cuda] [--threads N] [--json]

Both ways run the same code, on one actor or on all. Every figure is the median of rounds in turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch
from gpt_diffusion.cartpole.ppo import PpoConfig
from gpt_diffusion.cartpole.training import train_actors


def rate(seeds: Sequence[int], config: PpoConfig, device: str) -> float:
    """Iterations per second of actors with these seeds, together."""
    saves = torch.tensor([[0, config.iterations]]).expand(len(seeds), -1)
    began = time.perf_counter()
    train_actors(seeds, saves, config, torch.Generator(device).manual_seed(0))  # returns tensors of the CPU: done
    return len(seeds) * config.iterations / (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, default=32)
    parser.add_argument("--envs", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = PpoConfig(envs=args.envs, iterations=args.iterations)
    groups = {"at once": range(args.actors), "one": range(1)}
    figures: dict[str, list[float]] = {name: [] for name in groups}
    for round_ in range(args.rounds + 1):
        for name, seeds in groups.items():
            found = rate(seeds, config, args.device)
            figures[name] += [found] if round_ else []  # the first one warms up
    result = {name: statistics.median(rows) for name, rows in figures.items()}
    result["ratio"] = result["at once"] / result["one"]
    result["environment steps per second"] = result["at once"] * config.envs * config.steps
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name}: {value:,.1f}")


if __name__ == "__main__":
    main()
