"""How good one prompted step is with fewer denoising steps: the same model, from 1,000 DDPM steps down to two.

    uv run packages/gpt-diffusion/benchmarks/steps.py RUN [RUN ...] [--networks 64] [--data-dir DIR] [--json]

Every RUN is the folder of a finished training (diffusion or flow). Starts are the initialisations of unseen runs of its
zoo; the metric is that of the task after one step, prompted with the task's best, as a mean with a 95 % interval by
bootstrap over the networks. ``inside`` says whether the mean lies in the interval of the first row.
"""

import argparse
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

SAMPLERS = {
    "diffusion": [("ddpm", 1000), ("ddim", 1000), *(("ddim", steps) for steps in (200, 50, 20, 10, 5, 2))],
    "flow": [("ddpm", steps) for steps in (1000, 200, 50, 20, 10, 5, 2)],
}


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean by 10,000 bootstrap samples."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(10_000, len(values)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def rows(folder: Path, networks: int, data_dir: Path | None) -> list[dict[str, object]]:
    """One row for each sampler."""
    pretrained = load_pretrained(folder)
    task = get_task(pretrained.config.dataset.name, data_dir)
    zoo = Zoo.open(pretrained.config.dataset.path)
    runs = zoo.split("test")[:networks]
    starts = zoo.params.gather(runs, np.zeros_like(runs))
    measure = batched_metric(task, pretrained.device)
    before, found = measure(starts), []
    objective = pretrained.config.train.objective
    for sampler, steps in SAMPLERS[objective]:
        sampling = replace(pretrained.config.sampling, sampler=sampler, steps=steps)
        model = replace(pretrained, config=replace(pretrained.config, sampling=sampling))
        began = time.perf_counter()
        samples = model.sample(starts, prompt=task.best_prompt, start_metric=before)
        seconds = time.perf_counter() - began
        values = measure(samples).double().cpu().numpy()
        low, high = interval(values)
        name = "euler" if objective == "flow" else sampler
        first = found[0] if found else {"low": low, "high": high}
        inside = bool(first["low"] <= values.mean() <= first["high"])
        row = {"run": folder.name, "sampler": name, "steps": steps, "mean": values.mean(), "low": low, "high": high}
        found.append(row | {"inside": inside, "seconds": seconds, "start": before.mean().item()})
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--networks", type=int, default=64)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    table = [row for folder in options.runs for row in rows(folder, options.networks, options.data_dir)]
    if options.json:
        print(json.dumps(table))
        return
    for row in table:
        print(
            f"{row['run']:16} {row['sampler']:6} {row['steps']:5}  {row['mean']:.4f} "
            f"[{row['low']:.4f}, {row['high']:.4f}]  {'inside' if row['inside'] else 'outside':8} {row['seconds']:7.2f} s"
        )


if __name__ == "__main__":
    main()
