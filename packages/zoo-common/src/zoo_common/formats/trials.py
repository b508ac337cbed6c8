"""Trial folders of Ray Tune, as SANE publishes zoos.

::

    <trial>/params.json                      config of the run
    <trial>/result.json                      one JSON object per line: training_iteration (the epoch) and metrics
    <trial>/checkpoint_000021/checkpoints    state dict of epoch 21, written by torch.save (or: checkpoint_21/)

In a zoo, the numbers of an epoch's line are metrics, and its step is the epoch. What else the lines hold stands in the
config under ``from_trial``: ``constants`` (entries that all lines share) and the ``lines`` of epochs without a checkpoint.
"""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo_common.files import atomic_folder, write_json
from zoo_common.formats.source import clean, folders, is_number, measured, named, read_object, rising
from zoo_common.formats.state_dicts import StateDictRuns
from zoo_common.layout import ParameterLayout
from zoo_common.shard import Numbers, Run

_EPOCH, _STEP = "training_iteration", "optimizer_step"
_ORIGIN = "from_trial"
"""Key of a run's config with what the lines of ``result.json`` hold beside the metrics of the checkpoints."""
_MOST_FILLERS = 100_000


class TrialRuns(StateDictRuns):
    """Trials in name order.

    Args:
        path: Folder of the trial folders.
        epochs: Which checkpoints to read; default: all there are.
        checkpoint_index_step: Epochs between two numbers of checkpoint folders, where they are counted (by newer Ray).
        checkpoint_index_offset: Epoch of folder 0.

    Raises:
        ValueError: ``checkpoint_index_step`` below 1 or ``checkpoint_index_offset`` below 0.
    """

    def __init__(
        self,
        path: Path,
        epochs: Sequence[int] = (),
        checkpoint_index_step: int = 1,
        checkpoint_index_offset: int = 0,
    ) -> None:
        super().__init__(path)
        self._epochs = sorted(set(epochs))
        self._step, self._offset = checkpoint_index_step, checkpoint_index_offset
        if self._step < 1 or self._offset < 0:
            raise ValueError(
                "checkpoint_index_step must be at least 1 and checkpoint_index_offset not negative, got "
                f"{self._step} and {self._offset}"
            )
        self._trials = named((folder.name, folder) for folder in folders(path))
        self.run_ids = tuple(self._trials)

    def checkpoints(self, run_id: str) -> list[tuple[int, Path]]:
        """Epoch and file of every checkpoint; a folder ``checkpoint_21`` goes before ``checkpoint_000021``."""
        trial = self._trials[run_id]
        there: dict[int, Path] = {}
        for folder in folders(trial):
            match = re.fullmatch(r"checkpoint_(\d{1,18})", folder.name)
            epoch = self._offset + self._step * int(match[1]) if match else -1
            if match and (epoch not in there or match[1] == str(int(match[1]))):
                there[epoch] = folder
        wanted = self._epochs or sorted(there)
        return [(epoch, there.get(epoch, trial / self._name(epoch)) / "checkpoints") for epoch in wanted]

    def _name(self, epoch: int) -> str:
        """Name of a folder that is missing; of an epoch between two folders it is none that can be there."""
        number, rest = divmod(epoch - self._offset, self._step)
        return f"checkpoint_{number:06d}" + (f".{rest}" if rest else "")

    def facts(self, run_id: str, epochs: list[int]) -> tuple[list[int], Mapping[str, Numbers], dict[str, object]]:
        """Metrics of the epochs read, and the config."""
        trial = self._trials[run_id]
        lines, damaged = _lines(trial / "result.json")
        by_epoch = {_epoch(line, position): line for position, line in enumerate(lines)}
        rows = [by_epoch.get(epoch, {}) for epoch in epochs]
        names = dict.fromkeys(key for row in rows for key, value in row.items() if is_number(value))
        names.pop(_EPOCH, None)
        columns = {name: [float(row[name]) if is_number(row.get(name)) else math.nan for row in rows] for name in names}
        first = {key: value for key, value in (lines or [{}])[0].items() if key not in {*names, _EPOCH, "config"}}
        constants = {key: value for key, value in first.items() if all(line.get(key) == value for line in lines)}
        beside = {*constants, "config", _EPOCH}
        others = [
            {_EPOCH: epoch, **{key: value for key, value in line.items() if key not in beside}}
            for epoch, line in by_epoch.items()
            if epoch not in epochs
        ]
        noted = columns.pop(_STEP, epochs)
        steps = [int(step) for step in noted] if rising([-1, *noted, math.inf]) else epochs
        facts = {
            "name": trial.name if trial.name != run_id else None,
            "epochs": epochs if steps != epochs else None,
            "constants": constants,
            "lines": [line for line in others if line.keys() != {_EPOCH}],
            "damaged_lines": damaged,
        }
        params, told = trial / "params.json", lines[0].get("config") if lines else {}
        config = read_object(params) if params.exists() else told if isinstance(told, dict) else {}
        metrics = {clean(name): column for name, column in columns.items()}
        return steps, metrics, {**config, _ORIGIN: {k: v for k, v in facts.items() if v}}


