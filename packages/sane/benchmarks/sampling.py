"""Speed of drawing and decoding many networks, as ratios in one run.

Usage: OMP_NUM_THREADS=1 uv run packages/sane/benchmarks/sampling.py [--small]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sane.autoencoder import Autoencoder, AutoencoderConfig
from sane.model import SaneModel
from sane.networks import build_network
from sane.preparation import PrepareConfig, prepare
from sane.sampling import KernelDensity
from timing import seconds
from torch import Tensor
from zoo_common import ParameterLayout, Run, Zoo


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
    fast = seconds(lambda: density.draw(anchors, 1), 3)
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


def plain_decode(model: SaneModel, latents: Tensor) -> list[dict[str, Tensor]]:
    """One network at a time, as published: decode, pick the tokens of each layer by mask, undo the normalisation by key."""
    tokenizer, positions = model.tokenizer, model.tokenizer.positions
    reference = tokenizer.layout.unflatten(model.reference)
    found = []
    for z in latents:
        with torch.no_grad():
            tokens = model.autoencoder.decode(z[None], positions[None])[0]
        state = {name: value.clone() for name, value in reference.items()}
        for index, name in enumerate(name for name in reference if "weight" in name):
            rows = tokens[positions[:, 1] == index].reshape(len(state[name]), -1)
            bias, width = name.replace("weight", "bias"), state[name][0].numel()
            state[name], state[bias] = rows[:, :width].reshape(state[name].shape), rows[:, width]
        for name, (mean, scale) in model.normalization.layers.items():
            for key in (name, name.replace("weight", "bias")):
                state[key] = state[key] * scale + mean
        found.append(state)
    return found


def decode(zoo: Zoo, networks: int) -> None:
    """Many networks as one batch against one at a time, for autoencoders of several sizes; then with the draw before."""
    prepared = prepare(zoo, PrepareConfig(token_size=289, align="none"))
    for d, layers in ((32, 2), (128, 4)):
        torch.manual_seed(0)
        config = AutoencoderConfig(289, prepared.max_positions, 64, d, 4, layers, 32)
        model = SaneModel(Autoencoder(config), prepared.tokenizer, prepared.normalization, prepared.reference)
        z = torch.randn(networks, prepared.tokenizer.shape[0], 32)
        together = seconds(lambda: model.decode(z), 3)  # noqa: B023
        alone = seconds(lambda: plain_decode(model, z), 3)  # noqa: B023
        with torch.no_grad():
            p = model.tokenizer.positions.expand(networks, -1, -1)
            network = seconds(lambda: model.autoencoder.decode(z, p), 3)  # noqa: B023
        theirs = model.tokenizer.layout.stack(plain_decode(model, z))
        apart = (model.decode(z) - theirs).abs().max().item()
        print(
            f"decoding {networks} CNN3, width {d}, {layers} blocks: {1e3 * alone / networks:.2f} ms one by one, "
            f"{1e3 * together / networks:.2f} ms in a batch ({100 * network / together:.0f} % in the autoencoder), "
            f"{alone / together:.1f}x, apart {apart:.1e}"
        )
        sample(model, networks, alone / networks, f"width {d}, {layers} blocks")


def sample(model: SaneModel, networks: int, decoding: float, what: str) -> None:
    """Draw and decode: all at once, against one network at a time with a density for each of its tokens."""
    anchors = torch.randn(10, model.tokenizer.shape[0], 32)
    plain = decoding + seconds(lambda: draw_per_token(anchors.double().numpy(), 1), 1)
    density = KernelDensity("token", shared_noise=True)
    ours = seconds(lambda: model.decode(density.draw(anchors, networks)), 3) / networks
    print(
        f"sampling {networks} CNN3 around 10 anchors, {what}: {1e3 * plain:.2f} ms each as published, "
        f"{1e3 * ours:.2f} ms in a batch, {plain / ours:.1f}x"
    )


def main(small: bool) -> None:
    """Run all parts."""
    torch.manual_seed(0)
    kde(2000 if small else 53_704)
    with tempfile.TemporaryDirectory() as folder:
        zoo = small_zoo(Path(folder) / "zoo", *((8, 2) if small else (64, 5)))
        decode(zoo, 8 if small else 64)


if __name__ == "__main__":
    main("--small" in sys.argv)
