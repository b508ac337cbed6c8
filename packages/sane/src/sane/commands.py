"""What the commands of :mod:`sane.cli` do. Results go to stdout, progress to stderr."""

import dataclasses
import datetime
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zoo_common.checkpoint import save_checkpoint
from zoo_common.datasets import Splits
from zoo_common.files import write_json
from zoo_common.zoo import Run, Zoo

from sane import embedding, pretraining
from sane.cli import (
    AlignCommand,
    DiagnoseCommand,
    EmbedCommand,
    PredictCommand,
    PreprocessCommand,
    PretrainCommand,
    SampleCommand,
)
from sane.config import config_to_yaml, load_config
from sane.device import choose_device
from sane.features import BASELINES, available_baselines, by_layer, layer_axes
from sane.images import first_images, images_of
from sane.model import Halo, SaneModel, load_model
from sane.population import Networks, image_batches
from sane.prediction import Labelled, PropertyPredictor, Score
from sane.preparation import PrepareConfig, Prepared, network_of, open_prepared, prepare
from sane.progress import progress_bars
from sane.properties import DEFAULTS
from sane.reconstruction import LOST, reconstruct

_AXES = 512
"""Training checkpoints, at most, from which axes of the latents are taken."""


def preprocess(command: PreprocessCommand) -> None:
    """Prepare a zoo and say what was found."""
    size: Any = int(command.token_size) if command.token_size.lstrip("-").isdigit() else command.token_size
    if isinstance(size, str) and size not in ("auto", "legacy-auto"):
        raise ValueError(f"--token-size must be a number, auto or legacy-auto, got {size!r}")
    config = PrepareConfig(
        steps=command.steps,
        token_size=size,
        ignore_bn=command.ignore_bn,
        normalization=command.normalization,
        align=command.align,
        split=command.split,
        fractions=command.fractions,
        max_runs=command.max_runs,
        max_abs=command.max_abs,
        min_quantile=command.min_accuracy_quantile,
        legacy_double_bn=command.legacy_double_bn,
    )
    check_folder(command.out, command.zoo)
    prepared = prepare(command.zoo, config, quiet=command.json)
    prepared.save(command.out)
    show(
        {
            "file": str(command.out),
            "bytes": command.out.stat().st_size,
            "checkpoints": {split: len(samples.runs) for split, samples in prepared.samples.items()},
            "runs": {split: len(np.unique(samples.runs)) for split, samples in prepared.samples.items()},
            "dropped": prepared.dropped or "none",
            "tokens": f"{prepared.tokenizer.shape[0]} x {prepared.tokenizer.shape[1]}",
            "not_in_tokens": list(prepared.tokenizer.uncovered) or "none",
        },
        command.json,
    )


def align(command: AlignCommand) -> None:
    """Write an aligned copy of a zoo."""
    if command.out.resolve() == command.zoo.resolve():
        raise ValueError(f"{command.out} is the zoo itself: give another folder for the aligned copy")
    zoo, config = Zoo.open(command.zoo), PrepareConfig(align="each" if command.each else "last", normalization="none")
    if (command.out / "zoo.json").exists() and Zoo.open(command.out).attributes.get("aligned") != config.align:
        raise ValueError(f"{command.out} holds a zoo that was not made by this command: give another folder")
    prepared = prepare(zoo, config, quiet=command.json)
    copy = Zoo.create(
        command.out,
        layout=zoo.layout,
        task=zoo.task,
        split=zoo.fractions,
        attributes={**zoo.attributes, "aligned": config.align},
        exist_ok=True,
    )
    for split, samples in prepared.samples.items():
        for number in dict.fromkeys(samples.runs.tolist()):
            run = zoo.run(number)
            if run.id in copy:
                continue
            rows = np.flatnonzero(samples.runs == number)
            kept = samples.checkpoints[rows]
            copy.append(
                [
                    Run(
                        run.id,
                        prepared.vectors(split, rows),
                        np.asarray(run.steps)[kept],
                        {name: np.asarray(values)[kept] for name, values in run.metrics.items()},
                        run.config,
                        {name: values[kept] for name, values in run.buffers.items()},
                    )
                ],
                name=f"aligned-{run.id}",
            )
    show({"zoo": str(command.out), "runs": len(copy), "dropped": prepared.dropped or "none"}, command.json)


