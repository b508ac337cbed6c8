"""Preparing a zoo for training: bad runs, the normalisation coefficient, and the prior term of the diffusion.

A run is bad if it cannot be read, if a weight is not finite, or if one is too large. Bad runs are listed in
``prepared.json``, which :func:`excluded` reads for the training; nothing else is changed unless they shall be moved.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from zoo_common.files import read_json, visible_files, write_json
from zoo_common.index import split_of
from zoo_common.manifest import read_document, read_layout
from zoo_common.shard import Run, Shard, write_shard
from zoo_common.statistics import Moments

from gpt_diffusion.diffusion import create_diffusion
from gpt_diffusion.normalization import Scaling

MAX_ABS = 10.0
"""Published limit of a good run's weights."""
PAIRS, SEED = 25_000, 10
"""Published number of (run, checkpoint) pairs for the statistics, and the seed that draws them."""
TARGET_STD = 0.538
"""Standard deviation of the normalised weights: that of ImageNet's pixels."""
REPORT, REMOVED = "prepared.json", "removed"
BLOCK = 1024
"""Checkpoints that are read at once."""


@dataclass(frozen=True)
class Prepared:
    """What a zoo was found to be."""

    runs: int
    """Good and bad ones in all files that can be read."""
    bad_runs: dict[str, str]
    """Run id to what is wrong with it."""
    bad_files: dict[str, str]
    """Shards that cannot even be opened, so that their runs are not known."""
    removed: bool
    """Whether bad runs and files were moved to the folder ``removed``."""
    std: float | None
    """Standard deviation of all weights of the pairs; None if the training split has no good run."""
    openai_coeff: float | None
    """0.538 / std."""
    prior_bpd: float | None
    """Mean KL divergence of the noised weights from the standard normal after 1000 linear steps, bits per dimension."""


