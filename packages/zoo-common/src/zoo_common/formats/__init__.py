"""Published formats of zoos: readers and writers that hold one run at a time, and what lies in a folder."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from zoo_common.formats.source import Source, folders
from zoo_common.formats.state_dicts import weight_files

FORMATS = {
    "zoo": "a zoo: zoo.json",
    "gpt": "runs of G.pt: <run>/data.mdb",
    "trials": "trial folders of Ray Tune: <trial>/params.json",
    "files": "state dicts: .pt, .pth, .th or .safetensors files, or folders of them",
}
"""What can be read, and how it is recognised."""
_OPTIONS = {
    "gpt": ("task", "steps_per_epoch", "verify_done"),
    "trials": ("epochs", "checkpoint_index_step", "checkpoint_index_offset"),
}
_READERS = {
    "zoo": ("zoos", "ZooRuns"),
    "gpt": ("lmdb_runs", "LmdbRuns"),
    "trials": ("trials", "TrialRuns"),
    "files": ("state_dicts", "FileRuns"),
}
"""Module and class of each; loaded when asked for, since LMDB is an extra."""


def detect(path: Path) -> str:
    """The format of the runs in a folder, by what lies in it.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no runs of any format.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}: give the folder that holds the runs")
    if (path / "zoo.json").exists():
        return "zoo"
    for folder in folders(path):
        if (folder / "data.mdb").exists():
            return "gpt"
        if (folder / "params.json").exists() or any(folder.glob("checkpoint_*/checkpoints")):
            return "trials"
    if weight_files(path) or any(weight_files(folder) for folder in folders(path)):
        return "files"
    single = any((path / name).exists() for name in ("data.mdb", "params.json"))
    hint = f"this is one run, give {path.parent}" if single else f"expected {'; '.join(FORMATS.values())}"
    raise ValueError(f"{path} holds no runs: {hint}")


def open_source(path: str | Path, kind: str = "auto", **options: Any) -> Source:  # noqa: ANN401
    """Open a folder of runs.

    Args:
        path: Folder.
        kind: A key of :data:`FORMATS`, or ``auto``.
        options: ``task``, ``steps_per_epoch`` and ``verify_done`` for ``gpt``; ``epochs``, ``checkpoint_index_step`` and
            ``checkpoint_index_offset`` for ``trials``.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: Unknown format, an option that the format does not have, or no runs.
        ImportError: The extra ``lmdb`` is missing.
    """
    path = Path(path)
    if kind not in ("auto", *FORMATS):
        raise ValueError(f"format must be one of auto, {', '.join(FORMATS)}, got {kind!r}")
    kind = detect(path) if kind == "auto" or not path.is_dir() else kind
    given = {option: value for option, value in options.items() if value or type(value) is int}
    if foreign := [option for option in given if option not in _OPTIONS.get(kind, ())]:
        raise ValueError(f"{path}: {foreign[0]} is not an option of the format {kind!r}")
    source = _reader(kind)(path, **given)
    if not source.run_ids:
        raise ValueError(f"{path} holds no runs of the format {kind!r} ({FORMATS[kind]})")
    return source


def _reader(kind: str) -> Callable[..., Source]:
    module, name = _READERS[kind]
    reader: Callable[..., Source] = getattr(import_module(f"{__name__}.{module}"), name)
    return reader
