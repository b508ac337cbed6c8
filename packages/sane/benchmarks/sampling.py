"""Speed of drawing and decoding many networks, and of preprocessing a zoo, as ratios in one run.

Usage: OMP_NUM_THREADS=1 uv run packages/sane/benchmarks/sampling.py [--small]
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sane.autoencoder import Autoencoder, AutoencoderConfig
from sane.model import SaneModel
from sane.networks import build_network
from sane.preparation import PrepareConfig, prepare
from sane.sampling import KernelDensity
from zoo_common import ParameterLayout, Run, Zoo


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """Least CPU time of some calls."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def draw_per_token(anchors: np.ndarray, n: int) -> np.ndarray:
    """One density estimate for each token, fitted and sampled in a loop with one seed, as published."""
    from sklearn.neighbors import KernelDensity as Reference

    tokens = [
        Reference(kernel="gaussian", bandwidth=0.2).fit(anchors[:, k]).sample(n, random_state=42)
        for k in range(anchors.shape[1])
    ]
    return np.stack(tokens, 1)


def kde(tokens: int) -> None:
    """Closed form against one estimate for each token."""
    anchors = torch.randn(5, tokens, 128)
    plain = min(tokens, 1000)
    slow = seconds(lambda: draw_per_token(anchors[:, :plain].double().numpy(), 1), 1) * tokens / plain
    density = KernelDensity("token", shared_noise=True)
    fast = seconds(lambda: density.draw(anchors, 1))
    same = np.abs(density.draw(anchors[:, :50], 4).numpy() - draw_per_token(anchors[:, :50].double().numpy(), 4)).max()
    print(
        f"KDE draw of {tokens} tokens: {slow:.3f} s in a loop, {fast:.4f} s closed form, {slow / fast:.0f}x, apart {same:.1e}"
    )


def small_zoo(folder: Path, runs: int, checkpoints: int) -> Zoo:
    """Random CNN3 networks."""
    config = {"model::type": "CNN3", "model::channels_in": 3, "model::o_dim": 10}
    layout = ParameterLayout.from_module(build_network(config))
    zoo = Zoo.create(folder, layout=layout)
    base = layout.stack([build_network(config) for _ in range(runs)]).detach()
    steps = range(checkpoints)
    zoo.append(
        [
            Run(f"r{i:04d}", base[i] + 0.1 * torch.randn(checkpoints, layout.size) * base[i].std(), steps, {}, config)
            for i in range(runs)
        ]
    )
    return zoo


def decode(zoo: Zoo, networks: int) -> None:
    """Many networks as one batch against one at a time."""
    prepared = prepare(zoo, PrepareConfig(token_size=289, align="none"))
    config = AutoencoderConfig(289, prepared.max_positions, 64, 128, 4, 4, 32)
    model = SaneModel(Autoencoder(config), prepared.tokenizer, prepared.normalization, prepared.reference)
    z = torch.randn(networks, prepared.tokenizer.shape[0], 32)
    together = seconds(lambda: model.decode(z))
    alone = seconds(lambda: [model.decode(one[None]) for one in z])
    print(
        f"decoding {networks} CNN3: {alone / networks * 1e3:.2f} ms alone, {together / networks * 1e3:.2f} ms in a batch, {alone / together:.1f}x"
    )


def preprocess(zoo: Zoo) -> None:
    """Aligned, normalised, ready to train: models per second."""
    count = sum(run.checkpoints for run in zoo.runs)
    prepared = prepare(zoo, PrepareConfig())
    once = seconds(lambda: prepare(zoo, PrepareConfig()), 1)
    read = seconds(lambda: [prepared.tokens(prepared.vectors("train", slice(0, 64)))])
    print(f"preparing {count} CNN3: {count / once:.0f} models/s; reading tokens: {64 / read:.0f} models/s")


def main(small: bool) -> None:
    """Run all parts."""
    torch.manual_seed(0)
    kde(2000 if small else 53_704)
    with tempfile.TemporaryDirectory() as folder:
        zoo = small_zoo(Path(folder) / "zoo", *((8, 2) if small else (64, 5)))
        decode(zoo, 8 if small else 64)
        preprocess(zoo)


if __name__ == "__main__":
    main("--small" in sys.argv)