def prepare(
    directory: str | Path,
    *,
    max_abs: float = MAX_ABS,
    pairs: int = PAIRS,
    seed: int = SEED,
    delete: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> Prepared:
    """Check every run of a zoo, estimate the coefficient on its training split, and write ``prepared.json``.

    Args:
        directory: Folder of the zoo.
        max_abs: Largest good weight.
        pairs: (run, checkpoint) pairs, drawn with replacement, for the statistics; 0 leaves these out.
        seed: Draws them.
        delete: Move bad runs to the folder ``removed`` of the zoo, in files of the same names.
        dry_run: Report only; nothing is written.
        progress: Show a bar on stderr.

    Raises:
        FileNotFoundError: There is no zoo.
        ValueError: ``max_abs`` or ``pairs`` is out of range, or ``zoo.json`` is damaged.
    """
    if not max_abs > 0:
        raise ValueError(f"max_abs must be positive, got {max_abs}")
    if pairs < 0:
        raise ValueError(f"pairs must be at least 0, got {pairs}")
    folder = Path(directory)
    document = read_document(folder)
    shards, bad_files = _open_shards(folder)
    bad = {shard.name: _bad_runs(shard, max_abs) for shard in tqdm(shards, "check", disable=not progress, unit="file")}
    layout, good = document["layout"], []
    for shard in shards:
        if shard.layout_id == layout:
            kept = [i for i, run in enumerate(shard.run_ids) if run not in bad[shard.name]]
            good += [(shard, i) for i in kept if split_of(shard.run_ids[i], document["split"]) == "train"]
    size = read_layout(folder, layout).size
    std, coeff, prior = _statistics(good, size, pairs, seed, progress) if good and pairs else (None, None, None)
    report = Prepared(
        runs=sum(len(shard.run_ids) for shard in shards),
        bad_runs={run: reason for reasons in bad.values() for run, reason in reasons.items()},
        bad_files=bad_files,
        removed=delete and not dry_run,
        std=std,
        openai_coeff=coeff,
        prior_bpd=prior,
    )
    if not dry_run:
        if delete:
            _remove(folder, shards, bad, bad_files)
        document = {
            "excluded": {} if delete else report.bad_runs,
            "std": std,
            "openai_coeff": coeff,
            "prior_bpd": prior,
        }
        write_json(folder / REPORT, document)
    return report


def excluded(folder: Path) -> set[str]:
    """Ids of the runs that :func:`prepare` found bad; none if the zoo was not prepared."""
    path = folder / REPORT
    if not path.exists():
        return set()
    document: Any = read_json(path)
    found = document.get("excluded") if isinstance(document, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: no table 'excluded'; run `gpt-diffusion prepare` again, or delete it")
    return set(found)


def _open_shards(folder: Path) -> tuple[list[Shard], dict[str, str]]:
    shards, bad = [], {}
    for path in visible_files(folder / "shards", ".safetensors"):
        try:
            shards.append(Shard(path))
        except (ValueError, OSError, KeyError) as error:
            bad[path.name] = " ".join(str(error).split())
    return shards, bad


def _bad_runs(shard: Shard, max_abs: float) -> dict[str, str]:
    """Bad runs of a shard, with reasons."""
    if damaged := shard.file.damaged():
        return dict.fromkeys(
            shard.run_ids, f"unreadable: wrong SHA-256 of {', '.join(damaged)} in {shard.file.path.name}"
        )
    bad = {}
    for run, start, stop in zip(shard.run_ids, shard.offsets, shard.offsets[1:], strict=False):
        low, high = (bound.item() for bound in shard.params[start:stop].aminmax())
        if not np.isfinite([low, high]).all():
            bad[run] = "non-finite weights"
        elif max(-low, high) > max_abs:
            bad[run] = f"a weight of {max(-low, high):g}, above {max_abs:g}"
    return bad


def _statistics(
    good: list[tuple[Shard, int]], size: int, pairs: int, seed: int, progress: bool
) -> tuple[float, float, float]:
    """Standard deviation, coefficient, and prior term of weights drawn from good runs."""
    moments, terms = Moments(size), []
    with tqdm(total=2 * pairs, desc="measure", unit="checkpoint", disable=not progress) as bar:
        for block in _draw(good, pairs, seed):
            moments.add(block)
            bar.update(len(block))
        std = moments.result().overall_std
        if not std > 0:
            raise ValueError("all weights drawn from the training runs are equal: nothing can be normalised")
        scaling, diffusion = Scaling(TARGET_STD / std), create_diffusion(steps=1000, learn_sigma=False)
        for block in _draw(good, pairs, seed):
            terms.append(diffusion.prior_bpd(scaling.normalize(block)).double().sum())
            bar.update(len(block))
    return std, scaling.coeff, float(torch.stack(terms).sum() / pairs)


def _draw(good: list[tuple[Shard, int]], pairs: int, seed: int) -> Iterator[Tensor]:
    """Checkpoints of uniform (run, checkpoint) pairs, with replacement, in blocks (n, D) float32, file by file."""
    rng = np.random.default_rng(seed)
    starts = np.array([shard.offsets[i] for shard, i in good])
    lengths = np.array([shard.offsets[i + 1] for shard, i in good]) - starts
    runs = np.sort(rng.integers(len(good), size=pairs))
    rows = starts[runs] + rng.integers(lengths[runs])
    files = np.unique([shard.name for shard, _ in good], return_inverse=True)[1][runs]
    for file in np.unique(files):
        chosen = np.flatnonzero(files == file)
        params = good[runs[chosen[0]]][0].params
        for block in torch.from_numpy(rows[chosen]).split(BLOCK):
            yield params[block].float()


def _remove(folder: Path, shards: list[Shard], bad: dict[str, dict[str, str]], bad_files: dict[str, str]) -> None:
    """Move bad runs out; a shard that keeps some is written anew. At any moment each run is in one place at least."""
    away = folder / REMOVED
    for name in bad_files:
        away.mkdir(exist_ok=True)
        os.replace(folder / "shards" / name, away / name)
    for shard in shards:
        wrong = bad[shard.name]
        if not wrong:
            continue
        away.mkdir(exist_ok=True)
        path, target = shard.file.path, away / shard.file.path.name
        if len(wrong) == len(shard.run_ids):
            os.replace(path, target)
            continue
        layout = read_layout(folder, shard.layout_id)
        parts: tuple[list[Run], list[Run]] = ([], [])
        for i, run in enumerate(shard.run_ids):
            parts[run not in wrong].append(_run(shard, i, [spec.name for spec in layout.buffers]))
        for place, runs in ((target, parts[0]), (path, parts[1])):
            write_shard(place, layout, runs, shard.storage)


def _run(shard: Shard, i: int, buffers: list[str]) -> Run:
    """One run of a shard, as it can be written again."""
    rows = slice(int(shard.offsets[i]), int(shard.offsets[i + 1]))
    return Run(
        id=shard.run_ids[i],
        params=shard.params[rows],
        steps=shard.column("step")[rows],
        metrics={name: shard.column(f"metrics/{name}")[rows] for name in shard.metric_names},
        config=shard.configs[i],
        buffers=shard.buffers(buffers, rows),
    )