def pretrain(command: PretrainCommand) -> int:
    """Train the autoencoder; 130 if Ctrl-C stopped it."""
    overrides = list(command.overrides)
    overrides += [f"device={command.device}"] if command.device else []
    overrides += [f"seed={command.seed}"] if command.seed is not None else []
    config = load_config(command.config, overrides)
    if command.show:
        print(json.dumps(dataclasses.asdict(config)) if command.json else config_to_yaml(config).rstrip())
        return 0
    if command.dry_run:
        show(dataclasses.asdict(pretraining.forecast(config)), command.json)
        return 0
    if command.tune:
        from sane.tuning import tune

        if command.limit_seconds is not None:
            raise ValueError("--limit-seconds does not go with --tune: every trial is trained to its end")
        show(tune(config, command.tune), command.json)
        return 0
    with progress_bars(False):  # it has its own
        report = pretraining.pretrain(
            config, resume=command.resume, limit_seconds=command.limit_seconds, quiet=command.json
        )
    if int(os.environ.get("RANK", "0")) > 0:  # under torchrun, the first process speaks
        return 130 if report.interrupted else 0
    told = {**dataclasses.asdict(report), "folder": str(report.folder), "finished": report.finished}
    show(finite(told), command.json)  # before the first line of the log there is no loss
    if not report.finished:
        print(f"stopped at step {report.step} of {report.steps}; go on with --resume", file=sys.stderr)
    return 130 if report.interrupted else 0


def diagnose(command: DiagnoseCommand) -> None:
    """Reconstruct checkpoints and say which layers are lost."""
    check_least(1, num=command.num, judge_images=command.judge_images)
    check_least(0, condition=command.condition)
    model, prepared = model_and_zoo(command.model, command.prepared, command.device)
    count = len(prepared.samples[command.split].runs)
    rows = np.unique(np.linspace(0, max(count - 1, 0), min(command.num, count)).astype(np.int64))
    if not len(rows):
        raise ValueError(f"the {command.split} split has no checkpoints: choose another --split")
    accuracy: Callable[[Tensor], Tensor] | None = None
    condition: Callable[[Tensor], Tensor] | None = None
    note = "none"
    try:
        networks, splits = networks_and_images(prepared, command)
        accuracy = lambda vectors: networks.accuracy(vectors, first_images(splits.validation, command.judge_images))
        condition = conditioning(networks, splits, command.condition, 0)
    except (FileNotFoundError, ValueError) as error:
        note = f"no accuracies: {error}"
    found = reconstruct(model, prepared.vectors(command.split, rows), accuracy, condition, halo_of(command.halo))
    warning = None
    if not found.relative_error < LOST:
        warning = (
            f"relative error {found.relative_error:.2f}: almost nothing comes back, train longer or with more latents"
        )
    if command.json:
        faulty = [report.layer for report in found.faulty]
        print(json.dumps(finite({**dataclasses.asdict(found), "faulty": faulty, "note": note, "warning": warning})))
        return
    print_table(
        ["layer", "error", "norm ratio", "cosine", "accuracy alone", "finding"],
        [[r.layer, r.relative_error, r.norm_ratio, r.cosine, r.accuracy, r.finding] for r in found.layers],
    )
    show(
        {
            "relative_error": found.relative_error,
            "accuracy before": found.accuracy_before,
            "accuracy after": found.accuracy_after,
            "accuracy conditioned": found.accuracy_conditioned,
            "note": note,
            "warning": warning,
        },
        False,
    )


def embed(command: EmbedCommand) -> None:
    """Embed networks and write the embeddings."""
    check_folder(command.out, command.model, command.source)
    model = load_model(command.model, choose_device(command.device))
    with progress_bars(False):  # it has its own
        found = embedding.embed(model, command.source, halo=halo_of(command.halo), quiet=command.json)
    facts = {"runs": found.runs, "steps": found.steps, "method": found.method, "cosine": found.cosine}
    save_checkpoint(command.out, {"embeddings": found.vectors}, facts)
    summary: dict[str, Any] = {
        "file": str(command.out),
        "embeddings": list(found.vectors.shape),
        "method": found.method,
    }
    summary |= {} if found.cosine is None else {"cosine to full attention": found.cosine}
    show(summary | ({"left out": found.left_out} if found.left_out else {}), command.json)


