"""The ``zoo`` command."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from zoo_common.command import Commands, run_command

DESCRIPTION = """Inspect, check and merge zoos: folders of training runs.

Examples:
  zoo inspect my-zoo                 what it holds, from the headers alone
  zoo inspect my-zoo --json          the same for programs
  zoo verify my-zoo                  read every byte; status 1 if anything is wrong
  zoo verify my-zoo --repair         then move unreadable shards aside and remove what killed writers left
  zoo merge all-runs part-1 part-2   bring zoos together, without copying on one disk
"""


@dataclass(frozen=True)
class InspectConfig:
    """Show what a zoo holds; reads headers and metrics only."""

    zoo: Positional[Path]
    """Folder of the zoo."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class VerifyConfig:
    """Check sums, structure and finite values of every shard."""

    zoo: Positional[Path]
    """Folder of the zoo."""
    repair: bool = False
    """Move shards that keep the zoo from opening to quarantine/ in the zoo, and remove temporary files of killed writers;
    nothing that can be read is changed."""
    older_than: float = 3600.0
    """Seconds since the last write after which a temporary file counts as left by a killed writer."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class MergeConfig:
    """Bring the shards of several zoos together in one; safe to repeat."""

    target: Positional[Path]
    """Folder of the zoo to add to; made if it does not exist."""
    source: Positional[Path]
    """Folder of a zoo to take shards from; it stays as it is."""
    sources: Positional[tuple[Path, ...]] = ()
    """Folders of further ones."""
    json: bool = False
    """Print one JSON object."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    commands: Commands = {
        "inspect": (InspectConfig, inspect),
        "verify": (VerifyConfig, verify),
        "merge": (MergeConfig, merge),
    }
    return run_command("zoo", DESCRIPTION, commands, argv, package="zoo-common")


def inspect(config: InspectConfig) -> None:
    """Print the summary of a zoo."""
    import numpy as np

    from zoo_common.index import SPLITS
    from zoo_common.zoo import Zoo

    zoo = Zoo.open(config.zoo)
    metrics = {}
    for name, column in zoo.metrics.items():
        finite = column.padded()[np.isfinite(column.padded())]
        metrics[name] = [finite.min().item(), finite.max().item()] if finite.size else None
    rounding = zoo.rounding()
    lost = rounding and {"largest": rounding.largest, "relative_rms": rounding.relative_rms}
    summary: dict[str, Any] = {
        "task": zoo.task,
        "creator": zoo.creator,
        "layout": zoo.layout.id,
        "parameters": zoo.layout.size,
        "tensors": len(zoo.layout.tensors),
        "other_layouts": list(zoo.layout_ids[1:]),
        "shards": len(zoo.shards),
        "runs": len(zoo),
        "checkpoints": sum(run.checkpoints for run in zoo.runs),
        "splits": {split: len(zoo.split(split)) for split in SPLITS},
        "metrics": metrics,
        "bytes": sum(shard.file.path.stat().st_size for shard in zoo.shards.values()),
        "storage": zoo.storage,
        "rounding_error": lost,
        "attributes": zoo.attributes,
    }
    _show(summary, config.json)


def verify(config: VerifyConfig) -> int:
    """Print the report on a zoo; status 1 if there are problems."""
    from zoo_common.verify import verify_zoo

    report = verify_zoo(config.zoo, repair=config.repair, older_than=config.older_than, progress=not config.json)
    lists = {"problems": list(report.problems), "quarantined": list(report.quarantined)}
    _show(asdict(report) | lists, config.json)
    if report.problems:
        raise ValueError(f"{config.zoo}: {len(report.problems)} problem(s), the first: {report.problems[0]}")
    return 0


def merge(config: MergeConfig) -> None:
    """Merge zoos and print what was done."""
    from zoo_common.merge import merge_zoos

    merged = merge_zoos(config.target, [config.source, *config.sources], progress=not config.json)
    _show(asdict(merged), config.json)


def _show(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
        return
    width = max(map(len, summary))
    for name, value in summary.items():
        shown = json.dumps(value) if isinstance(value, dict | list) else value
        print(f"{name.replace('_', ' '):{width}}  {shown}")
