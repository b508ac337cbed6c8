"""What a training keeps in its folder, and whether one can begin or go on there."""

import json
from pathlib import Path
from typing import Any

from zoo_common.files import atomic_write, read_json, visible_files

from pilimit.config import TrainConfig

CONFIG, METRICS, NET, STATE, CURVES = "config.json", "metrics.jsonl", "net", "state.safetensors", "curves.png"
_FREE = (
    "resume",
    "quiet",
    "json",
    "limit_seconds",
    "data_root",
    "save_dir",
    "preset",
    "checkpoint_steps",
    "max_memory",
)
"""Options that a resumed run may change."""


def read_config(folder: Path) -> tuple[dict[str, Any], tuple[int, int]]:
    """Options of the run in a folder, and the widths of its inputs and outputs.

    Raises:
        ValueError: The file is damaged.
    """
    document = read_json(folder / CONFIG)
    try:
        d_in, d_out = document["shape"]
        return dict(document["config"]), (d_in, d_out)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{folder / CONFIG} is no configuration of a run: restore it from another copy") from None


def check_folder(config: TrainConfig, folder: Path) -> None:
    """Find out whether a run can begin in a folder, or go on with the same configuration.

    Raises:
        FileExistsError: It holds a run and ``resume`` is not set.
        FileNotFoundError: There is nothing to resume.
        ValueError: Its configuration differs.
    """
    stored = folder / CONFIG
    if not config.resume:
        if folder.exists() and (not folder.is_dir() or visible_files(folder, "")):
            raise FileExistsError(f"{folder} is not empty; use --resume to go on with a run, or another --save-dir")
        return
    if not stored.is_file():
        raise FileNotFoundError(f"nothing to resume in {folder}; start the run without --resume")
    old, _ = read_config(folder)
    changed = [name for name, value in config.to_json().items() if name not in _FREE and old.get(name) != value]
    if changed:
        differences = ", ".join(f"--{name.replace('_', '-')} ({old.get(name)} there)" for name in changed)
        raise ValueError(f"{stored} differs from the options given: {differences}; use the same")


class Log:
    """JSON lines; those that a killed session wrote after its last saved state are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.lines = path, []
        if path.exists():
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            try:
                self.lines = [line for line in map(json.loads, whole) if line["step"] <= step]
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{path} has a line that is no JSON object with a step: remove that line") from None
            with atomic_write(path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
