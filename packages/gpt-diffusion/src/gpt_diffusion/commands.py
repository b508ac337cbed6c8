"""What the commands of :mod:`gpt_diffusion.cli` do. Results go to stdout, progress to stderr."""

import dataclasses
import datetime
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from zoo_common.checkpoint import load_checkpoint, save_checkpoint
from zoo_common.files import write_json
from zoo_common.formats import detect, open_source
from zoo_common.formats.convert import convert
from zoo_common.layout import ParameterLayout
from zoo_common.tasks import Task, get_task, task_names
from zoo_common.zoo import Zoo

from gpt_diffusion import against, downloads, figures, generation, preparation, training
from gpt_diffusion import walk as walking
from gpt_diffusion.cli import (
    DownloadCommand,
    EvalCommand,
    GenerateCommand,
    ImportCommand,
    NoveltyCommand,
    PrepareCommand,
    SampleCommand,
    TasksCommand,
    TrainCommand,
    WalkCommand,
)
from gpt_diffusion.config import Config, DatasetConfig, config_to_yaml, load_config
from gpt_diffusion.curves import (
    GRADIENT,
    GROUPS,
    KINDS,
    Curves,
    curve_name,
    dvo_curves,
    read_curves,
    recursive_curves,
    write_curves,
)
from gpt_diffusion.device import choose_device
from gpt_diffusion.evaluation import Evaluation, as_sampler, batched_metric, best_metric, trajectory_prompts
from gpt_diffusion.evaluation import evaluate as prompt_and_judge
from gpt_diffusion.pretrained import KIND, Pretrained, load_pretrained
from gpt_diffusion.published import open_runs, split_runs
from gpt_diffusion.trust import NoveltyReport, novelty_report


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
        judged = EvalCommand(
            Path(str(config.resume_path)),
            device=config.device,
            data_dir=command.data_dir,
            curve_files=Path("figure_files", config.exp_name),
            seed=config.rng_seed,
            json=command.json,
        )
        evaluate(judged, config)
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
        raise ValueError("--num is for random initialisations; with --start the file says how many networks there are")
    _check_number("--prompt", command.prompt)
    _check_number("--start-metric", command.start_metric)
    if not command.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {command.out}: the folder {command.out.absolute().parent} does not exist")
    pretrained, task = _open(command.model, command.device, command.data_dir, command.config, command.weights)
    _check_prompt(command.prompt, pretrained)
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
    if not command.no_novelty:
        result["novelty"] = _novelty_in_short(
            starts, Path(pretrained.config.dataset.path), task, command, pretrained.config.dataset
        )
    _show(result, command.json)


