"""Seconds to tell whether samples are copies: a zoo of 50,000 checkpoints of MNIST MLPs (784-10-10).

The checkpoints are synthetic: each run is a line from an initialisation to twice its size elsewhere, with noise, which
is what the search sees of a training; unlike real ones they have no dead units. The time is that of the whole report,
calibration on 64 unseen networks included; metrics and mistakes are measured on as many random images as MNIST has.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gpt_diffusion.trust import novelty_report
from zoo_common.layout import ParameterLayout
from zoo_common.tasks import Task, get_task
from zoo_common.zoo import Run, Zoo


def synthetic_zoo(path: Path, task: Task, runs: int, checkpoints: int, seed: int) -> Zoo:
    """Runs of a fixed size, in shards of 16."""
    network = task.constructor()
    layout = ParameterLayout.from_module(network)
    scale = layout.flatten({k: torch.full_like(v, v.std()) for k, v in network.state_dict().items()})
    zoo = Zoo.create(path, layout=layout, task="mnist", split=(0.8, 0.1, 0.1))
    generator = torch.Generator().manual_seed(seed)
    progress = torch.linspace(0, 1, checkpoints)[:, None]
    for first in range(0, runs, 16):
        members = []
        for run in range(first, min(first + 16, runs)):
            start, end = scale * torch.randn(2, layout.size, generator=generator)
            noise = 0.05 * scale * torch.randn(checkpoints, layout.size, generator=generator)
            loss = 2.3 - 2.1 * progress[:, 0].double().numpy()
            members.append(
                Run(
                    id=f"run-{run:05d}",
                    params=start * (1 - progress) + 2 * end * progress + noise,
                    steps=np.arange(checkpoints),
                    metrics={task.metric_name: loss},
                )
            )
        zoo.append(members)
    return zoo


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=50_000, help="training checkpoints")
    parser.add_argument("--per-run", type=int, default=200)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.images, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (options.images,), generator=generator)
    task = replace(get_task("mnist_loss"), data_fn=lambda: (images, labels))
    with tempfile.TemporaryDirectory() as folder:
        runs = max(4, round(options.checkpoints / options.per_run / 0.75))  # the split is drawn: some more than 1 / 0.8
        zoo = synthetic_zoo(Path(folder) / "zoo", task, runs, options.per_run, seed=0)
        train = zoo.split("train")
        copies = zoo.params.gather(train[:2], [1, -1])
        new = torch.randn(max(0, options.samples - 2), zoo.layout.size, generator=generator) * copies.std()
        samples = torch.cat([task.symmetry().permute(copies, generator), new])
        began = time.perf_counter()
        report = novelty_report(samples, zoo, task)
        seconds = time.perf_counter() - began
    result = {
        "training_checkpoints": report.training_checkpoints,
        "samples": len(samples),
        "unseen_networks": report.calibration.networks,
        "threads": options.threads,
        "copies_found": report.counts["copy"],
        "seconds": seconds,
    }
    print(
        f"{len(samples)} samples, {report.training_checkpoints:,} checkpoints, {options.threads} threads: {seconds:.1f} s"
    )
    print(report.verdict)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
