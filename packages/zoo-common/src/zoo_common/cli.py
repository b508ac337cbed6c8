"""The ``zoo`` command."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from zoo_common.command import Commands, run_command

DESCRIPTION = """Inspect, check, merge, convert and share zoos: folders of training runs.

Examples:
  zoo inspect my-zoo                 what it holds, from the headers alone
  zoo inspect my-zoo --json          the same for programs
  zoo verify my-zoo                  read every byte; status 1 if anything is wrong
  zoo verify my-zoo --repair         then move unreadable shards aside and remove what killed writers left
  zoo merge all-runs part-1 part-2   bring zoos together, without copying on one disk
  zoo push my-zoo me/my-zoo          upload to a hub (HF_ENDPOINT), with the token HF_TOKEN
  zoo pull me/my-zoo copy            download what is missing; safe to repeat
  zoo convert runs my-zoo            from the datasets of G.pt, trial folders of Ray Tune, .pt and .safetensors files
  zoo convert my-zoo runs --to gpt   and back (or: --to trials)
"""


@dataclass(frozen=True)
class InspectConfig:
    """Show what a zoo holds; reads headers and metrics only."""

    zoo: Annotated[Positional[Path], arg(metavar="ZOO")]
    """Folder of the zoo."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class VerifyConfig:
    """Check sums, structure and finite values of every shard."""

    zoo: Annotated[Positional[Path], arg(metavar="ZOO")]
    """Folder of the zoo."""
    repair: bool = False
    """Move shards that keep the zoo from opening to quarantine/ in the zoo, and remove temporary files of killed writers;
    nothing that can be read is changed."""
    older_than: float = 3600.0
    """Seconds since the last write after which a temporary file counts as left by a killed writer."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class ConvertConfig:
    """Convert runs from or to a published format; after an interruption, the same command goes on."""

    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    """Folder of runs: a zoo, a dataset of G.pt (LMDB), trial folders of Ray Tune, or .pt and .safetensors files."""
    target: Annotated[Positional[Path], arg(metavar="TARGET")]
    """Folder to make, or to go on with."""
    source_format: Annotated[Literal["auto", "zoo", "gpt", "trials", "files"], arg(name="from")] = "auto"
    """Format of the source; auto: by what lies in the folder."""
    target_format: Annotated[Literal["zoo", "gpt", "trials"], arg(name="to")] = "zoo"
    """Format of the target."""
    dtype: Literal["float32", "float16", "bfloat16", "delta10"] | None = None
    """How a zoo stores parameters; default: as the source does."""
    task: str | None = None
    """Task of the runs; gives names and shapes to the tensors of a G.pt dataset other than the three published ones."""
    epochs: tuple[int, ...] = ()
    """Which checkpoints of trial folders to read; default: all."""
    checkpoint_index_step: int = 1
    """Epochs between two numbers of checkpoint folders of trials, where they are counted 0, 1, 2, ... (by newer Ray)."""
    checkpoint_index_offset: int = 0
    """Epoch of checkpoint folder 0 of trials."""
    steps_per_epoch: int | None = None
    """Iterations in an epoch of a G.pt dataset (MNIST 468, CIFAR-10 390); without it, epoch 3 begins at step 300000."""
    verify_done: bool = False
    """Pass over folders of a G.pt dataset without DONE.txt."""
    skip_other_layouts: bool = False
    """Pass over runs of another architecture than the first one's, instead of stopping there."""
    limit_runs: int | None = None
    """Convert the first runs only."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class MergeConfig:
    """Bring the shards of several zoos together in one; safe to repeat."""

    target: Annotated[Positional[Path], arg(metavar="TARGET")]
    """Folder of the zoo to add to; made if it does not exist."""
    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    """Folder of a zoo to take shards from; it stays as it is."""
    sources: Annotated[Positional[tuple[Path, ...]], arg(metavar="[SOURCE ...]")] = ()
    """Folders of further ones."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class PushConfig:
    """Upload a zoo to a hub; only what is not there yet is sent."""

    zoo: Annotated[Positional[Path], arg(metavar="ZOO")]
    """Folder of the zoo."""
    repo: Annotated[Positional[str], arg(metavar="REPO")]
    """Repository, owner/name; made if there is none."""
    revision: str | None = None
    """Branch to write to; made if there is none. Default: main."""
    private: bool = False
    """Hide a new repository from others."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class PullConfig:
    """Download a zoo from a hub, and check it; safe to repeat."""

    repo: Annotated[Positional[str], arg(metavar="REPO")]
    """Repository, owner/name."""
    zoo: Annotated[Positional[Path], arg(metavar="ZOO")]
    """Folder for it: new, or with an earlier state of the same zoo."""
    revision: str | None = None
    """Branch, tag or commit; default: main."""
    offline: bool = False
    """Use what was downloaded before, without a connection."""
    json: bool = False
    """Print one JSON object and no progress bar."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    commands: Commands = {
        "inspect": (InspectConfig, inspect),
        "verify": (VerifyConfig, verify),
        "merge": (MergeConfig, merge),
        "push": (PushConfig, push),
        "pull": (PullConfig, pull),
        "convert": (ConvertConfig, convert),
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


def push(config: PushConfig) -> None:
    """Upload a zoo and print the commit."""
    from zoo_common.hub import push_zoo

    _hide_bars(config.json)
    commit = push_zoo(config.zoo, config.repo, revision=config.revision, private=config.private)
    _show({"repo": config.repo, "commit": commit}, config.json)


def pull(config: PullConfig) -> None:
    """Download a zoo and print the commit."""
    from zoo_common.hub import pull_zoo

    _hide_bars(config.json)
    commit = pull_zoo(config.repo, config.zoo, revision=config.revision, offline=config.offline)
    _show({"repo": config.repo, "commit": commit, "zoo": str(config.zoo)}, config.json)


def _hide_bars(hide: bool) -> None:
    from huggingface_hub.utils import disable_progress_bars

    if hide:
        disable_progress_bars()


def convert(config: ConvertConfig) -> None:
    """Convert a folder of runs and print what was done."""
    from zoo_common.formats.convert import convert

    options = {name: value for name, value in vars(config).items() if name != "json"}
    _show(asdict(convert(**options)), config.json)


def _show(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
        return
    width = max(map(len, summary))
    for name, value in summary.items():
        shown = json.dumps(value) if isinstance(value, dict | list) else value
        print(f"{name.replace('_', ' '):{width}}  {shown}")
