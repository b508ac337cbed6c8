"""What the commands of :mod:`ghn.cli` do. Results go to stdout, progress to stderr."""

import dataclasses
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from ghn import training
from ghn.adjust import adjust_net
from ghn.checking import check as check_model
from ghn.cli import CheckCommand, EvalCommand, GraphCommand, PredictCommand, TrainCommand
from ghn.config import TrainConfig, check_seed
from ghn.evaluation import Comparison, compare, draw_comparison
from ghn.graph import Graph
from ghn.images import load_images
from ghn.models import resolve_model
from ghn.pretrained import from_pretrained
from ghn.writing import check_output, predict_to


def check(command: CheckCommand) -> None:
    """List who sets which parameter."""
    model = resolve_model(command.model, meta=True)
    report = check_model(model, example_inputs=_empty(command.input), dialect=command.dialect)
    if command.json:
        parameters = [entry._asdict() for entry in report.parameters]
        print(json.dumps({"model": command.model, "counts": report.counts, "parameters": parameters}))
    else:
        print(report)


def graph(command: GraphCommand) -> None:
    """Print, draw or write down a graph."""
    _check_picture(command.png)
    model = resolve_model(command.model, meta=True)
    found = Graph(
        model,
        example_inputs=_empty(command.input),
        dialect=command.dialect,
        compat=command.compat,
        extended=command.extended,
    )
    if command.png is not None:
        found.draw(command.png, labels=command.labels)
    flow = found.edges[:, 2] == 1
    if command.json:
        nodes = zip(found.node_types, found.node_params, found.node_shapes, strict=True)
        summary = {"model": command.model, "nodes": found.n_nodes, **found.properties()}
        described = [{"type": kind, "parameter": name, "shape": shape} for kind, name, shape in nodes]
        print(json.dumps({**summary, "graph": described, "edges": found.edges[flow, :2].tolist()}))
    else:
        size = f"{found.n_nodes} nodes, {int(flow.sum())} edges and {int((~flow).sum())} virtual edges"
        print(
            f"{command.model}: {size}; average degree {found.properties()['avg_degree']:.2f}, "
            f"average path {found.properties()['avg_path']:.2f}"
        )
        if command.png is not None:
            print(f"wrote {command.png}")


def predict(command: PredictCommand) -> None:
    """Predict the weights of a model and write them."""
    if command.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': no CUDA device is available here; use --device cpu")
    if command.num_classes is not None and command.num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {command.num_classes}")
    check_seed(command.seed)
    check_output(command.out)
    ghn = from_pretrained(command.weights, revision=command.revision, offline=command.offline)
    ghn.to("cuda" if command.device == "cuda" or (command.device == "auto" and torch.cuda.is_available()) else "cpu")
    classes = command.num_classes or ghn.num_classes
    torch.manual_seed(command.seed)
    model = resolve_model(command.model, num_classes=classes, small_images=command.adjust is not None)
    with warnings.catch_warnings(record=True, action="always") as notes:
        model = adjust_net(model) if command.adjust else model
    start = time.perf_counter()
    (made,) = ghn.graphs_of([model], example_inputs=_empty(command.input), extended=command.extended)
    written = predict_to(
        ghn,
        model,
        command.out,
        graph=made,
        predict_class_layers=not command.keep_class_layer,
        generator=torch.Generator().manual_seed(command.seed),
        progress=not command.json,
    )
    report = {**dataclasses.asdict(written), "path": str(written.path), "seconds": time.perf_counter() - start}
    if command.json:
        print(json.dumps(report))
        return
    print(f"{written.path}: {written.parameters:,} numbers predicted in {report['seconds']:.1f} s")
    for note in notes:
        print(note.message, file=sys.stderr)
    if written.kept:
        shown = ", ".join(written.kept[:5]) + (", ..." if len(written.kept) > 5 else "")
        print(f"{len(written.kept)} tensors keep their initial values: {shown}", file=sys.stderr)


