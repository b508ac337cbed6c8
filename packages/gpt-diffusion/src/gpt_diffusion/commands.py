"""What the commands of :mod:`gpt_diffusion.cli` do. Results go to stdout, progress to stderr."""

import dataclasses
import datetime
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from zoo_common.checkpoint import save_checkpoint
from zoo_common.files import write_json
from zoo_common.formats import detect, open_source
from zoo_common.formats.convert import convert
from zoo_common.tasks import Task, get_task

from gpt_diffusion import downloads, generation, preparation, training
from gpt_diffusion import walk as walking
from gpt_diffusion.cli import (
    DownloadCommand,
    EvalCommand,
    GenerateCommand,
    ImportCommand,
    PrepareCommand,
    SampleCommand,
    TrainCommand,
    WalkCommand,
)
from gpt_diffusion.config import Config, config_to_yaml, load_config
from gpt_diffusion.device import choose_device
from gpt_diffusion.evaluation import as_sampler, batched_metric
from gpt_diffusion.evaluation import evaluate as prompt_and_judge
from gpt_diffusion.pretrained import Pretrained, load_pretrained
from gpt_diffusion.published import open_runs, split_runs


def generate(command: GenerateCommand) -> int:
    """Generate a zoo; 130 if Ctrl-C stopped it."""
    options = dataclasses.asdict(command)
    as_json = options.pop("json")
    options["runs"] = None if options.pop("forever") else command.runs
    report = generation.generate(options.pop("task"), progress=not as_json, **options)
    _show(dataclasses.asdict(report), as_json)
    stopped = getattr(report, "stopped", None)
    if stopped:
        smaller = "; nothing was finished: a smaller --chunk is sooner" if not report.model_steps else ""
        print(f"stopped ({stopped}); the same command goes on from here{smaller}", file=sys.stderr)
    return 130 if stopped == "interrupted" else 0


def prepare(command: PrepareCommand) -> None:
    """Check a zoo and print what was found."""
    options = dataclasses.asdict(command)
    as_json = options.pop("json")
    report = dataclasses.asdict(preparation.prepare(options.pop("directory"), progress=not as_json, **options))
    shown = report if as_json else {name: value for name, value in report.items() if value not in ({}, None)}
    _show(shown, as_json)
    if report["bad_files"] and not report["removed"]:
        print(
            "files that cannot be opened keep the zoo from being used: restore them, or use --delete", file=sys.stderr
        )


def train(command: TrainCommand) -> int:
    """Train a model; 130 if Ctrl-C stopped it."""
    overrides = list(command.overrides)
    overrides += [f"device={command.device}"] if command.device else []
    overrides += [f"rng_seed={command.seed}"] if command.seed is not None else []
    overrides += [f"train.objective={command.objective}"] if command.objective else []
    config = load_config(command.config, overrides)
    if command.show:
        print(config_to_yaml(config), end="")
        return 0
    if config.test_only:
        judged = EvalCommand(Path(str(config.resume_path)), device=config.device, data_dir=command.data_dir)
        evaluate(dataclasses.replace(judged, seed=config.rng_seed, json=command.json), config)
        return 0
    if command.dry_run:
        _show(dataclasses.asdict(training.forecast(config, data_dir=command.data_dir)), command.json)
        return 0
    report = training.train(
        config,
        resume=command.resume,
        data_dir=command.data_dir,
        limit_seconds=command.limit_seconds,
        quiet=command.json,
    )
    if int(os.environ.get("RANK", "0")) > 0:  # under torchrun, the first process speaks
        return 130 if report.interrupted else 0
    shown = {**dataclasses.asdict(report), "folder": str(report.folder), "finished": report.finished}
    _show(shown, command.json)
    if not report.finished:
        print(f"stopped at step {report.step} of {report.steps}; go on with --resume", file=sys.stderr)
    return 130 if report.interrupted else 0


