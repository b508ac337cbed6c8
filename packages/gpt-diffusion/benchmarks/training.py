r"""Seconds of a training step: ours against a plain implementation, and the share of it that waits for data.

    uv run packages/gpt-diffusion/benchmarks/training.py [--threads N] [--json]
    uv run packages/gpt-diffusion/benchmarks/training.py --model mnist_loss --batch 1024 --device cuda --bf16 --compile \
        --peak-tflops 989

The plain step is written out: every token projected by itself, attention as softmax(Q K^T) V, AdamW and the moving
average one tensor after the other. The default model is the reduced one of the published measurements (MNIST layout, 4
blocks, 256 channels, 4 heads, 128 frequencies; batch 64). Both begin with the same weights, batch, steps and noise, and are
timed in turn (CPU time, on a CPU); the ratio is the median over rounds. The wait is what a step with a fresh batch (a zoo of random MNIST
networks, augmented) takes longer than one with a batch that is there.
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from gpt_diffusion import load_config
from gpt_diffusion.dataset import Pairs
from gpt_diffusion.distributed import Processes
from gpt_diffusion.training import Training, _prepare_run
from pairs import random_zoo
from sampling import plain_forward
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

REDUCED = ["transformer.n_embd=256", "transformer.n_layer=4", "transformer.n_head=4"]


class PlainStep:
    """A step of the published training, written out."""

    def __init__(self, run: Training) -> None:
        """Copy the model of a training."""
        self.model, self.average = copy.deepcopy(run.model), copy.deepcopy(run.average)
        self.diffusion, self.optim, self.bf16 = run.diffusion, run.config.train, run.bf16
        self.moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in self.model.parameters()}
        self.count = 0

    def loss(self, pairs: Pairs, t: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the predicted x_0."""
        schedule = self.diffusion.schedule
        signal, spread = (
            torch.from_numpy(values)[t.cpu()][:, None].to(noise)
            for values in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
        )
        x = signal * pairs.target + spread * noise
        with torch.autocast(noise.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            out = plain_forward(self.model, x, t, pairs.target_metric, pairs.start_metric, pairs.start)
        return (pairs.target - out).square().mean(1).mean()

    def __call__(self, pairs: Pairs, t: Tensor, noise: Tensor, lr: float) -> None:
        """Loss, gradients, clipping, AdamW, moving average."""
        self.model.zero_grad(set_to_none=True)
        self.loss(pairs, t, noise).backward()
        self.update(self.model.parameters(), lr)

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        """Change one tensor after the other."""
        nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.grad_clip, foreach=False)
        self.count += 1
        for p in parameters:
            assert p.grad is not None, "every parameter takes part"
            m, v = self.moments[p]
            p.mul_(1 - lr * self.optim.wd * (p.ndim == 2))
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            v.mul_(self.optim.beta2).addcmul_(p.grad, p.grad, value=1 - self.optim.beta2)
            spread = (v / (1 - self.optim.beta2**self.count)).sqrt() + 1e-8
            p.addcdiv_(m, spread, value=-lr / (1 - 0.9**self.count))
        for average, p in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.mul_(self.optim.ema_decay).add_(p, alpha=1 - self.optim.ema_decay)


def seconds(work: Callable[[], object], device: torch.device, steps: int) -> float:
    """Time of one of ``steps`` calls: of the CPU, which other jobs on the machine disturb less; wall time on a GPU."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    for _ in range(steps):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - began) / steps


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """All figures."""
    random_zoo(folder / "zoo", "mnist", options.runs, 50)
    settings = [f"dataset.path={folder / 'zoo'}", "dataset.train_metric=test_loss", "vis.freq=0", "test.freq=0"]
    settings += [f"train.mb_size={options.batch}", "train.lr_sch=fixed", "train.warmup_epochs=0"]
    settings += [f"device={options.device}", f"train.precision={'bf16' if options.bf16 else 'fp32'}"]
    settings += [] if options.model == "mnist_loss" else REDUCED
    config = load_config("mnist_loss", [*settings, f"train.compile={options.compile}"])
    device = torch.device(options.device)
    run = _prepare_run(config, None, Processes(0, 1, device))
    with torch.no_grad():  # the decoders begin at 0, which spares work
        for p in run.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    plain, fresh = PlainStep(run), run.dataset.batch
    pairs = fresh(options.batch, 0)
    t = torch.randint(1000, (options.batch,), device=device)
    noise = torch.randn(pairs.target.shape, device=device)
    with FlopCounterMode(display=False) as counter:
        ours = run.terms(run.model, pairs, t, noise).loss.mean()
        ours.backward()
    difference = abs(ours.item() - plain.loss(pairs, t, noise).item()) / ours.item()

    def prepared() -> None:
        run.dataset.batch = lambda *_: pairs  # type: ignore[method-assign]
        run.advance()

    def loaded() -> None:
        run.dataset.batch = fresh  # type: ignore[method-assign]
        run.advance()

    works = {"prepared": prepared, "plain": lambda: plain(pairs, t, noise, config.train.base_lr), "loaded": loaded}
    rounds: list[dict[str, float]] = []
    for _ in range(options.rounds + 1):  # the first one warms up
        rounds.append({name: seconds(work, device, options.steps) for name, work in works.items()})
    taken = {name: statistics.median(r[name] for r in rounds[1:]) for name in works}
    result = {
        "relative_difference_of_losses": difference,
        "seconds": taken["prepared"],
        "plain_seconds": taken["plain"],
        "ratio": statistics.median(r["plain"] / r["prepared"] for r in rounds[1:]),
        "data_wait_share": statistics.median(max(0.0, 1 - r["prepared"] / r["loaded"]) for r in rounds[1:]),
        "tflop": counter.get_total_flops() / 1e12,
        "tflops": counter.get_total_flops() / 1e12 / taken["loaded"],
    }
    if options.peak_tflops:
        result["share_of_peak"] = result["tflops"] / options.peak_tflops
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("reduced", "mnist_loss"), default="reduced")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--runs", type=int, default=200, help="runs of 50 checkpoints in the zoo")
    parser.add_argument("--steps", type=int, default=3, help="steps timed together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compile ours (the plain step never is)")
    parser.add_argument("--peak-tflops", type=float, help="of the device in this precision: prints the share reached")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options)
    assert math.isfinite(result["relative_difference_of_losses"]), "both steps must compute the same loss"
    if options.json:
        print(json.dumps(result))
        return
    print(f"ours {1000 * result['seconds']:.1f} ms, plain {1000 * result['plain_seconds']:.1f} ms a step")
    print(f"ratio {result['ratio']:.2f} (target 1.3 on a CPU, 2 on a GPU with --bf16 --compile)")
    print(f"waiting for data: {100 * result['data_wait_share']:.1f} % of a step")
    share = f", {100 * result['share_of_peak']:.1f} % of the peak" if "share_of_peak" in result else ""
    print(f"{result['tflops']:.3f} TFLOP/s{share}")


if __name__ == "__main__":
    main()
