"""What the commands of :mod:`ghn.cli` do. Results go to stdout, progress to stderr."""

import json

import torch

from ghn.checking import check as check_model
from ghn.cli import CheckCommand, GraphCommand
from ghn.graph import Graph
from ghn.models import resolve_model


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


def _empty(shape: tuple[int, ...] | None) -> torch.Tensor | None:
    return None if shape is None else torch.zeros(shape)
