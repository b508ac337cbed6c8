"""Folders of PyTorch and safetensors files with one state dict each."""

import re
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from zoo_common.formats.source import BadRunError, Checkpoints, Source, folders, named, rising
from zoo_common.layout import ParameterLayout
from zoo_common.shard import Numbers, Run
from zoo_common.untrusted import load_untrusted

SUFFIXES = (".pt", ".pth", ".th", ".safetensors")


class StateDictRuns(Source):
    """Runs whose checkpoints are files with a state dict each."""

    @abstractmethod
    def checkpoints(self, run_id: str) -> list[tuple[int, Path]]:
        """Step and file of each checkpoint, the steps rising."""

    @abstractmethod
    def facts(self, run_id: str, steps: list[int]) -> tuple[list[int], Mapping[str, Numbers], dict[str, object]]:
        """Steps (of the optimizer, where known), metrics at these checkpoints, and the config."""

    @cached_property
    def layout(self) -> ParameterLayout:
        """Layout of the first checkpoint that can be read."""
        reason = "no checkpoints"
        for run_id in self.run_ids:
            for _, file in self.checkpoints(run_id):
                try:
                    return ParameterLayout.from_state_dict(read_state(file))
                except (FileNotFoundError, ValueError) as error:
                    reason = str(error)
        raise ValueError(f"none of the {len(self.run_ids)} runs in {self.path} can be read: {reason}")

    def read(self, run_id: str) -> Run:
        """Read the files of one run."""
        files = self.checkpoints(run_id)
        found = Checkpoints(self, len(files))
        for step, file in files:
            try:
                state = read_state(file)
                layout = ParameterLayout.from_state_dict(state)
            except (FileNotFoundError, ValueError) as error:
                found.dropped.append(str(error))
                continue
            self.check_layout(run_id, layout)
            found.add(step, str(file), self.layout.flatten(state), self.layout.buffers_of(state))
        return found.run(run_id, *self.facts(run_id, found.kept))


class FileRuns(StateDictRuns):
    """A file is a run of one checkpoint; a sub-folder is a run whose checkpoints are its files in natural order.

    Steps are the numbers at the end of the names, if all have one and they rise; otherwise 0, 1, 2, ...
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        files = [(file.stem, file) for file in weight_files(path)]
        runs = [(folder.name, folder) for folder in folders(path) if weight_files(folder)]
        self._paths = named(sorted(files + runs))
        self.run_ids = tuple(self._paths)

    def checkpoints(self, run_id: str) -> list[tuple[int, Path]]:
        """Files in natural order."""
        path = self._paths[run_id]
        if path.is_file():
            return [(0, path)]
        files = weight_files(path)
        ends = [re.search(r"\d{1,18}$", file.stem) for file in files]
        steps = [int(end[0]) for end in ends if end]
        told = len(steps) == len(files) and rising(steps)
        return list(zip(steps if told else range(len(files)), files, strict=True))

    def facts(self, run_id: str, steps: list[int]) -> tuple[list[int], Mapping[str, Numbers], dict[str, object]]:
        """Nothing is known beyond the weights."""
        return steps, {}, {}


def weight_files(folder: Path) -> list[Path]:
    """Files with a state dict, in natural order: ``net_2`` before ``net_10``."""
    files = [file for file in folder.iterdir() if file.suffix in SUFFIXES and not file.name.startswith(".")]
    return sorted(
        files, key=lambda f: [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in _split(f)]
    )


def _split(file: Path) -> list[str]:
    return [part for part in re.split(r"([0-9]+)", file.name) if part]


def read_state(file: Path) -> dict[str, Tensor]:
    """The state dict in a file, also inside a dictionary under ``state_dict``, ``model_state_dict`` or ``model``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, would run code, or holds something else.
    """
    state: Any
    if file.suffix == ".safetensors":
        try:
            state = load_file(file)
        except (SafetensorError, UnicodeDecodeError) as error:
            raise BadRunError(f"{file} is damaged, or no safetensors file ({error}): fetch it again") from error
    else:
        state = load_untrusted(file)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise BadRunError(f"{file} holds no state dict but {type(state).__name__}")
    if odd := [name for name, value in state.items() if not isinstance(value, Tensor) or not isinstance(name, str)]:
        raise BadRunError(f"{file} holds no state dict: {odd[0]!r} is {type(state[odd[0]]).__name__}")
    return dict(state)