def _lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a ``result.json`` that are JSON objects, and the number of those that are not."""
    lines: list[dict[str, Any]] = []
    texts = file.read_text(errors="replace").splitlines() if file.exists() else []
    for text in texts:
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            lines += [line] if isinstance(line, dict) else []
    return lines, len(texts) - len(lines)


def _epoch(line: Mapping[str, Any], position: int) -> int:
    epoch = line.get(_EPOCH, position)
    return epoch if type(epoch) is int else position


class TrialWriter:
    """Writes runs as trial folders, each of which appears whole or not at all.

    The epoch of a run that came from a trial folder is its own, that of another the index of the checkpoint, so that
    all runs have the same epochs; the optimizer step stands in the lines of ``result.json`` then. These begin with
    epoch 0 and leave none out, since readers count lines.
    """

    def __init__(self, path: Path, layout: ParameterLayout) -> None:
        self.path, self.layout = path, layout

    def holds(self, run_id: str) -> bool:
        """Whether a run is in the folder."""
        return (self.path / run_id).exists()

    def flush(self) -> None:
        """Every run is written at once."""

    def write(self, run: Run) -> None:
        """Write one run."""
        config = {key: value for key, value in run.config.items() if key != _ORIGIN}
        trial: Any = run.config.get(_ORIGIN)
        steps = [int(step) for step in run.steps]
        epochs = (trial.get("epochs") or steps) if trial is not None else list(range(len(steps)))
        columns: dict[str, Sequence[float]] = measured(run.metrics)
        if epochs != steps:
            columns[_STEP] = steps
        known = {line[_EPOCH]: line for line in (trial or {}).get("lines", ())}
        for position, epoch in enumerate(epochs):
            row = {name: column[position] for name, column in columns.items()}
            known[epoch] = {_EPOCH: epoch, **row, "config": config}
        lines = {epoch: {_EPOCH: epoch} for epoch in range(min(epochs[-1], _MOST_FILLERS))} | known
        constants = (trial or {}).get("constants", {})
        with atomic_folder(self.path / run.id) as folder:
            write_json(folder / "params.json", config)
            texts = [json.dumps({**lines[epoch], **constants}) + "\n" for epoch in sorted(lines)]
            (folder / "result.json").write_text("".join(texts))
            for position, epoch in enumerate(epochs):
                (folder / f"checkpoint_{epoch:06d}").mkdir()
                content = io.BytesIO()  # torch writes files too, but does not say why it cannot
                torch.save(self._state(run, position), content)
                (folder / f"checkpoint_{epoch:06d}" / "checkpoints").write_bytes(content.getbuffer())

    def _state(self, run: Run, position: int) -> dict[str, Tensor]:
        """Tensors in memory of their own (a view is saved with all that it is a view of), tied ones still tied."""
        state = self.layout.unflatten(run.params[position].to(self.layout.dtype))
        copies = {spec.name: state[spec.name].clone() for spec in self.layout.tensors}
        copies |= {alias: copies[name] for alias, name in self.layout.aliases}
        return copies | {name: buffer[position].clone() for name, buffer in run.buffers.items()}