def evaluate(command: EvalCommand, config: Config | None = None) -> None:
    """Judge a model by prompting training and unseen initialisations; ``config`` is for a ``.pt`` file."""
    optimizers = against.check_optimizers(command.against) if command.against else ()
    if command.against_steps is not None and command.against_steps < 1:
        raise ValueError(f"--against-steps must be at least 1, got {command.against_steps}")
    drawing = _can_draw(command.figures)
    beside = _published_curves(command.beside) if command.beside is not None else {}
    out = _eval_file(command)
    pretrained, task = _open(command.model, command.device, command.data_dir, config or command.config, command.weights)
    if optimizers and (task.recipe is None or task.splits is None):
        raise ValueError(f"--against: task {task.name!r} has no training recipe for supervised runs")
    vis = pretrained.config.vis
    count = vis.num_nets_per_gpu if command.networks is None else command.networks
    if count < 1:
        raise ValueError(f"--networks must be at least 1, got {count}")
    zoo = open_runs(pretrained.config.dataset, command.zoo)
    if zoo.layout.shapes != pretrained.info.layout.shapes:
        raise ValueError(f"{zoo.path}: the zoo holds networks of another layout than the model {command.model}")
    if pretrained.info.metric not in zoo.metrics:
        raise ValueError(f"{zoo.path}: no metric {pretrained.info.metric!r}; the zoo has {', '.join(zoo.metrics)}")
    table = torch.from_numpy(zoo.metrics[pretrained.info.metric].padded())
    judged, optima = {}, {}
    for group, split in GROUPS.items():
        every = split_runs(zoo, pretrained.config.dataset, split)
        if not len(every):
            raise ValueError(f"{zoo.path}: the zoo has no run in its {split} split")
        optima[group] = best_metric(table[every], task.minimize)
        runs = every[:count]
        drawn = command.prompts == "trajectory"
        prompts = trajectory_prompts(table[runs], vis.dvo_steps, task.minimize) if drawn else None
        starts = zoo.params.gather(runs, np.zeros_like(runs))
        with _progress(pretrained.config, 1 + vis.recursive_steps, command.json, group) as progress:
            judged[group] = prompt_and_judge(
                pretrained, task, starts, prompts=prompts, seed=command.seed, progress=progress
            )
    scores: dict[str, Any] = {group: evaluation.to_json() for group, evaluation in judged.items()}
    summary: dict[str, Any] = {
        group: {key: value for key, value in score.items() if not isinstance(value, dict)}
        for group, score in scores.items()
    }
    rivals = _rivals(optimizers, command, pretrained, task, zoo, starts, judged["test_set"]) if optimizers else []
    if rivals:
        scores["against"] = {rival.optimizer: rival.to_json() for rival in rivals}
        summary["against"] = {
            rival.optimizer: {"median_steps": rival.median, "interval": rival.interval, "words": rival.words}
            for rival in rivals
        }
    if not command.no_novelty:
        summary["novelty"] = _novelty_in_short(
            judged["test_set"].samples, zoo.path, task, command, pretrained.config.dataset
        )
        scores["novelty"] = summary["novelty"]
    scores["figures"] = _curves(judged, optima, rivals)
    if command.curve_files is not None:
        summary["curve_files"] = [str(path) for path in write_curves(command.curve_files, scores["figures"])]
    if out is not None:
        write_json(out, scores)
        summary["curves"] = str(out)
    if out is not None and drawing:
        stem, metric = out.with_suffix(""), pretrained.info.metric
        files = figures.draw_evaluation(judged, optima, metric, stem, scores["figures"], beside)
        files += [figures.draw_rivals(judged["test_set"], rivals, metric, stem)] if rivals else []
        summary["figures"] = [str(file) for file in files]
    elif command.figures == "auto" and out is not None:
        summary["figures"] = "none: matplotlib is missing (pip install 'gpt-diffusion[plot]')"
    _show(summary, command.json)


def _curves(
    judged: Mapping[str, Evaluation], optima: Mapping[str, float], rivals: Sequence[against.Rival]
) -> dict[str, Curves]:
    """The published figure files by name; the first rival is the optimizer in them."""
    found = {}
    for group, evaluation in judged.items():
        gradient = None
        if rivals and group == "test_set":
            updates = evaluation.recursive.desired.shape[1]
            shown = [i for i, step in enumerate(rivals[0].steps) if step <= updates]
            gradient = (GRADIENT, [float(rivals[0].steps[i]) for i in shown], [rivals[0].mean[i] for i in shown])
        optimum = optima[group]
        found[curve_name("dvo", group)] = dvo_curves(evaluation.one_step, group, optimum)
        found[curve_name("recursive", group)] = recursive_curves(evaluation.recursive, group, optimum, gradient)
    return found


