"""What the commands of :mod:`ghn.cli` do. Results go to stdout, progress to stderr."""

import dataclasses
import json
import sys
import time

import torch

from ghn.adjust import adjust_net
from ghn.checking import check as check_model
from ghn.cli import CheckCommand, GraphCommand, PredictCommand
from ghn.graph import Graph
from ghn.models import resolve_model
from ghn.pretrained import from_pretrained
from ghn.writing import predict_to


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
    if not command.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {command.out}: the folder {command.out.absolute().parent} does not exist")
    ghn = from_pretrained(command.weights, revision=command.revision, offline=command.offline)
    ghn.to("cuda" if command.device == "cuda" or (command.device == "auto" and torch.cuda.is_available()) else "cpu")
    classes = command.num_classes or ghn.num_classes
    torch.manual_seed(command.seed)
    model = resolve_model(command.model, num_classes=classes, small_images=command.adjust is not None)
    if command.adjust:
        model = adjust_net(model)
    start = time.perf_counter()
    (made,) = ghn.graphs_of([model], extended=command.extended)
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
    if written.kept:
        shown = ", ".join(written.kept[:5]) + (", ..." if len(written.kept) > 5 else "")
        print(f"{len(written.kept)} tensors keep their initial values: {shown}", file=sys.stderr)


def _empty(shape: tuple[int, ...] | None) -> torch.Tensor | None:
    return None if shape is None else torch.zeros(shape)
