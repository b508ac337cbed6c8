"""Predicting all parameters of torchvision models: CPU seconds against the plain implementation, graphs at hand.

    python packages/ghn/benchmarks/prediction.py --archs resnet50 vit_b_16 --size tm8
    python packages/ghn/benchmarks/prediction.py --training

Weights of the hypernetwork are random. Times are CPU seconds of this process, the best of the rounds, in which both
take turns; a model's parameters exist before, as they do when it has been built.
"""

import argparse
import json
import math
import time
from collections.abc import Callable

import plain
import torch
import torchvision
from ghn import GHN, GHN3, Graph
from torch import nn
from tqdm import tqdm

SIZES = {"tm8": (64, 3, 8), "sm8": (128, 5, 16), "lm8": (256, 12, 16), "xlm16": (384, 24, 16)}


def hypernetwork(size: str) -> GHN3:
    """One of the published sizes."""
    hid, layers, heads = SIZES[size]
    options = {"weight_norm": True, "ve": True, "layernorm": True}
    return GHN3((hid, hid, 16, 16), 1000, hid, heads=heads, layers=layers, **options).eval()


def torchvision_model(arch: str) -> nn.Module:
    """A model; its values do not matter, but their memory is there."""
    options = {"init_weights": False} if arch in ("googlenet", "inception_v3") else {}
    try:
        with torch.device("meta"):
            model = getattr(torchvision.models, arch)(**options).to_empty(device="cpu")
    except NotImplementedError:  # it looks at values when it is built
        return getattr(torchvision.models, arch)(**options)
    for value in model.state_dict().values():
        value.zero_()
    return model


def best(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Best CPU seconds of each function; they take turns."""
    times = [math.inf] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.process_time()
            function()
            times[i] = min(times[i], time.process_time() - start)
    return times


def prediction(size: str, archs: list[str], rounds: int) -> dict[str, object]:
    """Seconds per model, and the ratio of the sums."""
    ghn = hypernetwork(size)
    table = {}
    for arch in tqdm(archs):
        model = torchvision_model(arch)
        graph = Graph(model)
        with torch.no_grad():
            ours, theirs = best([lambda: ghn(model, graph), lambda: plain.predict(ghn, [model], [graph])], rounds)  # noqa: B023
        table[arch] = {"nodes": graph.n_nodes, "seconds": ours, "plain": theirs, "factor": theirs / ours}
    result: dict[str, object] = {"size": size, "models": table}
    for name, chosen in (("all", archs), ("without_vgg", [arch for arch in archs if not arch.startswith("vgg")])):
        if chosen:
            sums = [sum(table[arch][key] for arch in chosen) for key in ("seconds", "plain")]
            result[name] = {"models": len(chosen), "seconds": sums[0], "plain": sums[1], "factor": sums[1] / sums[0]}
    return result


class SmallNet(nn.Module):
    """A small residual network, one of those that hypernetworks are trained on."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.expected_input_sz = 32
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 4, padding=1, bias=False), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width),
            )
            for _ in range(depth)
        )  # fmt: skip
        self.fc = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images."""
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.fc(x.mean((2, 3)))


def training(kind: str, meta_batch: int, images: int, rounds: int) -> dict[str, float]:
    """A meta-training step: predict several networks, their loss on a batch, and back to the hypernetwork."""
    norms = {"weight_norm": True, "ve": True, "layernorm": True}
    ghn: GHN = GHN3((64, 64, 11, 11), 10, 64, **norms) if kind == "ghn3" else GHN((64, 64, 11, 11), 10, hid=32, **norms)
    ghn.train()
    nets = [SmallNet(16 + 8 * (i % 4), 2 + i) for i in range(meta_batch)]
    graphs = [Graph(net, dialect=ghn.dialect) for net in nets]
    x, labels = torch.randn(images, 3, 32, 32), torch.randint(10, (images,))

    def step(predict: Callable[[], object]) -> None:
        predict()
        sum(nn.functional.cross_entropy(net(x), labels) for net in nets).backward()
        ghn.zero_grad()

    ours, theirs = best(
        [
            lambda: step(lambda: ghn(nets, graphs, keep_grads=True, bn_track_running_stats=True)),
            lambda: step(lambda: plain.predict(ghn, nets, graphs, keep_grads=True)),
        ],
        rounds,
    )
    return {"meta_batch": meta_batch, "images": images, "seconds": ours, "plain": theirs, "factor": theirs / ours}


def main() -> None:
    """Print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="*", help="torchvision models; default: all for classification")
    parser.add_argument("--size", choices=SIZES, default="tm8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--training", action="store_true", help="time a meta-training step instead")
    parser.add_argument("--meta-batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="one line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.training:
        result: dict[str, object] = {
            kind: training(kind, options.meta_batch, options.images, options.rounds) for kind in ("ghn3", "ghn2")
        }
    else:
        archs = options.archs or torchvision.models.list_models(module=torchvision.models)
        result = prediction(options.size, archs, options.rounds)
    print(json.dumps(result, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
