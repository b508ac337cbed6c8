"""Permuting and aligning networks, against plain implementations that work on one network and one tensor at a time.

Run: ``uv run packages/zoo-common/benchmarks/symmetry.py [--networks 32] [--threads 2]``. Independent random weights;
both sides visit the groups in the same order; the objectives are compared.
"""

import argparse
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from zoo_common.symmetry import Symmetry
from zoo_common.tasks import get_task
from zoo_common.tracing import Entry


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of the seconds that some work takes."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def plain_permute(symmetry: Symmetry, vectors: Tensor, generator: torch.Generator) -> Tensor:
    """One network at a time: draw, permute tensor by tensor, flatten."""
    rows = []
    for vector in vectors:
        state = dict(symmetry.layout.unflatten(vector))
        for group in symmetry.groups:
            permutation = torch.randperm(group.size, generator=generator)
            for entry in group.entries:
                order = entry.positions[permutation].flatten()
                state[entry.tensor] = state[entry.tensor].index_select(entry.axis, order)
        rows.append(symmetry.layout.flatten(state))
    return torch.stack(rows)


def plain_align(symmetry: Symmetry, vector: Tensor, reference: Tensor) -> Tensor:
    """Weight matching of one pair as the literature states it: every term anew at every visit."""
    ours, theirs = symmetry.layout.unflatten(reference), symmetry.layout.unflatten(vector)
    permutations = [torch.arange(group.size) for group in symmetry.groups]
    places: dict[str, list[tuple[int, Entry]]] = {}
    for g, group in enumerate(symmetry.groups):
        for entry in group.entries:
            places.setdefault(entry.tensor, []).append((g, entry))
    for _ in range(100):
        progress = False
        for g, group in enumerate(symmetry.groups):
            total = torch.zeros(group.size, group.size)
            for entry in group.entries:
                permuted = theirs[entry.tensor]
                for other, there in places[entry.tensor]:
                    if there.axis != entry.axis:
                        order = there.positions[permutations[other]].flatten()
                        permuted = permuted.index_select(there.axis, order)
                a = torch.moveaxis(ours[entry.tensor], entry.axis, 0).reshape(group.size, -1)
                b = torch.moveaxis(permuted, entry.axis, 0).reshape(group.size, -1)
                total += a @ b.T
            rows, columns = linear_sum_assignment(total.numpy(), maximize=True)
            before, after = total[rows, permutations[g]].sum(), total[rows, columns].sum()
            progress |= bool(after > before + 1e-12)
            permutations[g] = torch.from_numpy(columns)
        if not progress:
            break
    return symmetry.apply(vector[None], [p[None] for p in permutations])[0]


def small_cnn(channels: tuple[int, ...], kernels: tuple[int, ...], pools: int, features: int) -> nn.Sequential:
    """A CNN of SANE's zoos: three convolutions, the first ``pools`` of them pooled, and two dense layers."""
    layers: list[nn.Module] = []
    for i, ((inputs, outputs), kernel) in enumerate(zip(pairwise(channels), kernels, strict=True)):
        layers += [nn.Conv2d(inputs, outputs, kernel), *([nn.MaxPool2d(2)] if i < pools else []), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 20), nn.Tanh(), nn.Linear(20, 10))


def align_many(what: str, build: Callable[[], nn.Module], example: Tensor, count: int) -> None:
    """Networks of independent initialisations against one reference; the largest difference of their objectives."""
    symmetry = Symmetry.from_module(build(), example)
    reference, *rest = (symmetry.layout.flatten(build()).detach() for _ in range(count + 1))
    networks = torch.stack(rest)
    expected = torch.stack([plain_align(symmetry, one, reference) for one in networks])
    ours, theirs = (x.double() @ reference.double() for x in (symmetry.align(networks, reference), expected))
    gap = (ours / theirs - 1).abs().max().item()
    plain = seconds(lambda: [plain_align(symmetry, one, reference) for one in networks], 5)
    taken = seconds(lambda: symmetry.align(networks, reference), 5)
    report(f"align {count} {what} with one", plain, taken, 4, f"objectives differ by {gap:.0e}")


def report(what: str, plain: float, ours: float, target: float, note: str = "") -> None:
    """One line with a ratio."""
    print(f"{what:34} plain {plain:8.3f} s   ours {ours:8.3f} s   {plain / ours:6.1f} x (target {target} x) {note}")


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=32, help="ResNet-18s to align with one reference")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)

    symmetry = get_task("mnist").symmetry()
    vectors = torch.randn(1000, symmetry.layout.size, generator=generator)
    plain = seconds(lambda: plain_permute(symmetry, vectors, generator), 3)
    ours = seconds(lambda: symmetry.permute(vectors, generator), 21)
    report("permute 1,000 MNIST MLPs", plain, ours, 20)
    taken = seconds(lambda: symmetry.align(vectors, vectors[0]), 3)
    print(f"align 1,000 MNIST MLPs {taken:8.2f} s (target: under 5 s)")

    align_many("CNN", lambda: small_cnn((1, 8, 6, 4), (5, 5, 2), 2, 36), torch.zeros(2, 1, 28, 28), 32)
    align_many("CNN3", lambda: small_cnn((3, 16, 32, 15), (3, 3, 3), 3, 60), torch.zeros(2, 3, 32, 32), 32)

    resnet = torchvision.models.resnet18(num_classes=10)
    symmetry = Symmetry.from_module(resnet, torch.zeros(2, 3, 32, 32))
    networks = 0.1 * torch.randn(options.networks + 1, symmetry.layout.size, generator=generator)
    reference, networks = networks[0], networks[1:]
    aligned = (symmetry.align(networks[:1], reference)[0], plain_align(symmetry, networks[0], reference))
    ours, expected = (one.double() @ reference.double() for one in aligned)
    note = f"objectives differ by {abs(ours / expected - 1).item():.0e}"
    plain = seconds(lambda: plain_align(symmetry, networks[0], reference), 3)
    taken = seconds(lambda: symmetry.align(networks[:1], reference), 3)
    report("align a pair of ResNet-18s", plain, taken, 1.8, note)
    plain = seconds(lambda: [plain_align(symmetry, one, reference) for one in networks], 1)
    taken = seconds(lambda: symmetry.align(networks, reference), 1)
    report(f"align {len(networks)} ResNet-18s with one", plain, taken, 4)


if __name__ == "__main__":
    main()