def predict(command: PredictCommand) -> None:
    """Predict properties and compare with baselines."""
    check_least(1, resamples=command.resamples)
    check_least(0, seed=command.seed)
    if not command.properties:
        raise ValueError(f"--properties is empty: give at least one, for example {' '.join(DEFAULTS)}")
    if unknown := [name for name in command.baselines if name not in BASELINES]:
        raise ValueError(f"baseline {unknown[0]!r} is unknown; there are {', '.join(BASELINES)}")
    if command.out is not None:
        check_folder(command.out, command.model, command.prepared, *command.elsewhere)
    model, prepared = model_and_zoo(command.model, command.prepared, command.device)
    baselines = available_baselines(command.baselines, prepared.tokenizer)
    if len(baselines) < len(command.baselines):
        print("baseline spectra left out: no layer of these networks has eight eigenvalues", file=sys.stderr)
    halo = halo_of(command.halo)
    blocks = prepared.blocks("train", _AXES)
    axes = layer_axes((model.encode(vectors, halo) for _, vectors in blocks), prepared.tokenizer)

    def labelled(zoo: Prepared, split: str) -> Labelled:
        return labelled_split(model, zoo, split, command.properties, baselines, halo, axes)

    others = {str(path): _fitting(model, path, elsewhere=True, quiet=command.json) for path in command.elsewhere}
    seen = [*model.facts.get("trained_on", ()), *prepared.marks("train"), *prepared.marks("validation")]
    for path, zoo in others.items():
        _check_unseen(zoo, path, seen, "give another zoo")
    predictor = PropertyPredictor(labelled(prepared, "train"), labelled(prepared, "validation"))
    elsewhere = {name: labelled(zoo, "test") for name, zoo in others.items()}
    scores = predictor.judge(
        labelled(prepared, "test"), elsewhere=elsewhere, resamples=command.resamples, seed=command.seed
    )
    cosine = model.compare(prepared.vectors("test", slice(0, 4)), halo) if halo is not None else None
    report = {"scores": [dataclasses.asdict(score) for score in scores], "cosine to full attention": cosine}
    if command.out is not None:
        write_json(command.out, finite(report))
    if command.json:
        print(json.dumps(finite(report)))
        return
    print_table(
        [
            "property",
            "features",
            "score (95 %)",
            "tau",
            "embedding ahead by (95 %)",
            "runs",
            *(f"elsewhere {n}" for n in others),
        ],
        [_row(score, list(others)) for score in scores],
    )
    if cosine is not None:
        print(f"by windows, an approximation; cosine to full attention: {cosine:.4f}")
    for score in scores:
        if score.note:
            print(f"{score.property} from {score.features}: {score.note}")


def _check_unseen(zoo: Prepared, path: Path | str, seen: Iterable[str], remedy: str) -> None:
    """Reject a zoo with test runs that were trained or fitted on, as those of the same zoo in another split."""
    if count := len({*zoo.marks("test")} & {*seen}):
        raise ValueError(f"{path}: {count} of its test runs took part in training or fitting: {remedy}")


