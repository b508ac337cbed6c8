"""The folder of a training: its settings, which a resumed one must share, and its log."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from zoo_common.files import atomic_write, visible_files

from sane.config import Config, config_to_yaml, load_config

_MOVABLE = ("name", "out_dir", "prepared", "zoo", "start", "wandb")
"""Settings that may be others when a training resumes."""


def open_folder(config: Config, resume: bool) -> None:
    """Create the run's folder with its ``config.yaml``, or check that a resumed one has the same.

    Raises:
        FileExistsError: The folder holds a run.
        FileNotFoundError: There is nothing to resume.
        ValueError: The settings differ; the message names them.
    """
    folder, stored = config.folder, config.folder / "config.yaml"
    if not resume and folder.exists() and visible_files(folder, ""):
        raise FileExistsError(f"{folder} already holds a run; use --resume to go on, or another name or out_dir")
    if resume and not stored.exists():
        raise FileNotFoundError(f"nothing to resume in {folder}; start the run without --resume")
    if stored.exists():
        there, given = (_flat(dataclasses.asdict(c)) for c in (load_config(stored), config))
        changed = [
            f"{key} ({there[key]} there, {given[key]} given)"
            for key in there
            if there[key] != given[key] and key not in _MOVABLE
        ]
        if changed:
            raise ValueError(f"{stored} differs from the configuration given: {', '.join(changed)}; use another name")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(stored) as temporary:
        temporary.write_text(config_to_yaml(config))


def _flat(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return flat


def trimmed_log(path: Path, step: int) -> Path:
    """Drop the lines that a killed session wrote after its last saved state, and those that are damaged."""

    def step_of(line: str) -> float:
        try:
            return float(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            return math.inf

    if path.exists():
        lines = [line for line in path.read_text(errors="replace").splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if step_of(line) <= step] if step else []
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept))
    return path


def append_line(log: Path, line: dict[str, Any]) -> None:
    """Append a line to a log."""
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")
