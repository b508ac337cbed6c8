"""Converting zoos from one format to another, one run at a time."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from zoo_common.files import remove_leftovers
from zoo_common.formats import detect, open_source
from zoo_common.formats.source import DROPPED, BadRunError, OtherLayoutError, Source, Writer
from zoo_common.formats.trials import TrialWriter
from zoo_common.formats.zoos import ZooWriter

TARGETS = ("zoo", "gpt", "trials")
"""What can be written."""
_LOST = 0.01
"""More than storage as ``delta10`` changes a run, relative to its norm."""


@dataclass
class Converted:
    """What :func:`convert` did."""

    target: str
    """Folder of the target."""
    parameters: int = 0
    added: int = 0
    """Runs that are new in the target."""
    present: int = 0
    """Runs that were there already, for example from a conversion that was interrupted."""
    checkpoints: int = 0
    """Checkpoints of the runs added."""
    dropped_checkpoints: dict[str, list[str]] = field(default_factory=dict)
    """Run id to the checkpoints left out of it, each with the reason."""
    dropped_runs: dict[str, str] = field(default_factory=dict)
    """Run id to the reason why nothing of the run could be used."""
    other_layouts: dict[str, str] = field(default_factory=dict)
    """Run id to the difference, for runs of another layout."""
    left_out: list[str] = field(default_factory=list)
    """Names of buffers that the target's format has no place for."""


def convert(
    source: str | Path,
    target: str | Path,
    *,
    source_format: str = "auto",
    target_format: str = "zoo",
    dtype: str | None = None,
    task: str | None = None,
    epochs: Sequence[int] = (),
    checkpoint_index_step: int = 1,
    checkpoint_index_offset: int = 0,
    steps_per_epoch: int | None = None,
    verify_done: bool = False,
    skip_other_layouts: bool = False,
    limit_runs: int | None = None,
    progress: bool = True,
) -> Converted:
    """Convert the runs of a folder; started again, it goes on where it was interrupted.

    Memory holds one run, or the 32 MB of a shard; a larger run lies in a nameless file beside the target. A run is in
    the target whole or not at all. One conversion at a time may write to a target.

    Args:
        source: Folder of runs.
        target: Folder to make, or to go on with.
        source_format: ``zoo``, ``gpt``, ``trials``, ``files``, or ``auto``: by what lies in the folder.
        target_format: ``zoo``, ``gpt`` or ``trials``.
        dtype: How a zoo stores parameters; default: as the source does.
        task: Name of the task. G.pt's format has no names and shapes of tensors: they are those of its network.
        epochs: Which checkpoints of trial folders to read; default: all.
        checkpoint_index_step: Epochs between two numbers of checkpoint folders of trials, see :class:`TrialRuns`.
        checkpoint_index_offset: Epoch of their folder 0.
        steps_per_epoch: Iterations in an epoch of a G.pt dataset, see :class:`LmdbRuns`.
        verify_done: Pass over folders of a G.pt dataset without ``DONE.txt``.
        skip_other_layouts: Pass over runs of another layout than the first one's.
        limit_runs: Convert the first runs only.
        progress: Show a bar on stderr.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no runs, or two with one name, or a run of another layout; or the target holds something
            else. What has been converted before stays.
        ImportError: The extra ``lmdb`` is missing.
    """
    source, target = Path(source), Path(target)
    if limit_runs is not None and limit_runs < 1:
        raise ValueError(f"the number of runs must be at least 1, got {limit_runs}")
    _check_target(source, target, target_format, dtype)
    kind = detect(source) if source_format == "auto" else source_format
    numbers = {"checkpoint_index_step": checkpoint_index_step, "checkpoint_index_offset": checkpoint_index_offset}
    numbers = {} if [*numbers.values()] == [1, 0] else numbers
    options = {"epochs": tuple(epochs), **numbers, "steps_per_epoch": steps_per_epoch, "verify_done": verify_done}
    with closing(open_source(source, kind, **options, **({"task": task} if kind == "gpt" else {}))) as runs:
        writer = _writer(runs, target, target_format, task, dtype)
        runs.scratch = target
        run_ids = runs.run_ids[:limit_runs]
        present = {run_id: None for run_id in run_ids if writer.holds(run_id)}
        _check_same(runs, target, target_format, task, list(present))
        left_out = [spec.name for spec in runs.layout.buffers] if target_format == "gpt" else []
        done = Converted(str(target), runs.layout.size, present=len(present), left_out=left_out)
        with tqdm(total=len(run_ids), initial=len(present), desc=target.name, unit="run", disable=not progress) as bar:
            for run_id in run_ids:
                if run_id not in present:
                    _convert_run(runs, run_id, writer, skip_other_layouts, done)
                    bar.update()
        writer.flush()
    if not done.added and not present:
        reasons = [*done.dropped_runs.values(), *done.other_layouts.values()]
        raise ValueError(f"none of the {len(run_ids)} runs in {source} can be used: {reasons[0]}")
    return done


