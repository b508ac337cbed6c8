"""Reading every byte of a zoo to find what is wrong with it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zoo_common.files import visible_files
from zoo_common.layout import ParameterLayout
from zoo_common.manifest import read_document, read_layout
from zoo_common.shard import Shard


@dataclass(frozen=True)
class Report:
    """What :func:`verify_zoo` found."""

    shards: int
    runs: int
    checkpoints: int
    leftovers: int
    """Temporary files of writers that are at work or were killed; harmless."""
    problems: tuple[str, ...]
    """One line per problem, naming shard, tensor and run; empty if the zoo is sound."""


def verify_zoo(path: str | Path) -> Report:
    """Check the structure of a zoo, the sum of every tensor, and that every parameter is finite.

    Raises:
        FileNotFoundError: There is no zoo.
        ValueError: ``zoo.json`` or the default layout is damaged.
    """
    path = Path(path)
    default = read_document(path)["layout"]
    layouts: dict[str, ParameterLayout] = {default: read_layout(path, default)}
    problems: list[str] = []
    owners: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for file in visible_files(path / "shards", ".safetensors"):
        counts["shards"] += 1
        try:
            shard = Shard(file)
            if shard.layout_id not in layouts:
                layouts[shard.layout_id] = read_layout(path, shard.layout_id)
        except (ValueError, OSError, KeyError) as error:
            problems.append(str(error))
            continue
        counts["runs"] += len(shard.run_ids)
        counts["checkpoints"] += len(shard)
        for run_id in shard.run_ids:
            owners.setdefault(run_id, []).append(shard.name)
        problems += [f"shard {shard.name!r}: {line}" for line in _shard_problems(shard, layouts[shard.layout_id])]
    problems += [f"run {name!r} is in several shards: {', '.join(at)}" for name, at in owners.items() if len(at) > 1]
    leftovers = sum(
        file.name.startswith(".") for folder in ("shards", "layouts", ".") for file in (path / folder).glob(".*-*")
    )
    return Report(counts["shards"], counts["runs"], counts["checkpoints"], leftovers, tuple(problems))


def _shard_problems(shard: Shard, layout: ParameterLayout) -> Iterator[str]:
    shapes: dict[str, tuple[int, ...]] = {"params": (len(shard), layout.size), "step": (len(shard),)}
    shapes |= {f"metrics/{name}": (len(shard),) for name in shard.metric_names}
    shapes |= {f"buffers/{spec.name}": (len(shard), *spec.shape) for spec in layout.buffers}
    shapes["offsets"] = (len(shard.run_ids) + 1,)
    found = {name: tuple(row["shape"]) for name, row in shard.file.table.items()}
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            yield f"tensor {name!r}: expected shape {shapes.get(name)}, got {found.get(name)}"
    if shapes != found:
        return
    damaged = shard.file.damaged()
    yield from (f"tensor {name!r} is damaged: wrong SHA-256" for name in damaged)
    if (np.diff(shard.offsets) <= 0).any() or shard.offsets[0] != 0:
        yield f"tensor 'offsets' must rise from 0, got {shard.offsets.tolist()}"
    elif "params" not in damaged:
        for run_id, start, stop in zip(shard.run_ids, shard.offsets, shard.offsets[1:], strict=False):
            finite = layout.unflatten(shard.params[start:stop].isfinite().all(dim=0))
            if bad := [name for name, part in finite.items() if not part.all()]:
                yield f"run {run_id!r}: {', '.join(map(repr, bad))} holds values that are not finite"
