"""Embedding a ResNet-18 (53,524 tokens) with full attention and with windows: seconds, memory, cosine.

    uv run packages/sane/benchmarks/embedding.py [--threads 1]

The autoencoder has width 128 and 4 + 4 blocks and is not trained, so the cosine says how much windows change what a random
encoder gives; it is also given for the latents of single tokens, which the mean hides.
"""

import argparse
import resource
import time

import torch
import torch.nn.functional as F
from sane.autoencoder import Autoencoder, AutoencoderConfig
from sane.model import Halo, SaneModel
from sane.networks import build_network
from sane.normalization import measure
from zoo_common import ParameterLayout
from zoo_common.tokens import ChannelTokenizer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    network = build_network({"model::type": "Resnet18", "model::channels_in": 3, "model::o_dim": 10})
    layout = ParameterLayout.from_module(network)
    tokenizer = ChannelTokenizer.from_module(network, 288)
    vectors = layout.flatten(network).detach()[None]
    positions = tuple(int(column) + 1 for column in tokenizer.positions.amax(0))
    autoencoder = Autoencoder(AutoencoderConfig(288, positions, 256, 128, 4, 4, 32))
    model = SaneModel(autoencoder, tokenizer, measure([vectors], tokenizer, "standardize"), vectors[0])

    def timed(halo: Halo | None) -> torch.Tensor:
        wall, cpu = time.monotonic(), time.process_time()
        latents = model.encode(vectors, halo)
        print(
            f"{halo or 'full attention'}: {time.process_time() - cpu:.1f} s of CPU, {time.monotonic() - wall:.1f} s, "
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB"
        )
        return latents

    windows = [timed(halo) for halo in (Halo(128, 64), Halo(1024, 512))]
    full = timed(None)
    for latents in windows:
        mean = F.cosine_similarity(latents.mean(1), full.mean(1)).item()
        single = F.cosine_similarity(latents, full, dim=2).quantile(torch.tensor([0.05, 0.5])).tolist()
        print(f"cosine to full attention {mean:.4f}; of single tokens, 5 % and 50 %: {single[0]:.4f}, {single[1]:.4f}")


if __name__ == "__main__":
    main()
