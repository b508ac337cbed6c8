"""Channel tokens of stacked vectors, against one model and one layer at a time and against a copy.

    uv run packages/zoo-common/benchmarks/tokens.py [--threads N] [--json]

``stacked`` cuts 64 networks of SANE's CIFAR zoo (CNN3, 93 tokens of 289) in one call, with ``out`` into an existing
buffer; ``plain`` cuts them one by one, layer by layer: rows, bias appended, padded, cut, concatenated, stacked. It makes
no masks and no positions, which the original makes for every model anew. ``resnet18`` cuts one ResNet-18 with batch
norms (53,524 tokens of 288) into an existing buffer; ``copy of tokens`` copies the bytes of these tokens (62 MB) into
one, ``copy of weights`` only those of the weights (45 MB). Those that are compared take turns; figures are medians of 5
rounds. Medians of five runs on one thread of a shared 2-core machine: 13.9 and 16.8 times, 1.23 and 1.66 times.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from zoo_common.layout import ParameterLayout
from zoo_common.tokens import ChannelTokenizer

ROUNDS, MODELS = 5, 64


def plain(states: list[dict[str, Tensor]], token_size: int) -> Tensor:
    """Tokens of the models, one after the other."""
    models = []
    for state in states:
        tokens = []
        for name, weight in state.items():
            if "weight" in name:
                rows = weight.reshape(weight.shape[0], -1)
                bias = state.get(name.replace("weight", "bias"))
                if bias is not None:
                    rows = torch.cat([rows, bias[:, None]], dim=1)
                padding = -rows.shape[1] % token_size
                tokens.append(nn.functional.pad(rows, (0, padding)).reshape(-1, token_size))
        models.append(torch.cat(tokens))
    return torch.stack(models)


def cnn3() -> nn.Module:
    """The network of SANE's CIFAR-10 zoo."""
    convolutions = [nn.Conv2d(a, b, 3) for a, b in ((3, 16), (16, 32), (32, 15))]
    return nn.Sequential(*convolutions, nn.Linear(60, 20), nn.Linear(20, 10))


def resnet18() -> nn.Module:
    """ResNet-18 for images of 32 x 32, without memory."""
    from torchvision.models import resnet18

    with torch.device("meta"):
        net = resnet18(num_classes=10)
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return net


def measure(workloads: dict[str, tuple[int, Callable[[], object]]]) -> dict[str, float]:
    """Median milliseconds of each workload, rounds in turns; every workload runs a number of times per round."""
    figures: dict[str, list[float]] = {name: [] for name in workloads}
    for round_ in range(ROUNDS + 1):
        for name, (times, work) in workloads.items():
            start = time.perf_counter()
            for _ in range(times):
                work()
            if round_:  # the first one warms up
                figures[name].append(1e3 * (time.perf_counter() - start) / times)
    return {name: statistics.median(values) for name, values in figures.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    small = ChannelTokenizer.from_module(cnn3())
    vectors = torch.randn(MODELS, small.layout.size)
    states = [small.layout.unflatten(vector) for vector in vectors]
    buffer = small.tokenize(vectors)
    assert torch.equal(buffer, plain(states, small.token_size))
    milliseconds = measure(
        {
            "stacked": (50, lambda: small.tokenize(vectors)),
            "stacked, out": (50, lambda: small.tokenize(vectors, out=buffer)),
            "plain": (5, lambda: plain(states, small.token_size)),
        }
    )
    large = ChannelTokenizer(ParameterLayout.from_module(resnet18()), 288)
    vector = torch.randn(large.layout.size)
    tokens = large.tokenize(vector)
    other, weights = tokens.clone(), vector.clone()
    milliseconds |= measure(
        {
            "resnet18": (5, lambda: large.tokenize(vector, out=tokens)),
            "copy of tokens": (5, lambda: other.copy_(tokens)),
            "copy of weights": (5, lambda: weights.copy_(vector)),
        }
    )
    ratios = {
        "plain / stacked": milliseconds["plain"] / milliseconds["stacked"],
        "plain / stacked, out": milliseconds["plain"] / milliseconds["stacked, out"],
        "resnet18 / tokens": milliseconds["resnet18"] / milliseconds["copy of tokens"],
        "resnet18 / weights": milliseconds["resnet18"] / milliseconds["copy of weights"],
    }
    if options.json:
        print(json.dumps({"milliseconds": milliseconds, "ratios": ratios, "threads": options.threads}))
        return
    for name, value in milliseconds.items():
        print(f"{name:20} {value:8.2f} ms")
    for (name, value), target in zip(
        ratios.items(), ("at least 10", "at least 10", "at most 2", "at most 2"), strict=True
    ):
        print(f"{name:20} {value:8.2f}    (target: {target})")


if __name__ == "__main__":
    main()