def _published_curves(folder: Path) -> dict[str, Curves]:
    """Those of the figure files of another evaluation that are in a folder."""
    paths = {name: folder / f"{name}.pt" for group in GROUPS for name in (curve_name(k, group) for k in KINDS)}
    found = {name: read_curves(path) for name, path in paths.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(
            f"--beside {folder}: there is none of {', '.join(path.name for path in paths.values())}"
        )
    return found


def novelty(command: NoveltyCommand) -> None:
    """Tell copies of training checkpoints from new networks."""
    if command.num < 1:
        raise ValueError(f"--num must be at least 1, got {command.num}")
    _check_number("--prompt", command.prompt)
    if command.out is not None and not command.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {command.out}: the folder {command.out.absolute().parent} does not exist")
    given = command.source if _is_weights(command.source) else command.samples
    if given is command.source and command.samples is not None:
        raise ValueError(f"{command.source} holds networks, not a model; give one of it and --samples")
    if given is command.source:
        if command.zoo is None:
            raise ValueError(f"{given} holds networks; say with --zoo which runs they may be copies of")
        zoo = _open_zoo(command.zoo)
        if zoo.task is None:
            raise ValueError(f"{zoo.path}: the zoo does not say its task; give a model and --samples {given}")
        task, pretrained = get_task(zoo.task, command.data_dir), None
    else:
        pretrained, task = _open(command.source, command.device, command.data_dir)
        zoo = _open_zoo(command.zoo or Path(pretrained.config.dataset.path))
        if zoo.layout.shapes != pretrained.info.layout.shapes:
            raise ValueError(f"{zoo.path}: the zoo holds networks of another layout than the model {command.source}")
    if given is not None:
        networks = _read_networks(given, zoo)
    else:
        assert pretrained is not None, "without a file there is a model"
        _check_prompt(command.prompt, pretrained)
        starts = _starts(None, command.num, command.seed, pretrained, task)
        metrics = batched_metric(task, pretrained.device)(starts)
        prompt = task.best_prompt if command.prompt is None else command.prompt
        with _progress(pretrained.config, 1, command.json) as progress:
            networks = as_sampler(pretrained, command.seed, progress)(torch.full_like(metrics, prompt), metrics, starts)
    data = pretrained.config.dataset if pretrained is not None and command.zoo is None else None
    report = _compare(networks, zoo, task, command, data)
    if command.out is not None:
        write_json(command.out, report.to_json())
    print(json.dumps(report.to_json()) if command.json else report.text())


def _open_zoo(path: Path) -> Zoo:
    """A zoo whose checkpoints can all be looked at in reasonable time."""
    if not (path / "zoo.json").exists() and path.is_dir() and detect(path) == "gpt":
        raise ValueError(f"{path} holds runs in the published format: make a zoo of them with `gpt-diffusion import`")
    return Zoo.open(path)


def _compare(
    networks: Tensor,
    zoo: Zoo,
    task: Task,
    command: NoveltyCommand | SampleCommand | EvalCommand,
    data: DatasetConfig | None,
) -> NoveltyReport:
    """The report on networks, with a progress bar; ``data`` says which runs of the zoo a model was trained on."""
    split = None if data is None else lambda name: split_runs(zoo, data, name)
    with tqdm(desc="novelty", unit="checkpoint", disable=command.json, leave=False, delay=0.5) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return novelty_report(networks, zoo, task, seed=command.seed, split=split, progress=advance)


def _novelty_in_short(
    networks: Tensor, zoo: Path, task: Task, command: SampleCommand | EvalCommand, data: DatasetConfig
) -> dict[str, Any]:
    """The report without its samples, or why there is none."""
    try:
        return _compare(networks, _open_zoo(zoo), task, command, data).summary()
    except (ValueError, FileNotFoundError) as error:
        return {"verdict": f"not checked: {error}"}


def _is_weights(path: Path) -> bool:
    """Whether a file holds networks instead of a model."""
    if not path.is_file():
        return False
    try:
        return load_checkpoint(path).metadata.get("kind") != KIND
    except ValueError:
        return True


def _read_networks(path: Path, zoo: Zoo) -> Tensor:
    """Networks (n, D) of a safetensors file: one state dict, or stacked tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        networks = zoo.layout.flatten(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: not networks like those of {zoo.path}: {error}") from None
    return networks.float().view(-1, zoo.layout.size)


def _can_draw(wanted: str) -> bool:
    try:
        if wanted != "no":
            figures.check_matplotlib()
        return wanted != "no"
    except ImportError:
        if wanted == "yes":
            raise
        return False


def _eval_file(command: EvalCommand) -> Path | None:
    """Where the curves go; None for a model on a hub without --out. Fails before the work if it cannot be written."""
    path, model = command.out, command.model
    if path is None and model.exists():
        path = (model if model.is_dir() else model.parent) / "eval.json"
    if path is None:
        return None
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"--out {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not writable: say with --out where the curves go")
    return path


def _rivals(
    optimizers: tuple[str, ...],
    command: EvalCommand,
    pretrained: Pretrained,
    task: Task,
    zoo: Zoo,
    starts: Tensor,
    judged: Evaluation,
) -> list[against.Rival]:
    """Train the starts of the unseen runs with each optimizer."""
    judges = zoo.split("validation")[: against.JUDGES]
    if "adam" in optimizers and not len(judges):
        raise ValueError(f"{zoo.path}: the zoo has no validation run to choose the learning rate of adam with")
    assert task.recipe is not None and task.splits is not None, "checked before"
    steps = command.against_steps or task.recipe.total_steps(len(task.splits().train.images))
    total = against.model_steps(optimizers, len(starts), len(judges), steps)
    with tqdm(total=total, desc="against", unit="step", unit_scale=True, disable=command.json, leave=False) as bar:
        return [
            against.hold_against(
                name,
                task,
                starts,
                judged.reached,
                zoo.params.gather(judges, np.zeros_like(judges)),
                batched_metric(task, torch.device("cpu")),
                seed=command.seed,
                steps=steps,
                device=command.device,
                tick=bar.update,
            )
            for name in optimizers
        ]


def walk(command: WalkCommand) -> None:
    """Film a walk through the latent space."""
    if command.out.suffix not in (".gif", ".mp4"):
        raise ValueError(f"--out {command.out}: a walk is written as .gif or .mp4")
    if not command.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {command.out}: the folder {command.out.absolute().parent} does not exist")
    if command.latents < 2 or command.points < 2:
        raise ValueError(f"--latents ({command.latents}) and --points ({command.points}) must be at least 2")
    _check_number("--prompt", command.prompt)
    pretrained, task = _open(command.model, command.device, command.data_dir)
    _check_prompt(command.prompt, pretrained)
    start, *others = _starts(command.start, 1, command.seed, pretrained, task)
    if others:
        raise ValueError(f"--start {command.start} holds {1 + len(others)} networks; a walk begins at one")
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


def tasks(command: TasksCommand) -> None:
    """Print the tasks."""
    found: dict[str, dict[str, Any]] = {}
    for name in task_names():
        try:
            task = get_task(name)
        except ValueError as error:  # a package's entry point that does not work
            found[name] = {"error": str(error)}
            continue
        found[name] = {"metric": task.metric_name, "goal": "low" if task.minimize else "high"}
        found[name] |= {"best_prompt": task.best_prompt, "recursive_prompt": task.recursive_prompt}
        found[name]["weights"] = ParameterLayout.from_module(task.constructor()).size
    if command.json:
        print(json.dumps(found))
        return
    for name, row in found.items():
        print(f"{name:20}", row.get("error") or "  ".join(f"{key} {value}" for key, value in row.items()))


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


def _check_number(option: str, value: float | None) -> None:
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{option} must be a finite number, got {value}")


def _check_prompt(prompt: float | None, pretrained: Pretrained) -> None:
    """Warn of a given prompt that the model cannot know."""
    if prompt is not None and (message := pretrained.info.outside(prompt)):
        print(f"warning: {message}", file=sys.stderr)


def _starts(given: Path | None, count: int, seed: int, pretrained: Pretrained, task: Task) -> Tensor:
    """Starting weights (n, D): all of a file, or random initialisations."""
    layout = pretrained.info.layout
    if given is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            starts = layout.stack(task.constructor() for _ in range(count)).detach()
    else:
        if not given.is_file():
            raise FileNotFoundError(f"--start {given}: there is no such file")
        try:
            starts = layout.flatten(load_file(given)).view(-1, layout.size)
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
