"""Seconds to sample networks with G: ours against a plain loop that computes everything at every step.

The model is the reduced one of the published measurements: MNIST layout (7960 weights, tokens of 1000), 4 blocks,
256 channels, 4 heads, 128 frequencies. Ours and the plain loop are timed in turn on parts of the trajectory, with the
same number of threads, and the median of the ratios is reported; the totals are one whole trajectory each.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpt_diffusion import Diffusion, GptModel, sample
from torch import Tensor

SIZES = [7840, 10, 100, 10]


def build_model() -> GptModel:
    """The reduced model, with weights that are not zero anywhere."""
    torch.manual_seed(0)
    model = GptModel(
        SIZES,
        split_policy="chunk_within_layer",
        chunk_size=1000,
        n_layer=4,
        n_head=4,
        n_embd=256,
        max_freq_log2=14,
        num_frequencies=128,
        absolute_loss_conditioning=True,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return model.eval()


def plain_forward(model: GptModel, x: Tensor, t: Tensor, target: Tensor, prev: Tensor, x_prev: Tensor) -> Tensor:
    """The network, one token at a time and all of it, as a straightforward implementation has it."""
    table = model.scalar_embedder.frequencies

    def embed(s: Tensor) -> Tensor:
        angles = s.float()[:, None] * table
        return torch.cat([angles.sin(), angles.cos(), s.float()[:, None]], dim=1)

    z = torch.cat([x, x_prev, embed(t), embed(target - prev), embed(target), embed(prev)], dim=1)
    net = model.decoder
    tokens = z.split(model.tokenizer.lengths, dim=1)
    encoded = [encode(token) for encode, token in zip(net.input_parameter_projections, tokens, strict=True)]
    h = net.ln_in(torch.stack(encoded, dim=1)) + net.pos_emb
    for block in net.blocks:
        a, normed = block.attn, block.ln1(h)
        q, k, v = (f(normed).unflatten(-1, (a.n_head, -1)).transpose(1, 2) for f in (a.query, a.key, a.value))
        weights = F.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
        h = h + a.proj((weights @ v).transpose(1, 2).flatten(2))
        h = h + block.mlp(block.ln2(h))
    h = net.ln_f(h)
    out = [decode(h[:, k]) for k, decode in enumerate(net.output_parameter_projections)]
    return torch.cat(out, dim=1) + x_prev


@torch.no_grad()
def plain_sample(model: GptModel, diffusion: Diffusion, conditions: dict[str, Tensor], seed: int) -> Tensor:
    """Ancestral sampling with the plain network."""
    generator = torch.Generator().manual_seed(seed)
    start, target, prev = conditions["start"], conditions["prompt"], conditions["start_metric"]
    x = torch.randn(start.shape, generator=generator)
    schedule = diffusion.schedule
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(start),), diffusion.timestep_map[i])
        x_start = plain_forward(model, x, t, target, prev, start)
        mean = float(schedule.posterior_mean_coef1[i]) * x_start + float(schedule.posterior_mean_coef2[i]) * x
        noise = torch.randn(start.shape, generator=generator)
        x = mean + (i > 0) * math.exp(0.5 * float(schedule.large_log_variance[i])) * noise
    return x


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000, help="denoising steps of the whole trajectory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, n = build_model(), options.networks
    conditions = {
        "start": torch.randn(n, sum(SIZES)),
        "prompt": torch.linspace(0.1, 2.0, n),
        "start_metric": torch.full((n,), 2.3),
    }

    def ours(diffusion: Diffusion, sampler: str = "ddpm", seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(model, diffusion, **conditions, sampler=sampler, generator=generator)  # type: ignore[arg-type]

    part = Diffusion(respacing="50")
    difference = (ours(part) - plain_sample(model, part, conditions, 0)).abs().max().item()
    pairs = [
        (seconds(lambda: ours(part)), seconds(lambda: plain_sample(model, part, conditions, 0)))
        for _ in range(options.repeats)
    ]
    whole, steps = Diffusion(respacing=[options.steps]), options.steps
    result = {
        "networks": n,
        "threads": options.threads,
        "largest_difference": difference,
        "ratio": statistics.median(plain / fast for fast, plain in pairs),
        f"seconds_{steps}_steps": seconds(lambda: ours(whole)),
        f"plain_seconds_{steps}_steps": seconds(lambda: plain_sample(model, whole, conditions, 0)),
        "seconds_ddim_50_steps": statistics.median(
            seconds(lambda: ours(Diffusion(respacing="ddim50"), "ddim")) for _ in range(options.repeats)
        ),
    }
    print(f"{n} networks, {options.threads} thread(s); largest difference {difference:.1e}")
    totals = [result[f"{kind}seconds_{steps}_steps"] for kind in ("", "plain_")]
    print(f"{steps} DDPM steps: {totals[0]:.1f} s, plain {totals[1]:.1f} s")
    print(f"speed over plain, median of {options.repeats} runs of 50 steps: {result['ratio']:.2f}x")
    print(f"50 DDIM steps: {result['seconds_ddim_50_steps']:.2f} s")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
