"""What ``sane zoo`` does: make a zoo, look into one."""

import dataclasses
import json
import re
import sys
from typing import Any

import numpy as np
from zoo_common.zoo import Zoo

from sane.cli import ZooInspectCommand, ZooTrainCommand
from sane.commands import show
from sane.generation import ZooPlan, train_zoo
from sane.properties import DEFAULTS, read_property


def zoo_train(command: ZooTrainCommand) -> int:
    """Make a zoo; 130 if Ctrl-C stopped it."""
    plan = ZooPlan(
        command.network,
        command.data,
        command.epochs,
        _epochs(command.save),
        dict(_setting(text) for text in command.settings),
        command.train_images,
        command.test_images,
        None if command.start is None else str(command.start),
    )
    report = train_zoo(
        plan,
        command.directory,
        runs=command.runs,
        seed=command.seed,
        chunk=command.chunk,
        split=command.split,
        data_dir=command.data_dir,
        download=command.download,
        device=command.device,
        ray=command.ray,
        limit_seconds=command.limit_seconds,
        quiet=command.json,
    )
    show({**dataclasses.asdict(report), "path": str(report.path)}, command.json)
    if report.stopped:
        sys.stderr.write(f"stopped ({report.stopped}); the same command goes on from here\n")
    return 130 if report.stopped == "interrupted" else 0


def _setting(text: str) -> tuple[str, tuple[Any, ...]]:
    """A hyper-parameter and its values, as numbers where they are such."""
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise ValueError(
            f"{text!r}: give hyper-parameters as KEY=VALUE or KEY=VALUE,VALUE, for example optim::lr=0.001,0.003"
        )
    return key, tuple(_value(value) for value in values.split(","))


def _value(text: str) -> Any:  # noqa: ANN401
    """A number, a list of them (64x32), nothing (none), or a name."""
    if re.fullmatch(r"\d+(x\d+)+", text):
        return [int(part) for part in text.split("x")]
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError:
        return None if text.lower() == "none" else text
    return value


def _epochs(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"--save {text!r}: give epochs as 0,1,5,10") from None


def zoo_inspect(command: ZooInspectCommand) -> None:
    """Say what a zoo holds."""
    zoo = Zoo.open(command.zoo)
    counts = {split: len(zoo.split(split)) for split in ("train", "validation", "test")}
    runs = np.repeat(np.arange(len(zoo)), [run.checkpoints for run in zoo.runs])
    checkpoints = np.concatenate([np.zeros(0, np.int64), *(np.arange(run.checkpoints) for run in zoo.runs)])
    spread: dict[str, Any] = {}
    for name in dict.fromkeys([*DEFAULTS, *zoo.metrics]):
        try:
            values = read_property(zoo, name, runs, checkpoints)
        except KeyError:
            continue
        known = values[np.isfinite(values)]
        if len(known):
            spread[name] = dict(
                zip(("least", "median", "largest"), map(float, np.quantile(known, (0, 0.5, 1))), strict=True)
            )
    show(
        {"runs": len(zoo), "checkpoints": len(runs), "parameters": zoo.layout.size, **counts, "properties": spread},
        command.json,
    )
