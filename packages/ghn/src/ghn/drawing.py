"""Pictures of graphs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
from zoo_common.files import atomic_write

if TYPE_CHECKING:
    from ghn.graph import Graph

#: Colour, marker, edge colour and relative size of the nodes of each primitive (those of the published pictures).
STYLES: dict[str, tuple[str, str, str, float]] = {
    "sep_conv": ("#000080", "o", "gray", 1.0),
    "dil_conv": ("#0000cd", "o", "gray", 1.0),
    "conv": ("#0008ff", "o", "gray", 1.0),
    "conv 1x1": ("#0008ff", "^", "black", 1.0),
    "bias": ("#ff00ff", "d", "gray", 1.0),
    "msa": ("#0a0a0a", "o", "gray", 1.0),
    "cse": ("#00d4ff", "o", "gray", 1.0),
    "bn": ("#29ffce", "s", "black", 1.0),
    "ln": ("#ffff00", "s", "gray", 1.0),
    "pos_enc": ("#97ff60", "s", "gray", 1.0),
    "max_pool": ("#ceff29", "o", "black", 1.75),
    "avg_pool": ("#ffe600", "o", "gray", 1.0),
    "glob_avg": ("#ffa700", "o", "gray", 2.0),
    "sum": ("#ff6800", "o", "gray", 1.0),
    "concat": ("#ff2900", "^", "gray", 1.0),
    "input": ("#cd0000", "s", "black", 2.0),
}


def style_of(graph: "Graph", node: int) -> str:
    """Row of :data:`STYLES`: the primitive, with 1x1 convolutions and linear layers apart from others."""
    kind, shape = graph.node_types[node], graph.node_shapes[node]
    one = shape is not None and (len(shape) == 2 or tuple(shape[2:]) == (1, 1))
    return "conv 1x1" if kind == "conv" and one else kind


def draw(
    graph: "Graph",
    path: str | Path | None = None,
    *,
    labels: bool = False,
    legend: bool = True,
    node_size: float = 60,
    figsize: tuple[float, float] | None = None,
) -> Any:  # noqa: ANN401
    """Draw the data flow of a graph from top to bottom, long graphs in several columns; see :meth:`Graph.draw`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'ghn[plot]'") from error
    flow = graph.flow()
    places, columns = layout(flow)
    spread = np.ptp(list(places.values()), axis=0) + 1
    low, high = np.min(list(places.values()), axis=0), np.max(list(places.values()), axis=0)
    size = figsize or (float(np.clip(spread[0] * 0.42, 4, 60)), float(np.clip(spread[1] * 0.3, 4, 40)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(low[0] - 1.3, high[0] + 1.3)
    axes.set_ylim(low[1] - 0.7, high[1] + 0.7)
    axes.margins(0)
    _draw_edges(flow, places, columns, axes, node_size)
    kinds = {node: style_of(graph, node) for node in flow}
    for kind, (colour, marker, rim, scale) in STYLES.items():
        chosen = [node for node in flow if kinds[node] == kind]
        if chosen:
            x, y = np.array([places[node] for node in chosen]).T
            area = node_size * scale
            axes.scatter(x, y, s=area, c=colour, marker=marker, edgecolors=rim, linewidths=0.6, label=kind, zorder=3)
    if labels:
        for node, (x, y) in places.items():
            axes.annotate(short_label(graph, node), (x, y), (6, 0), "data", "offset points", fontsize=5, va="center")
    if legend:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    if path is not None:
        kind = Path(path).suffix.removeprefix(".") or "png"
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=150, bbox_inches="tight")
    return figure


def short_label(graph: "Graph", node: int) -> str:
    """A parameter's name, shortened; of other nodes the type."""
    name = graph.node_params[node]
    if name is None:
        return graph.node_types[node]
    for long, short in (("features", "f"), (".weight", ".w"), (".bias", ".b"), ("_weight", "_w"), ("_bias", "_b")):
        name = name.replace(long, short)
    return name


def _draw_edges(
    flow: nx.DiGraph,
    places: dict[int, tuple[float, float]],
    columns: dict[int, int],
    axes: Any,  # noqa: ANN401
    size: float,
) -> None:
    """Edges to the next row straight, those that skip rows bent to the side they come from, those to a column thin."""
    kinds: dict[str, list[tuple[int, int]]] = {"straight": [], "left": [], "right": [], "across": []}
    for a, b in flow.edges:
        (x, y), (x_to, y_to) = places[a], places[b]
        bent = "right" if x > x_to + 0.01 else "left"
        kinds["across" if columns[a] != columns[b] else bent if y - y_to > 1.01 else "straight"].append((a, b))
    looks: dict[str, dict[str, Any]] = {
        "straight": {},
        "left": {"connectionstyle": "arc3,rad=0.25"},
        "right": {"connectionstyle": "arc3,rad=-0.25"},
        "across": {"width": 0.5, "edge_color": "tab:gray", "connectionstyle": "arc3,rad=0.05", "style": "dashed"},
    }
    for kind, edges in kinds.items():
        if edges:
            look = {"width": 0.7, "edge_color": "black", "arrowsize": 7, **looks[kind]}
            nx.draw_networkx_edges(flow, places, edges, ax=axes, node_size=size, arrowstyle="-|>", **look)


def layout(flow: nx.DiGraph) -> tuple[dict[int, tuple[float, float]], dict[int, int]]:
    """Place nodes in layers; uses graphviz where pygraphviz is installed and the graph is short.

    Returns:
        Position and column of each node.
    """
    layers = _layers(flow)
    cuts = _cuts(flow, layers)
    if len(cuts) == 1:
        try:
            found = nx.nx_agraph.graphviz_layout(flow, prog="dot")
        except (ImportError, OSError):
            pass
        else:
            return {node: (x / 54, y / 36) for node, (x, y) in found.items()}, dict.fromkeys(flow, 0)
    places: dict[int, tuple[float, float]] = {}
    columns: dict[int, int] = {}
    left = 0.0
    for column, (start, end) in enumerate(zip([0, *cuts], cuts, strict=False)):
        part = layers[start:end]
        width = max(map(len, part))
        for row, layer in enumerate(part):
            for i, node in enumerate(layer):
                places[node] = (left + (width - len(layer)) / 2 + i, -float(row))
                columns[node] = column
        left += width + 1.5
    return places, columns


def _cuts(flow: nx.DiGraph, layers: Sequence[Sequence[int]]) -> list[int]:
    """Ends of the columns: they make about a square side by side, and are cut where the fewest values are still needed."""
    level = {node: i for i, layer in enumerate(layers) for node in layer}
    crossing = np.zeros(len(layers) + 1)
    for node in flow:
        crossing[level[node] + 1 : max((level[b] for b in flow.successors(node)), default=0) + 1] += 1
    width = np.mean([len(layer) for layer in layers]) + 2.5
    count = max(1, round(len(layers) / max(12, np.sqrt(len(layers) * width * 1.2))))
    rows = -(-len(layers) // count)
    cuts = [0]
    while cuts[-1] + 1.3 * rows < len(layers):
        near = np.arange(cuts[-1] + int(0.7 * rows), cuts[-1] + int(1.2 * rows))
        cuts.append(int(min(near, key=lambda i: (crossing[i], abs(i - cuts[-1] - rows)))))
    return [*cuts[1:], len(layers)]


def _layers(flow: nx.DiGraph) -> list[list[int]]:
    """Nodes by their longest path from a source, sources just before their first successor; ordered against crossings."""
    depth = dict.fromkeys(flow, 0)
    if nx.is_directed_acyclic_graph(flow):
        order = list(nx.topological_sort(flow))
        for node in order:
            depth[node] = max((depth[a] + 1 for a in flow.predecessors(node)), default=0)
        for node in order:
            following = [depth[b] for b in flow.successors(node)]
            if not flow.in_degree(node) and following and node != order[0]:
                depth[node] = max(0, min(following) - 1)
    else:
        depth = {node: i for i, node in enumerate(flow)}
    layers: list[list[int]] = [[] for _ in range(max(depth.values(), default=0) + 1)]
    for node, level in depth.items():
        layers[level].append(node)
    place = {node: (i + 0.5) / len(layer) for layer in layers for i, node in enumerate(layer)}
    for _ in range(4):
        for layer in layers:
            layer.sort(key=lambda node: np.mean([place[a] for a in flow.predecessors(node)] or [place[node]]))
            place |= {node: (i + 0.5) / len(layer) for i, node in enumerate(layer)}
    return [layer for layer in layers if layer]
