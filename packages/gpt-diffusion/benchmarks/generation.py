"""Speed of checkpoint generation against plain training, in model-steps per second, on the same threads.

    uv run packages/gpt-diffusion/benchmarks/generation.py [--data-dir DIR] [--threads N] [--json]

Two plain references are written out below: one MNIST MLP fed by a torchvision-style DataLoader (one PIL image,
``ToTensor`` and ``Normalize`` per item, loading in the main process), and one model trained on images in memory. Every
figure is the median of 5 rounds in turns; steps per second of CPU time stand beside it, because they say more on a busy
machine (published references of the original: 150 and 2,060 steps per CPU second on one thread).
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from gpt_diffusion.generation import supervised
from gpt_diffusion.generation.work import Request
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from zoo_common.datasets import Part, Splits
from zoo_common.tasks import Task, get_task

ROUNDS = 5


class Items(Dataset):
    """What torchvision's MNIST, ``ToTensor`` and ``Normalize`` do for every item, without their checks."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        """Take uint8 images (n, 28, 28) and labels (n,)."""
        self.images, self.labels = images, labels
        self.mean, self.std = torch.tensor([0.1307]).view(-1, 1, 1), torch.tensor([0.3081]).view(-1, 1, 1)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """One normalised image (1, 28, 28) and its label."""
        image = Image.fromarray(self.images[i].numpy())
        pixels = torch.from_numpy(np.array(image)).view(28, 28, 1).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255).sub_(self.mean).div_(self.std), int(self.labels[i])


def plain_optimizer(net: nn.Module) -> torch.optim.SGD:
    """The published optimizer."""
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def items_of(task: Task) -> Items:
    """The training images of MNIST as pixels."""
    images, labels = task.splits().train
    return Items(((images[:, 0] * 0.3081 + 0.1307) * 255).round().clamp(0, 255).to(torch.uint8), labels)


def with_loader(task: Task, items: Items, steps: int) -> int:
    """One model, fed by a DataLoader."""
    loader = DataLoader(items, batch_size=128, shuffle=True, drop_last=True)
    net = task.constructor()
    optimizer = plain_optimizer(net)
    for _, (x, y) in zip(range(steps), loader, strict=False):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return steps


def in_memory(task: Task, images: Tensor, labels: Tensor, steps: int) -> int:
    """One model, data in memory as one tensor (CIFAR-10: with its augmentation, on the batch)."""
    device = images.device
    net = task.constructor().to(device)
    optimizer = plain_optimizer(net)
    order = torch.randperm(len(images), device=device)
    for step in range(steps):
        chosen = order[step * 128 : (step + 1) * 128]
        x, y = images[chosen], labels[chosen]
        if task.recipe.augmentation == "flip_crop":
            x = plain_augmentation(x)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return steps


def plain_augmentation(x: Tensor) -> Tensor:
    """Flip with probability 1/2, pad by 4, crop at offsets 0..7."""
    x = torch.where((torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5), x.flip(3), x)
    padded = F.pad(x, (4, 4, 4, 4))
    rows = torch.randint(8, (len(x), 1), device=x.device) + torch.arange(32, device=x.device)
    columns = torch.randint(8, (len(x), 1), device=x.device) + torch.arange(32, device=x.device)
    which = torch.arange(len(x), device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def many(task: Task, models: int, steps: int, share: int, device: str) -> tuple[Callable[[], int], str]:
    """Our generation of ``models`` runs (training alone), with the strategy that its probe chooses."""
    request = Request(models, share_batches=share, save_count=2, steps=steps, device=device, chunk=models)
    work = supervised.prepare(task, request).decided()
    runs = range(models)

    def train() -> int:
        for part in work.stacks(runs):
            supervised.train_stack(work, part, work.saves(part), lambda _: None)
        return models * steps

    return train, work.options.strategy


def stand_in(task: Task, shape: tuple[int, ...], n: int) -> Task:
    """The task with random images: the arithmetic is the same."""
    part = Part(torch.randn(n, *shape), torch.randint(10, (n,)))
    splits = Splits(part, part, part)
    return dataclasses.replace(task, splits=lambda: splits)


def measure(workloads: dict[str, Callable[[], int]], device: str) -> dict[str, dict[str, float]]:
    """Median steps per second of wall and of CPU time of each workload, rounds in turns."""
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in workloads}
    for round_ in range(ROUNDS + 1):
        for name, work in workloads.items():
            wall, cpu = time.perf_counter(), time.process_time()
            steps = work()
            if device == "cuda":
                torch.cuda.synchronize()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if round_:  # the first one warms up
                figures[name].append((steps / wall, steps / cpu))
    return {
        name: {"wall": statistics.median(w for w, _ in rows), "cpu": statistics.median(c for _, c in rows)}
        for name, rows in figures.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with MNIST and CIFAR-10; default: random images")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", type=int, help="runs trained at once (default: 128; cuda: 4096)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps per measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, steps = options.device, options.steps
    models = options.models or (4096 if device == "cuda" else 128)
    mnist, cifar = get_task("mnist", options.data_dir), get_task("cifar10", options.data_dir)
    if options.data_dir is None:
        mnist, cifar = stand_in(mnist, (1, 28, 28), 60_000), stand_in(cifar, (3, 32, 32), 10_000)

    own, own_strategy = many(mnist, models, steps, 1, device)
    shared, shared_strategy = many(mnist, models, steps, 32, device)
    cnn, cnn_strategy = many(cifar, 4 if device == "cpu" else 64, min(steps, 20), 1, device)
    items = items_of(mnist)
    digits, pictures = ([tensor.to(device) for tensor in task.splits().train] for task in (mnist, cifar))
    workloads = {
        "mnist, DataLoader, 1 model": lambda: with_loader(mnist, items, steps),
        "mnist, in memory, 1 model": lambda: in_memory(mnist, *digits, 4 * steps),
        f"mnist, {models} models, own batches ({own_strategy})": own,
        f"mnist, {models} models, batches shared by 32 ({shared_strategy})": shared,
        "cifar10, in memory, 1 model": lambda: in_memory(cifar, *pictures, min(steps, 20)),
        f"cifar10, several models, auto ({cnn_strategy})": cnn,
    }
    figures = measure(workloads, device)
    loader, memory, ours, grouped, cnn_memory, cnn_ours = (
        row["cpu" if device == "cpu" else "wall"] for row in figures.values()
    )
    ratios = {
        "own batches / DataLoader (target 12)": ours / loader,
        "own batches / in memory (target 0.95)": ours / memory,
        "shared by 32 / in memory (target 4)": grouped / memory,
        "cifar10 auto / in memory (target 0.95)": cnn_ours / cnn_memory,
    }
    if options.json:
        print(json.dumps({"steps_per_second": figures, "ratios": ratios, "threads": options.threads, "device": device}))
        return
    for name, row in figures.items():
        print(f"{name:60} {row['wall']:10.0f} steps/s {row['cpu']:10.0f} steps per CPU second")
    for name, ratio in ratios.items():
        print(f"{name:60} {ratio:10.2f} x")


if __name__ == "__main__":
    main()
