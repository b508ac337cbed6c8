"""What the commands do that compute: called by the command line once torch may be loaded."""

import dataclasses
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pilimit.building import choose_device, open_net
from pilimit.config import EvalConfig, KernelConfig, TrainConfig, WidthsConfig
from pilimit.data import choose_data
from pilimit.ensemble import draw_widths, width_study
from pilimit.evaluation import evaluate
from pilimit.finite import FinMLP
from pilimit.infinite import InfMLP
from pilimit.kernels import Kernel, cosine_kernel, feature_kernel, nngp, ntk
from pilimit.regression import fit_kernel
from pilimit.training import TrainReport, train


def run_train(config: TrainConfig) -> int:
    """Train; 130 if Ctrl-C stopped it."""
    if config.test:
        if config.model_path is None:
            raise ValueError("--test needs --model-path")
        names = {field.name for field in dataclasses.fields(EvalConfig)}
        shared = {name: value for name, value in vars(config).items() if name in names}
        return run_eval(EvalConfig(source=config.model_path, **shared))
    report = train(config, note=lambda text: None if config.json else print(text))
    if config.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print(_told(report))
    if report.interrupted:
        where = "go on with --resume" if config.save_dir else "nothing was saved, for want of --save-dir"
        sys.stderr.write(f"pilimit: interrupted at step {report.step} of {report.steps}; {where}\n")
        return 130
    return 0


def _told(report: TrainReport) -> str:
    text = f"step {report.step} of {report.steps} (epoch {report.epoch:.1f}), {report.seconds:.0f} s"
    if report.test_acc is not None and report.test_loss is not None:
        text += f": test loss {report.test_loss:.4f}, accuracy {report.test_acc:.4f}"
    if report.max_test_acc is not None:
        text += f" (best {report.max_test_acc:.4f} after epoch {report.max_test_acc_epoch})"
    if report.atoms:
        text += f"; atoms per layer {report.atoms}, {report.gb:.3f} GB"
    return text


def run_eval(config: EvalConfig) -> int:
    """Loss and accuracy on the test images."""
    settings = _settings(config)
    device = choose_device(settings)
    if config.mapped and config.cuda:
        raise ValueError("--mapped leaves the atoms in their files: leave out --cuda")
    net = open_net(config.source, device, mapped=config.mapped)
    if config.width:
        if not isinstance(net, InfMLP):
            raise ValueError(f"{config.source} holds a finite net, which cannot be sampled at --width {config.width}")
        net = FinMLP.sample(net, config.width, generator=torch.Generator(device).manual_seed(config.seed))
    data = choose_data(settings)
    images = data.test.images.flatten(1).to(device, net.dtype)
    loss, accuracy = evaluate(net, images, data.test.labels.to(device), settings, quiet=config.quiet)
    result = {"test_loss": loss, "test_acc": accuracy, "images": len(images), "width": getattr(net, "width", None)}
    print(
        json.dumps(result) if config.json else f"test loss {loss:.4f}, accuracy {accuracy:.4f} ({len(images)} images)"
    )
    return 0


def _settings(config: EvalConfig | KernelConfig | WidthsConfig) -> TrainConfig:
    """The options of a training that an evaluation shares with it."""
    names = ("dataset", "data_root", "test_batch_size", "train_subset_size", "test_subset_size", "loss", "cuda", "seed")
    settings = TrainConfig(**{name: getattr(config, name) for name in names if hasattr(config, name)})
    settings.check()
    return settings


def run_kernel(config: KernelConfig) -> int:
    """Regression with one kernel, for each ridge."""
    if (config.kernel == "features") != (config.model is not None):
        raise ValueError("--kernel features and --model belong together: give both or none")
    if config.depth < 1:
        raise ValueError(f"--depth must be at least 1, got {config.depth}")
    for name in ("varw", "varb", "first_layer_lr_mult", "last_layer_lr_mult", "bias_lr_mult"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0 and finite, got {getattr(config, name)}")
    settings = _settings(config)
    device, data = choose_device(settings), choose_data(settings)
    x, unseen = (part.images.flatten(1).to(device) for part in (data.train, data.test))
    kernel = _kernel(config)
    if config.model is not None:
        net = open_net(config.model, device)
        kernel = feature_kernel if isinstance(net, InfMLP) else cosine_kernel
        x, unseen = (_features(net, rows, config.test_batch_size) for rows in (x, unseen))
    targets = F.one_hot(data.train.labels.to(device), 10).double() - 0.5
    budget = None if config.memory_budget is None else 1e9 * config.memory_budget
    results = []
    for ridge in (1e-5, 1e-4, 1e-3) if config.multiple_regs else config.kernel_reg:
        fitted = fit_kernel(kernel, x, targets, ridge, memory_budget=budget, quiet=config.quiet)
        right = fitted.predict(unseen, config.quiet).argmax(1) == data.test.labels.to(device)
        result = {
            "kernel": config.kernel, "kernel_reg": ridge, "test_acc": float(right.double().mean()), "train": len(x),
            "test": len(unseen), "dtype": str(fitted.dtype).removeprefix("torch."), "residual": fitted.residual,
            "iterations": fitted.iterations,
        }  # fmt: skip
        results.append(result)
        if not config.json:
            print(
                f"{config.kernel}, ridge {ridge:g}: accuracy {result['test_acc']:.4f} ({len(x)} training images, "
                f"{result['dtype']}, residual {fitted.residual:.0e})"
            )
    if config.json:
        print(json.dumps({"results": results}))
    return 0


def _kernel(config: KernelConfig) -> Kernel:
    """NNGP or NTK with the published arguments."""
    n = config.depth
    if config.kernel == "ntk":
        rates = [config.first_layer_lr_mult, *[1.0] * (n - 1), config.last_layer_lr_mult]
        more: dict[str, Any] = {"varbs": [config.varb] * (n + 1), "lrbs": [config.bias_lr_mult] * (n + 1)}
        return partial(ntk, varws=[config.varw] * (n + 1), lrws=rates, **more, mode=config.mode)
    return partial(nngp, varws=[config.varw] * n, varbs=[config.varb] * n)


@torch.no_grad()
def _features(net: Any, x: Tensor, size: int) -> Tensor:  # noqa: ANN401 (both kinds of nets have features)
    return torch.cat([net.features(rows.to(net.dtype)).double() for rows in x.split(size)])


def run_widths(config: WidthsConfig) -> int:
    """The convergence of finite nets to the infinite one."""
    if config.plot is not None:
        from pilimit.figures import new_figure

        new_figure()  # a missing extra is told before the work
    data = choose_data(_settings(config))
    images = data.train.images.flatten(1).double()
    generator = torch.Generator().manual_seed(config.seed)
    net = InfMLP(
        images.shape[1], 10, config.r, config.depth - 1, dtype=torch.float64, generator=generator, bias_alpha=0.5
    )
    study = width_study(
        net, images, data.train.labels, config.widths, nets=config.nets, steps=config.steps,
        batch_size=config.batch_size, lr=config.lr, seed=config.seed, quiet=config.quiet,
    )  # fmt: skip
    if config.plot is not None:
        draw_widths(study, Path(config.plot))
    if config.json:
        print(json.dumps(dataclasses.asdict(study) | {"slope": study.slope}))
    else:
        for i, width in enumerate(study.widths):
            print(f"width {width}: relative error of the loss trajectory {study.mean(i):.2e}")
        print(f"slope {study.slope:.3f}")
    return 0 if math.isfinite(study.slope) else 1