def labelled_split(
    model: SaneModel,
    prepared: Prepared,
    split: str,
    properties: Sequence[str] = DEFAULTS,
    baselines: Sequence[str] = (),
    halo: Halo | None = None,
    axes: Sequence[Tensor] | None = None,
) -> Labelled:
    """Embeddings (the published mean, and by layer), baseline features and properties of the checkpoints of a split.

    Args:
        model: The autoencoder.
        prepared: The zoo.
        split: train, validation or test.
        properties: What is to be predicted.
        baselines: Names of :data:`sane.features.BASELINES`.
        halo: Windows instead of full attention.
        axes: Of each layer's latents, see :func:`sane.features.layer_axes`.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in ("embedding", "embedding by layer", *baselines)}
    for _, vectors in prepared.blocks(split):
        tokens = prepared.tokens(vectors)
        latents = model.encode(vectors, halo)
        parts["embedding"].append(latents.mean(1))
        parts["embedding by layer"].append(by_layer(latents, prepared.tokenizer, axes))
        for name in baselines:
            parts[name].append(BASELINES[name](vectors, tokens, prepared.tokenizer))
    if not parts["embedding"]:
        raise ValueError(f"the {split} split has no checkpoints: prepare the zoo with other fractions or more runs")
    runs = np.array([prepared.zoo.run_ids[run] for run in prepared.samples[split].runs])
    values = {name: prepared.properties(split, name) for name in properties}
    return Labelled({name: torch.cat(found) for name, found in parts.items()}, values, runs)


def model_and_zoo(model: Path, prepared: Path, device: str) -> tuple[SaneModel, Prepared]:
    """A model, and a prepared zoo that fits it."""
    loaded = load_model(model, choose_device(device))
    return loaded, _fitting(loaded, prepared)


def _fitting(model: SaneModel, path: Path, *, elsewhere: bool = False, quiet: bool = True) -> Prepared:
    """A prepared zoo with the statistics and tokens of a model.

    Args:
        model: The model.
        path: File of the prepared zoo.
        elsewhere: It is another zoo than the model's, to be aligned with the model's reference.
        quiet: No progress bar.

    Raises:
        ValueError: It holds other networks, was prepared otherwise, or tests on runs that trained the model.
    """
    prepared = open_prepared(path)
    ours, there = model.tokenizer, prepared.tokenizer
    if (ours.layout.names, ours.layout.shapes) != (there.layout.names, there.layout.shapes):
        raise ValueError(f"{path} holds networks of another layout than the model: prepare a zoo of the same networks")
    if (ours.token_size, ours.skipped) != (there.token_size, there.skipped):
        raise ValueError(
            f"{path}: tokens of {there.token_size} scalars with {len(there.skipped)} tensors left out, the model has "
            f"{ours.token_size} and {len(ours.skipped)}: prepare the zoo with its token_size and ignore_bn"
        )
    prepared.normalization = model.normalization
    align = model.facts.get("align", "none")
    if elsewhere:
        prepared.align_with(model.reference, align, quiet=quiet)
        return prepared
    if prepared.config.align != align:
        raise ValueError(
            f"{path} is prepared with align={prepared.config.align}, the model's zoo with align={align}: "
            "use the file it was trained on"
        )
    if not torch.equal(prepared.reference, model.reference) and align != "none":
        raise ValueError(f"{path} is aligned with another reference than the model: use the file it was trained on")
    _check_unseen(prepared, path, model.facts.get("trained_on", ()), "use the file that the model was trained on")
    return prepared


def networks_and_images(prepared: Prepared, command: DiagnoseCommand | SampleCommand) -> tuple[Networks, Splits]:
    """The networks of a zoo, to be computed together, and the images of its task."""
    from sane.preparation import facts_of

    constructor, shape = network_of(prepared.zoo)
    images = images_of(facts_of(prepared.zoo), shape, command.data, command.data_dir, download=command.download)
    return Networks(constructor()), images


def conditioning(networks: Networks, splits: Splits, batches: int, seed: int) -> Callable[[Tensor], Tensor] | None:
    """What lets batch norms see training images; None for networks without them."""
    if not networks.has_batch_norm:
        return None
    return lambda vectors: networks.condition(vectors, image_batches(splits.train, 32, batches, seed)).vectors


def halo_of(pair: tuple[int, int] | None) -> Halo | None:
    """The windows that an option asks for."""
    return None if pair is None else Halo(*pair)


def check_least(least: int, **values: int | None) -> None:
    """Reject options below their least value."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def check_rate(lr: float) -> None:
    """Reject a learning rate that optimizers do not take."""
    if not 0 <= lr < math.inf:
        raise ValueError(f"--lr must not be negative and must be finite, got {lr}")


def check_folder(path: Path, *inputs: Path) -> None:
    """Reject a file that cannot be written where it is asked for, or is one of those that are read."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file to write")
    read = {file.resolve() for x in inputs for file in (x, x / "zoo.json", x / "model.safetensors")}
    if path.resolve() in read:
        raise ValueError(f"{path} is what this command reads: give another name for the file to write")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.absolute().parent} does not exist")


def _row(score: Score, others: Sequence[str]) -> list[Any]:
    interval = f"{score.measure} {score.r2:.3f} ({score.low:.3f} .. {score.high:.3f})"
    interval = interval if math.isfinite(score.r2) else "none, see below"
    ahead = ""
    if score.difference is not None:
        ahead = f"{score.difference:.3f} ({score.difference_low:.3f} .. {score.difference_high:.3f})"
    away = []
    for name in others:
        value, rank = score.elsewhere.get(name, (math.nan, math.nan))
        away.append(
            f"{value:.3f}" + (f", tau {rank:.3f}" if math.isfinite(rank) else "") if math.isfinite(value) else ""
        )
    tau = score.kendall if math.isfinite(score.kendall) else None
    return [score.property, score.features, interval, tau, ahead, score.runs, *away]


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under a head, in columns."""
    text = [[f"{c:.4f}" if isinstance(c, float) else "" if c is None else str(c) for c in row] for row in rows]
    widths = [max(len(row[k]) for row in [list(head), *text]) for k in range(len(head))]
    for row in [list(head), *text]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def finite(value: Any) -> Any:  # noqa: ANN401 (a tree of JSON values)
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [finite(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(result: Mapping[str, Any], as_json: bool, indent: str = "") -> None:
    """Print a result, as one JSON object or in lines."""
    if as_json:
        print(json.dumps(finite(result), default=str))
        return
    for name, value in result.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}:")
            show(value, False, indent + "  ")
        elif name.endswith("seconds"):
            print(f"{indent}{name}: {datetime.timedelta(seconds=round(value))}")
        elif value is not None:
            print(f"{indent}{name}: {f'{value:,.4f}' if isinstance(value, float) else value}")
