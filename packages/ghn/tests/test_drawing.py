import networkx as nx
import numpy as np
import pytest
from ghn import Graph, resolve_model
from ghn.cli import main
from ghn.drawing import STYLES, layout, short_label, style_of
from ghn.primitives import PRIMITIVES


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "DARTS"])
def test_no_node_hides_another_and_data_flows_down(name):
    graph = Graph(resolve_model(name, meta=True))
    flow = graph.flow()
    places, columns = layout(flow)
    at = np.array([places[node] for node in flow])
    gaps = np.abs(at[:, None] - at[None]).max(axis=2) + np.eye(len(at))
    assert gaps.min() >= 0.99
    assert all(places[a][1] > places[b][1] for a, b in flow.edges if columns[a] == columns[b])
    assert all(columns[a] <= columns[b] for a, b in flow.edges)
    spread = np.ptp(at, axis=0)
    assert 0.2 < spread[0] / spread[1] < 5


def test_pictures_are_written(tmp_path, capsys):
    path = tmp_path / "graph.png"
    assert main(["graph", "resnet18", "--png", str(path), "--labels"]) == 0
    assert "53 nodes, 60 edges and 1294 virtual edges" in capsys.readouterr().out
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 20_000
    figure = Graph(resolve_model("resnet18", meta=True)).draw()
    shown = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert shown == {"conv", "conv 1x1", "bn", "max_pool", "glob_avg", "sum", "bias", "input"}


def test_every_primitive_has_a_style():
    assert set(PRIMITIVES) | {"conv 1x1"} == set(STYLES)


def test_labels_are_short():
    graph = Graph(resolve_model("mobilenet_v2", meta=True))
    assert short_label(graph, 1) == "f.0.0.w" and style_of(graph, 1) == "conv"
    assert short_label(graph, 0) == "input" and style_of(graph, graph.n_nodes - 2) == "conv 1x1"


def test_graph_statistics_are_those_of_networkx():
    graph = Graph(resolve_model("resnet18", meta=True))
    flow = graph.flow().to_undirected()
    expected = {
        "avg_degree": np.mean([degree for _, degree in flow.degree]),
        "avg_path": nx.average_shortest_path_length(flow),
    }
    assert graph.properties() == pytest.approx(expected)
