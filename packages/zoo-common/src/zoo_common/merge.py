"""Bringing the shards of several zoos together in one."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from zoo_common.files import atomic_write
from zoo_common.shard import Shard
from zoo_common.zoo import Zoo


@dataclass(frozen=True)
class Merged:
    """What :func:`merge_zoos` did."""

    added: int
    """Shards that are new in the target."""
    present: int
    """Shards that were there already."""
    runs: int
    """Runs of the target's default layout."""


def merge_zoos(target: str | Path, sources: Sequence[str | Path], *, progress: bool = False) -> Merged:
    """Add all shards of the source zoos to a target, as hard links where the file system can, else as copies.

    The target is made like the first source if there is none; attributes on which the sources differ are left out then.
    Every shard appears whole or not at all, so a merge that was killed is simply run again.

    Raises:
        FileNotFoundError: A source is no zoo.
        ValueError: The zoos differ in task, layout or split, or two different shards hold the same run; nothing has
            been added.
    """
    if not sources:
        raise ValueError("merge needs at least one source zoo")
    zoos = [Zoo.open(source) for source in sources]
    first = zoos[0]
    there = [Zoo.open(target)] if (Path(target) / "zoo.json").exists() else []
    for zoo in zoos:
        _check_same(there[0] if there else first, zoo)
    plan = _plan(there, zoos)
    if there:
        merged = there[0]
    else:
        shared = {k: v for k, v in first.attributes.items() if all(zoo.attributes.get(k) == v for zoo in zoos)}
        merged = Zoo.create(
            target, layout=first.layout, task=first.task, split=first.fractions, dtype=first.storage, attributes=shared
        )
    for zoo in zoos:
        for layout_id in zoo.layout_ids:
            merged.with_layout(zoo.with_layout(layout_id).layout)
    for name, shard in tqdm(plan.items(), desc="merge", unit="file", delay=1, disable=not progress):
        link_or_copy(shard.file.path, merged.path / "shards" / f"{name}.safetensors")
    merged.refresh()
    return Merged(len(plan), sum(len(zoo.shards) for zoo in zoos) - len(plan), len(merged))


def _check_same(first: Zoo, other: Zoo) -> None:
    for what in ("task", "layout", "fractions"):
        here, there = getattr(first, what), getattr(other, what)
        if here != there:
            here, there = (here.id, there.id) if what == "layout" else (here, there)
            raise ValueError(
                f"cannot merge {other.path} with {first.path}: {what} {there} is not {here}; keep them apart"
            )


def _plan(targets: Sequence[Zoo], sources: Sequence[Zoo]) -> dict[str, Shard]:
    """Names in the target of the shards to add; a name that is taken by another shard gets the content's digest."""
    taken = {name: shard.file.digest for zoo in targets for name, shard in zoo.shards.items()}
    owners = {run_id: shard for zoo in targets for shard in zoo.shards.values() for run_id in shard.run_ids}
    plan: dict[str, Shard] = {}
    for shard in (shard for zoo in sources for shard in zoo.shards.values()):
        if shard.file.digest in taken.values():
            continue
        for run_id in shard.run_ids:
            if run_id in owners:
                raise ValueError(
                    f"run {run_id!r} is in {shard.file.path} and in {owners[run_id].file.path} with other content: "
                    "remove one of the shards"
                )
        name = shard.name if shard.name not in taken else f"{shard.name}-{shard.file.digest[:12]}"
        plan[name] = shard
        taken[name] = shard.file.digest
        owners |= dict.fromkeys(shard.run_ids, shard)
    return plan


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link to what ``source`` (maybe a symbolic link) is, or a copy where the file system has no such."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)