def sample(command: SampleCommand) -> None:
    """Sample networks and write them to a file."""
    if command.num < 1 or command.recursive < 1:
        raise ValueError(f"--num ({command.num}) and --recursive ({command.recursive}) must be at least 1")
    if command.start is not None and command.num > 1:
        raise ValueError("--num is for random initialisations; with --start there is one network")
    for option, value in (("--prompt", command.prompt), ("--start-metric", command.start_metric)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{option} must be a finite number, got {value}")
    if not command.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {command.out}: the folder {command.out.absolute().parent} does not exist")
    pretrained, task = _open(command.model, command.device, command.data_dir, command.config, command.weights)
    starts = _starts(command.start, command.num, command.seed, pretrained, task)
    measure = batched_metric(task, pretrained.device)
    given = command.start_metric
    metrics = measure(starts) if given is None else torch.full((len(starts),), given, device=starts.device)
    observed = [metrics]
    with _progress(pretrained.config, command.recursive, command.json) as progress:
        sampler = as_sampler(pretrained, command.seed, progress)
        for _ in range(command.recursive):
            starts = sampler(torch.full_like(metrics, command.prompt), observed[-1], starts)
            observed.append(measure(starts))
    layout = pretrained.info.layout
    weights = layout.unflatten((starts if len(starts) > 1 else starts[0]).cpu())
    metadata = {"prompt": command.prompt, "metric": pretrained.info.metric, "observed": observed[-1].tolist()}
    save_checkpoint(command.out, weights, metadata)
    result = {
        "out": str(command.out),
        "networks": len(starts),
        "metric": pretrained.info.metric,
        "prompt": command.prompt,
        "start": observed[0].mean().item(),
        "reached": observed[-1].mean().item(),
    }
    _show(result, command.json)


def evaluate(command: EvalCommand, config: Config | None = None) -> None:
    """Judge a model by prompting training and unseen initialisations; ``config`` is for a ``.pt`` file."""
    pretrained, task = _open(command.model, command.device, command.data_dir, config or command.config, command.weights)
    count = command.networks or pretrained.config.vis.num_nets_per_gpu
    if count < 1:
        raise ValueError(f"--networks must be at least 1, got {count}")
    zoo = open_runs(pretrained.config.dataset, command.zoo)
    if zoo.layout.shapes != pretrained.info.layout.shapes:
        raise ValueError(f"{zoo.path}: the zoo holds networks of another layout than the model {command.model}")
    scores: dict[str, Any] = {}
    for group, split in (("training_set", "train"), ("test_set", "test")):
        runs = split_runs(zoo, pretrained.config.dataset, split)[:count]
        if not len(runs):
            raise ValueError(f"{zoo.path}: the zoo has no run in its {split} split")
        starts = zoo.params.gather(runs, np.zeros_like(runs))
        calls = 1 + pretrained.config.vis.recursive_steps
        with _progress(pretrained.config, calls, command.json, group) as progress:
            judged = prompt_and_judge(pretrained, task, starts, seed=command.seed, progress=progress)
        scores[group] = judged.to_json()
    if command.out is not None:
        write_json(command.out, scores)
    summary = {
        group: {key: value for key, value in score.items() if not isinstance(value, dict)}
        for group, score in scores.items()
    }
    _show(summary, command.json)


def walk(command: WalkCommand) -> None:
    """Film a walk through the latent space."""
    if command.out.suffix not in (".gif", ".mp4"):
        raise ValueError(f"--out {command.out}: a walk is written as .gif or .mp4")
    if not command.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {command.out}: the folder {command.out.absolute().parent} does not exist")
    if command.latents < 2 or command.points < 2:
        raise ValueError(f"--latents ({command.latents}) and --points ({command.points}) must be at least 2")
    pretrained, task = _open(command.model, command.device, command.data_dir)
    (start,) = _starts(command.start, 1, command.seed, pretrained, task)
    layout = pretrained.info.layout
    walking.first_layer(start[None], layout, task.input_shape)  # fails before the work
    metric = batched_metric(task, pretrained.device)(start[None]).item()
    prompt = task.best_prompt if command.prompt is None else command.prompt
    with _progress(pretrained.config, 1, command.json, "walk") as progress:
        networks = walking.walk(
            pretrained,
            start,
            prompt=prompt,
            start_metric=metric,
            latents=command.latents,
            points=command.points,
            seed=command.seed,
            progress=progress,
        )
    images = walking.frames(walking.first_layer(networks, layout, task.input_shape), scale=command.scale)
    strip = command.out.with_suffix(".png")
    walking.write_movie(command.out, images)
    walking.write_strip(strip, images)
    _show({"out": str(command.out), "strip": str(strip), "networks": len(networks), "prompt": prompt}, command.json)


def download(command: DownloadCommand) -> None:
    """Fetch released files and print where they are."""
    names = (*downloads.MODELS, *downloads.DATASETS) if command.name == "all" else (command.name,)
    options = {"server": command.server, "offline": command.offline, "progress": not command.json}
    found = [downloads.download(name, command.dir, **options) for name in names]
    shown = [{**dataclasses.asdict(entry), "path": str(entry.path)} for entry in found]
    _show(shown[0] if len(shown) == 1 else {entry["name"]: entry for entry in shown}, command.json)


def import_runs(command: ImportCommand) -> None:
    """Convert runs to a zoo and print what was done."""
    epochs = {"mnist": 468, "cifar10": 390}
    options: dict[str, Any] = {"task": command.task, "verify_done": command.verify_done, "progress": not command.json}
    steps = command.steps_per_epoch
    if steps is None and detect(command.source) == "gpt":
        with closing(open_source(command.source, "gpt", task=command.task)) as source:
            steps = epochs.get(str(source.task).split("_")[0])
    _show(
        dataclasses.asdict(convert(command.source, command.directory, steps_per_epoch=steps, **options)), command.json
    )


def _open(
    path: Path,
    device: str,
    data_dir: Path | None,
    config: str | Config | None = None,
    weights: Literal["ema", "raw"] | None = None,
) -> tuple[Pretrained, Task]:
    pretrained = load_pretrained(path, choose_device(device), config=config, weights=weights)
    return pretrained, get_task(pretrained.config.dataset.name, data_dir)


def _starts(given: Path | None, count: int, seed: int, pretrained: Pretrained, task: Task) -> Tensor:
    """Starting weights (n, D): from a file, or random initialisations."""
    layout = pretrained.info.layout
    if given is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            starts = layout.stack(task.constructor() for _ in range(count)).detach()
    else:
        if not given.is_file():
            raise FileNotFoundError(f"--start {given}: there is no such file")
        try:
            starts = layout.flatten(load_file(given))[None]
        except SafetensorError as error:
            raise ValueError(f"--start {given}: not a readable safetensors file ({error})") from None
        except ValueError as error:
            raise ValueError(f"--start {given}: {error}") from None
        if not starts.isfinite().all():
            raise ValueError(f"--start {given} holds NaN or infinite weights; nothing can be sampled from it")
    return starts.to(pretrained.device, torch.float32)


@contextmanager
def _progress(config: Config, calls: int, quiet: bool, title: str = "sample") -> Iterator[Callable[[int, int], None]]:
    """A bar over the denoising steps of several calls of the sampler."""
    with tqdm(total=calls * config.sampling.steps, desc=title, unit="step", disable=quiet, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.update()

        yield advance


def _show(result: dict[str, Any], as_json: bool, indent: str = "") -> None:
    if as_json:
        print(json.dumps(result, default=str))
        return
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _show(value, False, indent + "  ")
        elif name == "seconds":
            print(f"{indent}time: {datetime.timedelta(seconds=round(value))}")
        elif name.endswith("bytes"):
            print(f"{indent}{name}: {value / 1e6:.1f} MB")
        else:
            small = isinstance(value, float) and 0 < abs(value) < 1e-3
            shown = f"{value:.3g}" if small else f"{value:,.4f}" if isinstance(value, float) else value
            print(f"{indent}{name}: {shown}")
