"""Unit tokens and layer tokens beside trivial rivals, on MNIST, CIFAR-10 or cart-pole: what one prompt gives.

    uv run examples/study.py mnist --folder mnist-study --data-dir DIR

1. A zoo is generated: SGD on images, of which the last training images are held out, or PPO on cart-pole.
2. Models are trained on it: unit tokens and the published layer tokens, both of one width, for the same seconds; and layer
   tokens with as many parameters as the unit tokens, for as many steps.
3. All are prompted from the same unseen initialisations, beside the rivals of the quick start.

Prompts and stored metrics come from held-out images (cart-pole: one set of starts), scores from test images (another set).
The folder keeps everything; the same command goes on where it was stopped.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # waiting threads sleep: spinning ruins the speed of a busy machine

import torch
import tyro
from gpt_diffusion import Config, Pretrained, load_config, load_pretrained, novelty_report, train
from gpt_diffusion.cartpole.task import ENVS, mean_returns_of
from gpt_diffusion.evaluation import batched_metric
from gpt_diffusion.generation import generate
from gpt_diffusion.pretrained import ModelInfo, build_model
from gpt_diffusion.training import forecast
from quickstart import Prompted, Unseen, look_at, plot, print_rows, prompt, rivals, row, say, unseen_weights
from torch import Tensor
from zoo_common.datasets import Part, Splits
from zoo_common.files import atomic_write
from zoo_common.layout import ParameterLayout
from zoo_common.tasks import Task, classification_loss, get_task, register_task
from zoo_common.zoo import Zoo

OTHER_STARTS = 1  # seed of the cart-pole starts that scores come from; prompts have those of the task, seed 0


@dataclass(frozen=True)
class Setting:
    """How the zoo of a task is made."""

    runs: int
    steps: int
    checkpoints: int
    score: str
    metric: str
    options: dict[str, Any]
    held_out: int = 0
    """Training images that no network is trained on: prompts and stored metrics come from them."""
    test: int = 10_000
    """Test images that are used."""
    width: int = 128
    """Width of the models: unit tokens of networks with more units take more time."""


SETTINGS = {
    "digits": Setting(2240, 1000, 42, "test accuracy", "validation loss", {"strategy": "stacked"}),
    "mnist": Setting(
        1100, 2000, 50, "test accuracy", "validation loss", {"strategy": "stacked", "share_batches": 4}, held_out=5000
    ),
    "cifar10": Setting(
        100,
        400,
        20,
        "test accuracy",
        "validation loss",
        {"strategy": "loop", "split": (0.7, 0.1, 0.2)},
        held_out=2000,
        test=2000,
        width=64,
    ),
    "cartpole": Setting(
        160, 400, 50, "return", "return", {"strategy": "stacked", "envs": 64, "split": (0.8, 0.05, 0.15)}, width=64
    ),
}


@dataclass(frozen=True)
class Study:
    """Options of the study."""

    task: tyro.conf.Positional[Literal["digits", "mnist", "cifar10", "cartpole"]]
    """What the networks do."""
    folder: Path
    """Keeps zoo, models and results."""
    data_dir: Path | None = None
    """Folder with the images of MNIST or CIFAR-10."""
    runs: int | None = None
    """Networks to train for the zoo; default: 1,100 of MNIST, 100 of CIFAR-10, 160 of cart-pole."""
    steps: int | None = None
    """Steps of each of them; default: 2,000 of MNIST, 400 of CIFAR-10, 400 iterations of PPO on cart-pole."""
    seconds: float = 150
    """Training of each model."""
    networks: int = 32
    """Unseen random initialisations to prompt."""
    seed: int = 0
    """Seed of everything."""
    json: bool = False
    """Print one JSON object as the last line."""


def main() -> int:
    """Run the command line; returns the exit status."""
    try:
        options = tyro.cli(Study, description=__doc__)
        result = study(options)
    except (ValueError, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("study: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(result))
    return 0


def study(options: Study) -> dict[str, Any]:
    """The whole study; returns the figures, which are also in ``results.json``."""
    began, setting, task = time.monotonic(), SETTINGS[options.task], the_task(options)
    say(f"1/3  the zoo: {options.folder / 'zoo'}")
    zoo = make_zoo(options, task)
    unseen = returns_of(zoo, task, options.networks) if task.splits is None else look_at(zoo, task, options.networks)
    say(f"2/3  models, {options.seconds:.0f} s each")
    models = train_models(options, task)
    say("3/3  prompting")
    prompted = {title: prompt(title, model, unseen, options.seed) for title, model in models.items()}
    desired = next(iter(prompted.values())).curves.desired
    table = [
        row("random initialisation", unseen.score(unseen.starts)),
        row("their own runs", unseen.score(unseen.ends), own=(1.0, 1.0)),
        *(r for result in prompted.values() for r in result.rows),
        *rivals(unseen, desired, options.seed),
    ]
    print_rows(table, setting.score, 1 if task.splits is None else 3)
    curves = {title: result.curves for title, result in prompted.items()}
    plot(table, curves, options.folder / "results.png", setting.score, setting.metric)
    found = {
        "task": task.name,
        "models": {title: describe(models[title], result, unseen) for title, result in prompted.items()},
        "table": [asdict(r) for r in table],
        "seconds": round(time.monotonic() - began, 1),
    }
    with atomic_write(options.folder / "results.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    for title, about in found["models"].items():
        print(
            f"{title}: {about['parameters']:,} parameters, {about['steps']} steps; {about['novelty']['verdict']}, median "
            f"distance {about['novelty']['median_distance_to_unseen']:.2f} of an unseen run's; scores of the starts and "
            f"after each step {', '.join(f'{s:.3g}' for s in about['scores'])}; random prompts {about['random_prompts']:.3g}"
        )
    return found


def make_zoo(options: Study, task: Task) -> Zoo:
    """Train the networks to learn from, or go on with them."""
    setting = SETTINGS[options.task]
    steps = options.steps or setting.steps
    generate(
        task,
        options.folder / "zoo",
        runs=options.runs or setting.runs,
        steps=steps,
        save_points="geometric",
        save_count=min(setting.checkpoints, steps + 1),
        seed=options.seed,
        **setting.options,
    )
    return Zoo.open(options.folder / "zoo")


def the_task(options: Study) -> Task:
    """The published task; for images with a validation part that is cut off the training images."""
    if options.task in ("digits", "cartpole"):
        return get_task("cartpole" if options.task == "cartpole" else "digits_loss")
    published = get_task(f"{options.task}_loss", options.data_dir)
    last, first = SETTINGS[options.task].held_out, SETTINGS[options.task].test

    def splits() -> Splits:
        assert published.splits is not None
        (images, labels), _, test = published.splits()
        train, held_out = (Part(images[rows], labels[rows]) for rows in (slice(-last), slice(-last, None)))
        return Splits(train, held_out, Part(test.images[:first], test.labels[:first]))

    register_task(
        f"{options.task}_held_out",
        {
            "task_test_fn": classification_loss,
            "constructor": published.constructor,
            "data_fn": lambda: tuple(splits().validation),
            "minimize": True,
            "best_prompt": published.best_prompt,
            "recursive_prompt": published.recursive_prompt,
            "metric_name": "val_loss",
            "input_shape": published.input_shape,
            "recipe": published.recipe,
            "splits": splits,
        },
    )
    return get_task(f"{options.task}_held_out")


def returns_of(zoo: Zoo, task: Task, networks: int) -> Unseen:
    """Unseen actors; they are prompted by the returns from one set of starts, and judged by those from another."""
    layout, metric = ParameterLayout.from_module(task.constructor()), batched_metric(task, torch.device("cpu"))
    starts, ends = unseen_weights(zoo, networks)

    def score(vectors: Tensor) -> Tensor:
        return mean_returns_of(vectors, layout, envs=ENVS, seed=OTHER_STARTS)

    return Unseen(task, zoo, starts, ends, metric(starts), metric, score)


def train_models(options: Study, task: Task) -> dict[str, Pretrained]:
    """Train what is to be compared, by titles."""
    published = load_config(options.task if options.task in ("cartpole",) else f"{options.task}_loss").transformer
    layers = [
        "transformer.tokens=layers",
        f"transformer.split_policy={published.split_policy}",
        f"transformer.chunk_size={published.chunk_size}",
    ]
    variants = {"units": [], "layers": layers}
    if task.splits is not None:
        variants = {"units_behaviour": ["train.behaviour_weight=0.3"], **variants}
    steps = steps_for(options, {name: settings(options, task, name, changes) for name, changes in variants.items()})
    models = {name: trained(options, task, name, changes, steps[name]) for name, changes in variants.items()}
    info, size = models["units"].info, count(models["units"])
    width = min(
        range(16, 513, 16),
        key=lambda n: abs(size_of(settings(options, task, "", [*layers, f"transformer.n_embd={n}"]), info) - size),
    )
    if width != models["layers"].config.transformer.n_embd:
        sized = [*layers, f"transformer.n_embd={width}"]
        models["layers_sized"] = trained(options, task, "layers_sized", sized, steps["units"])
    titles = {
        "units_behaviour": "unit tokens + behaviour term",
        "units": "unit tokens",
        "layers": "layer tokens, same width and seconds",
        "layers_sized": f"layer tokens, same parameters (width {width}) and steps",
    }
    return {titles[name]: model for name, model in models.items()}


def settings(options: Study, task: Task, name: str, changes: list[str], steps: int = 1000) -> Config:
    """The configuration of one model."""
    common = [
        f"exp_name={name or 'model'}",
        f"out_dir={options.folder}",
        f"dataset.name={task.name}",
        f"dataset.path={options.folder / 'zoo'}",
        f"rng_seed={options.seed}",
        f"train.max_steps={steps}",
        "train.behaviour_weight=0",
        f"transformer.n_embd={SETTINGS[options.task].width}",
        "vis.recursive_steps=4",
    ]
    return load_config("digits_loss", [*common, *changes])


def steps_for(options: Study, configs: dict[str, Config]) -> dict[str, int]:
    """How many steps of each model take the seconds asked for; measured in turns, and remembered."""
    path = options.folder / "steps.json"
    if path.exists():
        steps: dict[str, int] = json.loads(path.read_text())
        return steps
    times: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(3):
        for name, config in configs.items():
            found = forecast(config, data_dir=options.data_dir, timed_steps=10)
            times[name].append(found.seconds / found.steps)
    steps = {name: max(10, round(options.seconds / min(seconds))) for name, seconds in times.items()}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(steps))
    return steps


def trained(options: Study, task: Task, name: str, changes: list[str], steps: int) -> Pretrained:
    """Train one model, or go on with it."""
    config = settings(options, task, name, changes, steps)
    if not (config.folder / "model.safetensors").exists():
        train(config, resume=config.folder.exists(), data_dir=options.data_dir)
    return load_pretrained(config.folder)


def size_of(config: Config, info: ModelInfo) -> int:
    """Parameters of the model of a configuration."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config.transformer, info).parameters())


def count(model: Pretrained) -> int:
    """Parameters of a model."""
    return sum(p.numel() for p in model.model.parameters())


def describe(model: Pretrained, result: Prompted, unseen: Unseen) -> dict[str, Any]:
    """What the table does not say of a model."""
    return {
        "parameters": count(model),
        "steps": model.config.train.max_steps,
        "scores": result.scores,
        "random_prompts": result.shuffled_prompt_score,
        "novelty": novelty_report(result.samples[0], unseen.zoo, unseen.task).summary(),
    }


if __name__ == "__main__":
    sys.exit(main())
