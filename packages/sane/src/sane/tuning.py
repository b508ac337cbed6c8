"""A grid of pretrainings with Ray Tune (extra ``tune``)."""

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sane.config import Config, config_to_yaml, load_config, yaml_value
from sane.pretraining import pretrain


def tune(config: Config, choices: Sequence[str]) -> dict[str, Any]:
    """Train every combination of choices, each in a folder of its own beside the others.

    Args:
        config: What all have in common.
        choices: ``key=value,value,...`` each, for example ``training.gamma=0.05,0.5``.

    Returns:
        ``best`` (name and settings of the least validation loss) and ``trials`` (name to its last metrics).

    Raises:
        ImportError: The extra ``tune`` is missing.
        FileExistsError: The folder holds a single training.
        ValueError: A choice is not of this form, or a value does not fit; nothing is trained.
    """
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # workers use this environment as it is
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import tune as ray_tune
    except ImportError as error:
        raise ImportError("--tune needs Ray Tune: pip install 'sane[tune]'") from error
    space: dict[str, list[Any]] = {}
    for choice in choices:
        key, separator, text = choice.partition("=")
        if not separator or not text:
            raise ValueError(
                f"--tune {choice!r} must have the form key=value,value, for example training.gamma=0.05,0.5"
            )
        values = yaml_value(f"[{text}]")
        space[key] = [str(Path(value).absolute()) for value in values] if key in ("prepared", "zoo") else values
    common = config_to_yaml(
        dataclasses.replace(
            config,
            prepared=str(Path(config.prepared).absolute()),  # trials run in folders of their own
            zoo=None if config.zoo is None else str(Path(config.zoo).absolute()),
        )
    )
    folder = config.folder.absolute()
    if (folder / "config.yaml").exists():
        raise FileExistsError(f"{folder} holds a single training: give another name, with name=NAME before --tune")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "common.yaml").write_text(common)
    for key, values in space.items():
        for value in values:
            load_config(folder / "common.yaml", [f"{key}={value}"])

    def trial(chosen: dict[str, Any]) -> None:
        name = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in chosen.items()).replace("/", "_")
        one = load_config(
            folder / "common.yaml", [*(f"{k}={v}" for k, v in chosen.items()), f"name={name}", f"out_dir={folder}"]
        )
        report = pretrain(one, resume=(one.folder / "config.yaml").exists(), quiet=True)
        lines = [json.loads(line) for line in (report.folder / "metrics.jsonl").read_text().splitlines()]
        last: dict[str, Any] = {}
        for line in lines:
            last |= line
        ray_tune.report({"name": name, **last})

    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    tuner = ray_tune.Tuner(
        trial,
        param_space={key: ray_tune.grid_search(values) for key, values in space.items()},
        run_config=ray_tune.RunConfig(name="ray", storage_path=str(folder), verbose=0),
    )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Ray's table is progress
            results = tuner.fit()
    finally:
        if own:
            ray.shutdown()
    if len(results.errors) == len(results):
        reason = str(results.errors[0]).strip().splitlines()[-1]  # of the traceback
        raise ValueError(f"every trial has failed, the first one with: {reason}")
    found = [results[k] for k in range(len(results))]
    trials = {r.metrics["name"]: {**(r.config or {}), **r.metrics} for r in found if r.metrics}
    score = {name: row.get("loss_validation", row.get("loss", float("inf"))) for name, row in trials.items()}
    best = min(score, key=lambda name: score[name])
    return {"best": best, "trials": trials, "failed": len(results.errors)}