def _convert_run(runs: Source, run_id: str, writer: Writer, skip: bool, done: Converted) -> None:
    try:
        run = runs.read(run_id)
    except OtherLayoutError as error:
        if not skip:
            raise ValueError(f"{error}; pass over such runs with --skip-other-layouts") from error
        done.other_layouts[run_id] = str(error)
    except BadRunError as error:
        done.dropped_runs[run_id] = str(error)
    else:
        writer.write(run)
        done.added += 1
        done.checkpoints += len(run.params)
        dropped = run.config.get(DROPPED)
        if isinstance(dropped, list):
            done.dropped_checkpoints[run_id] = dropped


def _check_target(source: Path, target: Path, kind: str, dtype: str | None) -> None:
    """Refuse a target in which something could be lost."""
    if kind not in TARGETS:
        raise ValueError(f"the target's format must be one of {', '.join(TARGETS)}, got {kind!r}")
    if dtype is not None and kind != "zoo":
        raise ValueError(f"a dtype can be chosen for a zoo, not for the format {kind!r}")
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise ValueError(f"the target {target} lies in the source {source}: choose a folder outside of it")
    if target.exists() and not target.is_dir():
        raise ValueError(f"the target {target} is a file: choose a folder")
    own = {"zoo": ("zoo.json", "layouts", "shards"), "gpt": ("*/runs.json",), "trials": ("*/params.json",)}[kind]
    there = {entry for entry in target.glob("*") if not entry.name.startswith(".")}
    parts = {target / entry.relative_to(target).parts[0] for pattern in own for entry in target.glob(pattern)}
    if foreign := sorted(there - parts):
        raise ValueError(f"the target {target} holds other files ({foreign[0].name}): choose a new or empty folder")


def _check_same(runs: Source, target: Path, kind: str, task: str | None, present: Sequence[str]) -> None:
    """Compare the first and the last run that the target has already with those of the source."""
    if not present:
        return
    with closing(open_source(target, kind, **({"task": task} if kind == "gpt" else {}))) as there:
        for run_id in (present[0], present[-1]):
            wanted, found = runs.read(run_id).params, there.read(run_id).params
            near = there.storage == "delta10" and (wanted - found).norm() <= _LOST * wanted.norm()
            if not near and not torch.equal(wanted.to(found.dtype), found):
                raise ValueError(f"run {run_id!r} in {target} is not the one in {runs.path}: choose another target")


def _writer(runs: Source, target: Path, kind: str, task: str | None, dtype: str | None) -> Writer:
    if kind == "zoo":
        return ZooWriter(target, runs, task, dtype)
    target.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    if kind == "trials":
        return TrialWriter(target, runs.layout)
    from zoo_common.formats.lmdb_runs import LmdbWriter

    return LmdbWriter(target, runs.layout, runs.run_ids, task or runs.task)
