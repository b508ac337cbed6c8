"""Reading every byte of a zoo to find what is wrong with it, and putting aside what cannot be read."""

import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from zoo_common.coding import row_blocks, stored_shapes
from zoo_common.files import leftover_files, sync_folder, visible_files
from zoo_common.layout import ParameterLayout
from zoo_common.manifest import read_document, read_layout
from zoo_common.shard import Shard

OLD = 3600.0
"""Seconds after which a temporary file that nobody has written to counts as left by a killed writer."""


@dataclass(frozen=True)
class Report:
    """What :func:`verify_zoo` found and did."""

    shards: int
    runs: int
    checkpoints: int
    leftovers: int
    """Temporary files of writers that are at work or were killed; harmless."""
    problems: tuple[str, ...]
    """One line per problem that is left, naming file, tensor and run; empty if the zoo is sound."""
    removed: int = 0
    """Temporary files that were removed."""
    quarantined: tuple[str, ...] = ()
    """One line per shard that was moved to ``quarantine/``, with the reason."""


def verify_zoo(path: str | Path, *, repair: bool = False, older_than: float = OLD, progress: bool = False) -> Report:
    """Check the structure of a zoo, the sum of every tensor, and that every parameter is finite.

    Args:
        path: Folder of the zoo.
        repair: Remove the temporary files of killed writers, and move shards that keep the zoo from opening (they
            cannot be read, or hold only runs that shards before them hold) to the folder ``quarantine`` in the zoo, from
            where they can be taken back. A shard that opens is kept, whatever is wrong in it.
        older_than: Seconds. A temporary file that was written to since then may belong to a writer at work, and stays.
        progress: Show a progress bar on stderr.

    Raises:
        FileNotFoundError: There is no zoo.
    """
    path = Path(path)
    problems, layouts = _read_descriptions(path)
    quarantined: list[str] = []
    owners: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    files = visible_files(path / "shards", ".safetensors")
    sizes = [file.stat().st_size for file in files]
    bar = tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="verify", delay=1, disable=not progress)
    for file, size in zip(files, sizes, strict=True):
        bar.update(size)
        try:
            shard = Shard(file)
        except ValueError as error:
            if repair:
                quarantined.append(f"{_put_aside(path, file)}: {error}")
            else:
                problems.append(f"{error}; --repair moves it aside")
            continue
        except OSError as error:
            problems.append(f"shard {file.stem!r} cannot be read: {error}")
            continue
        if repair and all(run_id in owners for run_id in shard.run_ids):
            others = ", ".join(dict.fromkeys(name for run_id in shard.run_ids for name in owners[run_id]))
            quarantined.append(f"{_put_aside(path, file)}: all its runs are in {others}")
            continue
        counts.update(shards=1, runs=len(shard.run_ids), checkpoints=len(shard))
        for run_id in shard.run_ids:
            owners.setdefault(run_id, []).append(shard.name)
        found = _shard_problems(shard, layouts.get(shard.layout_id))
        problems += [f"shard {shard.name!r}: {line}" for line in found]
    bar.close()
    problems += [f"run {name!r} is in several shards: {', '.join(at)}" for name, at in owners.items() if len(at) > 1]
    leftovers = [file for folder in ("shards", "layouts", ".") for file in leftover_files(path / folder)]
    removed = [file for file in leftovers if repair and _remove_if_old(file, older_than)]
    return Report(
        shards=counts["shards"],
        runs=counts["runs"],
        checkpoints=counts["checkpoints"],
        leftovers=len(leftovers) - len(removed),
        problems=tuple(problems),
        removed=len(removed),
        quarantined=tuple(quarantined),
    )


def _read_descriptions(path: Path) -> tuple[list[str], dict[str, ParameterLayout]]:
    """What is wrong with ``zoo.json`` and the layouts, and the layouts that can be read."""
    problems: list[str] = []
    layouts: dict[str, ParameterLayout] = {}
    names = [file.stem for file in visible_files(path / "layouts", ".json")]
    try:
        names.append(read_document(path)["layout"])
    except ValueError as error:
        problems.append(str(error))
    for name in dict.fromkeys(names):
        try:
            layouts[name] = read_layout(path, name)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return problems, layouts


def _put_aside(path: Path, file: Path) -> str:
    """Move a shard to the folder ``quarantine``; returns where it is, relative to the zoo."""
    folder = path / "quarantine"
    folder.mkdir(exist_ok=True)
    target = folder / file.name
    if target.exists():
        target = folder / f"{file.stem}-{uuid.uuid4().hex[:12]}{file.suffix}"
    os.rename(file, target)
    sync_folder(folder)
    sync_folder(file.parent)
    return str(target.relative_to(path))


def _remove_if_old(file: Path, seconds: float) -> bool:
    try:
        if time.time() - file.stat().st_mtime < seconds:
            return False
        file.unlink()
    except FileNotFoundError:  # its writer finished
        return False
    return True


def _shard_problems(shard: Shard, layout: ParameterLayout | None) -> Iterator[str]:
    if layout is None:
        yield f"its layout {shard.layout_id!r} is missing or damaged"
    else:
        shapes = stored_shapes(shard.storage, shard.offsets, layout.sizes) | {"step": (len(shard),)}
        shapes |= {f"metrics/{name}": (len(shard),) for name in shard.metric_names}
        shapes |= {f"buffers/{spec.name}": (len(shard), *spec.shape) for spec in layout.buffers}
        shapes["offsets"] = (len(shard.run_ids) + 1,)
        found = {name: tuple(row["shape"]) for name, row in shard.file.table.items() if name != "checksums"}
        for name in sorted(shapes.keys() | found.keys()):
            if shapes.get(name) != found.get(name):
                yield f"tensor {name!r}: expected shape {shapes.get(name)}, got {found.get(name)}"
        if shapes != found:
            return
    damaged = shard.damaged()
    for name, runs in damaged.items():
        yield f"tensor {name!r} is damaged: wrong SHA-256, in {_shortened(runs)}"
    if (np.diff(shard.offsets) <= 0).any() or shard.offsets[0] != 0:
        yield f"tensor 'offsets' must rise from 0, got {shard.offsets.tolist()}"
    elif layout is not None and not any(name.startswith("params") for name in damaged):
        yield from _not_finite(shard, layout)


def _shortened(runs: Sequence[str]) -> str:
    shown = ", ".join(map(repr, runs[:3]))
    return f"run{'s' * (len(runs) > 1)} {shown}{f' and {len(runs) - 3} more' if len(runs) > 3 else ''}"


def _not_finite(shard: Shard, layout: ParameterLayout) -> Iterator[str]:
    bad = [~shard.params[rows].isfinite().all(dim=1) for rows in row_blocks(len(shard), layout.size)]
    runs = np.searchsorted(shard.offsets, np.flatnonzero(np.concatenate(bad)), side="right") - 1
    for run in np.unique(runs):
        vectors = shard.params[slice(*shard.offsets[run : run + 2].tolist())]
        finite = layout.unflatten(vectors.isfinite().all(dim=0))
        names = [repr(name) for name, part in finite.items() if not part.all()]
        yield f"run {shard.run_ids[run]!r}: {', '.join(names)} holds values that are not finite"
