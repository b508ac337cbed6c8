"""What a training learns from and is measured on: the good runs of a zoo, and pairs of their checkpoints."""

import logging

import numpy as np
import torch
from zoo_common.layout import ParameterLayout
from zoo_common.tasks import Task
from zoo_common.zoo import Zoo

from gpt_diffusion.augmentation import Permuter, RulePermuter
from gpt_diffusion.config import Config, DatasetConfig
from gpt_diffusion.dataset import ParameterDataset
from gpt_diffusion.normalization import get_normalizer
from gpt_diffusion.preparation import excluded
from gpt_diffusion.pretrained import ModelInfo
from gpt_diffusion.published import PublishedZoo, find_metric, split_runs
from gpt_diffusion.units import UnitTokens


def training_pairs(config: Config, zoo: Zoo, task: Task, device: torch.device) -> tuple[ParameterDataset, ModelInfo]:
    """The training pairs of a zoo, and what the model must know of them."""
    data, units = config.dataset, config.transformer.tokens == "units"
    if not len(zoo):
        raise ValueError(f"{data.path}: the zoo is empty; fill it with `gpt-diffusion generate`")
    layout = ParameterLayout.from_module(task.constructor())
    if zoo.layout.shapes != layout.shapes:
        raise ValueError(f"{data.path}: the zoo holds {_sizes(zoo.layout)}, task {task.name!r} has {_sizes(layout)}")
    metric = find_metric(zoo, data.train_metric or task.metric_name)
    if not isinstance(zoo, PublishedZoo):  # whose records have no sums
        for part in zoo.shards.values():
            part.file.check()
    runs = good_runs(zoo, data, metric, "train")[: 1 if config.debug_mode else data.max_train_runs]
    if data.openai_coeff and isinstance(zoo, PublishedZoo) and len(runs):  # spares a pass over hundreds of GB
        coeff, ranges = data.openai_coeff, zoo.ranges(runs)
        low, high = float(ranges[:, 0].min()), float(ranges[:, 1].max())
    else:
        stats = zoo.stats(runs=runs)
        coeff, low, high = data.openai_coeff or 0.538 / stats.overall_std, stats.low, stats.high
    dataset = ParameterDataset(
        zoo,
        runs,
        metric=metric,
        normalizer=get_normalizer(data.normalizer, coeff),
        mode=data.pairs,
        min_spacing=data.min_step_spacing,
        max_spacing=data.max_step_spacing,
        epoch_size=data.target_epoch_size,
        augment=_permuter(task) if data.augment and not units else None,
        from_first=config.debug_mode,
        seed=config.rng_seed,
        device=device,
    )
    table = dataset.metrics[runs]
    last = table[np.arange(len(runs)), dataset.lengths[runs] - 1]
    info = ModelInfo(
        layout=zoo.layout,
        metric=metric,
        metric_log=metric.endswith("loss"),
        metric_scale=float(np.nanstd(table)),
        openai_coeff=coeff,
        weight_range=(low, high),
        best_metric=float(np.nanmin(table) if task.minimize else np.nanmax(table)),
        worst_metric=float(np.nanmax(table) if task.minimize else np.nanmin(table)),
        final_metric=float(np.median(last)),
        units=UnitTokens.from_symmetry(task.symmetry()) if units else None,
    )
    return dataset, info


def test_pairs(config: Config, zoo: Zoo, runs: np.ndarray, info: ModelInfo, device: torch.device) -> ParameterDataset:
    """Pairs of test runs, not permuted."""
    data = config.dataset
    return ParameterDataset(
        zoo,
        runs,
        metric=info.metric,
        normalizer=get_normalizer(data.normalizer, info.openai_coeff),
        min_spacing=data.min_step_spacing,
        max_spacing=data.max_step_spacing,
        epoch_size=max(data.target_epoch_size, len(runs)),
        seed=config.rng_seed,
        device=device,
    )


def good_runs(zoo: Zoo, data: DatasetConfig, metric: str, split: str) -> np.ndarray:
    """Runs of a split whose weights are finite and small and whose metric is known at every checkpoint."""
    runs, filtered = split_runs(zoo, data, split), zoo.filter()
    lengths = np.array([run.checkpoints for run in zoo.runs])
    known = np.flatnonzero(np.isfinite(zoo.metrics[metric].padded()).sum(1) == lengths)
    bad = excluded(zoo.path)
    listed = np.array([i for i, run in enumerate(zoo.runs) if run.id in bad], dtype=np.int64)
    good = np.setdiff1d(np.intersect1d(np.intersect1d(runs, filtered.kept), known), listed)
    if len(good) < len(runs):
        reasons = [f"{count} {reason}" for reason, count in filtered.dropped.items() if count]
        reasons += [f"{len(listed)} listed in prepared.json"] if len(listed) else []
        reasons += [f"{len(zoo) - len(known)} without a finite {metric} at every checkpoint"]
        message = "%s: %d of %d %s runs are left out (in the whole zoo: %s)"
        found = (len(runs) - len(good), len(runs), {"train": "training"}.get(split, split), ", ".join(reasons))
        logging.getLogger(__name__).warning(message, zoo.path, *found)
    return good


def _permuter(task: Task) -> Permuter:
    """The task's own rule if it has one, else the symmetry of its network."""
    return RulePermuter(task.constructor(), task.aug_fn) if task.aug_fn else task.symmetry()


def _sizes(layout: ParameterLayout) -> str:
    return ", ".join(f"{spec.name} {spec.shape}" for spec in layout.tensors)
