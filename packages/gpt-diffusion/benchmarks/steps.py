"""How good one prompted step is with fewer denoising steps: the same model, from 1,000 DDPM steps down to two.

    uv run packages/gpt-diffusion/benchmarks/steps.py RUN [RUN ...] [--networks 64] [--task NAME] [--data-dir DIR] [--json]

Every RUN is the folder of a finished training (diffusion or flow). Starts are the initialisations of unseen runs of its
zoo; the metric is that of the task after one step, prompted with the task's best, as a mean with a 95 % interval by
bootstrap over the networks. ``inside`` says whether the mean lies in the interval of the first row.
"""

import argparse
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gpt_diffusion import load_pretrained
from gpt_diffusion.evaluation import batched_metric
from zoo_common.tasks import get_task
from zoo_common.zoo import Zoo

STEPS = [1000, 200, 50, 20, 10, 5, 2]


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean by 10,000 bootstrap samples."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(10_000, len(values)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def rows(
    folder: Path, networks: int, counts: list[int], name: str | None, data_dir: Path | None
) -> dict[str, dict[str, object]]:
    """One row for each sampler, by its name and number of steps."""
    pretrained = load_pretrained(folder)
    task = get_task(name or pretrained.config.dataset.name, data_dir)
    zoo = Zoo.open(pretrained.config.dataset.path)
    runs = zoo.split("test")[:networks]
    starts = zoo.params.gather(runs, np.zeros_like(runs))
    measure = batched_metric(task, pretrained.device)
    before = measure(starts)
    flow = pretrained.config.train.objective == "flow"
    found: dict[str, dict[str, object]] = {}
    samplers = ["ddim"] if flow else ["ddim", "dpm++"]
    for sampler, steps in [*([] if flow else [("ddpm", counts[0])]), *itertools.product(samplers, counts)]:
        sampling = replace(pretrained.config.sampling, sampler=sampler, steps=steps)
        model = replace(pretrained, config=replace(pretrained.config, sampling=sampling))
        began = time.perf_counter()
        samples = model.sample(starts, prompt=task.best_prompt, start_metric=before)
        seconds = time.perf_counter() - began
        values = measure(samples).double().cpu().numpy()
        low, high = interval(values)
        row = {"mean": values.mean(), "low": low, "high": high, "seconds": seconds, "start": before.mean().item()}
        first = next(iter(found.values()), row)
        row["inside"] = str(first["low"] <= values.mean() <= first["high"])
        found[f"{'euler' if flow else sampler} {steps}"] = row
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--networks", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="numbers of steps, the reference first")
    parser.add_argument("--task", help="what the networks are judged by; default: the task of the run")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    table = {
        folder.name: rows(folder, options.networks, options.steps, options.task, options.data_dir)
        for folder in options.runs
    }
    if options.json:
        print(json.dumps(table))
        return
    for run, found in table.items():
        for name, row in found.items():
            print(
                f"{run:16} {name:12} {row['mean']:.4f} [{row['low']:.4f}, {row['high']:.4f}]  inside: {row['inside']:6}"
                f"{row['seconds']:7.2f} s"
            )


if __name__ == "__main__":
    main()