def train(command: TrainCommand) -> int:
    """Train a hypernetwork; 130 if Ctrl-C stopped it."""
    config = TrainConfig(**{field.name: getattr(command, field.name) for field in dataclasses.fields(TrainConfig)})
    if command.dry_run:
        forecast = training.forecast(config, data_dir=command.data_dir, download=command.download)
        _show(dataclasses.asdict(forecast), command.json)
        return 0
    report = training.train(
        config,
        command.out,
        resume=command.resume,
        data_dir=command.data_dir,
        download=command.download,
        limit_seconds=command.limit_seconds,
        quiet=command.json,
    )
    shown = {**dataclasses.asdict(report), "folder": str(report.folder), "finished": report.finished}
    _show(shown, command.json)
    if not report.finished:
        print(f"stopped at step {report.step} of {report.steps}; go on with --resume", file=sys.stderr)
    return 130 if report.interrupted else 0


def evaluate(command: EvalCommand) -> None:
    """Compare predicted with random weights."""
    _check_picture(command.png)
    ghn = from_pretrained(command.weights).to(training.choose_device(command.device))
    found = compare(
        ghn,
        load_images(command.data, command.data_dir, download=command.download),
        num_nets=command.num_nets,
        small=command.nets == "small",
        epochs=command.epochs,
        lrs=command.lr,
        seed=command.seed,
        quiet=command.json,
    )
    if command.png is not None:
        draw_comparison(found, command.png)
    if command.json:
        sums: dict[str, Any] = {
            "means": found.means(),
            "untrained": vars(found.untrained),
            "trained": vars(found.trained),
        }
        sums |= {"random_lr": found.random_lr, "predicted_lr": found.predicted_lr}
        print(json.dumps({"networks": [dataclasses.asdict(one) for one in found.networks], **sums}))
    else:
        _print_table(found, command.epochs)


def _print_table(found: Comparison, epochs: int) -> None:
    """Accuracies of all networks, their means, and the intervals."""
    later = f"after {epochs} epoch" + ("s" if epochs != 1 else "")
    gains = {"as initialised": found.untrained} | ({later: found.trained} if epochs else {})
    print(f"{'':>21}" + "".join(f"{name:^22}" for name in gains))
    print(f"{'network':>9}{'parameters':>12}" + f"{'random':>11}{'predicted':>11}" * len(gains))
    names = list(found.means())[: 2 * len(gains)]
    for one in found.networks:
        print(f"{one.index:>9}{one.parameters:>12,}" + "".join(f"{getattr(one, name):>11.3f}" for name in names))
    print(f"{'mean':>9}{'':>12}" + "".join(f"{found.means()[name]:>11.3f}" for name in names))
    if epochs:
        print(f"learning rates, chosen on validation images: random {found.random_lr}, predicted {found.predicted_lr}")
    for name, gain in gains.items():
        print(f"predicted - random, {name}: {gain.mean:+.3f} (95 % interval {gain.low:+.3f} to {gain.high:+.3f})")


def _show(report: dict[str, Any], as_json: bool) -> None:
    """Print a report: one JSON object, or one line for each entry."""
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in report.items()}
    print(json.dumps(shown) if as_json else "\n".join(f"{key}: {value}" for key, value in shown.items()))


def _empty(shape: tuple[int, ...] | None) -> torch.Tensor | None:
    """Stand-in for an input."""
    if shape is not None and min(shape, default=0) < 0:
        raise ValueError(f"--input needs sizes that are not negative, got {' '.join(map(str, shape))}")
    return None if shape is None else torch.zeros(shape)


def _check_picture(path: Path | None) -> None:
    """Refuse a path to which no picture can be written, before the work that is to be drawn."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--png {path}: there is no folder {path.absolute().parent}; create it first")
    if path.is_dir() or path.suffix not in ("", ".png", ".pdf", ".svg"):
        raise ValueError(f"--png {path}: give a file *.png, *.pdf or *.svg")
