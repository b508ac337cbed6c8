import zlib

import numpy as np
import pytest
from ghn.graph import Graph


def stored_graph(golden, dialect="ghn3"):
    """The graph of a golden file from its nodes and edges of length 1."""
    types, names, shapes = zip(*golden.case["nodes"], strict=True)
    params = [None if name == "input" or "Backward" in name else name for name in names]
    dialect = "ppuda" if golden.case.get("graph_code") == "PPUDA" else "ghn3"
    cells = len(golden.case.get("node_info", [[]]))
    return Graph.from_nodes(types, params, shapes, golden.case["edges"], n_cells=cells, dialect=dialect)


def assert_is_golden(graph, case):
    """Types, parameters, edges, virtual edges and the table of the nodes are those of the published code."""
    assert graph.node_types == [node[0] for node in case["nodes"]]
    names = [None if node[1] == "input" or "Backward" in node[1] else node[1] for node in case["nodes"]]
    assert graph.node_params == names
    assert graph.node_shapes == [None if node[2] is None else tuple(node[2]) for node in case["nodes"]]
    flow = graph.edges[graph.edges[:, 2] == 1][:, :2].tolist()
    assert flow == sorted(case["edges"])
    lengths, counts = np.unique(graph.edges[:, 2].numpy(), return_counts=True)
    assert dict(zip(map(str, lengths.tolist()), counts.tolist(), strict=True)) == case["distance_histogram"]
    assert zlib.crc32(graph.distances.numpy().astype(np.uint8).tobytes()) == case["adjacency_crc32"]
    info = [[[*entry[:3], entry[3] and list(entry[3]), *entry[4:]] for entry in cell] for cell in graph.node_info]
    if "node_info" in case:
        assert info == case["node_info"]
    else:
        assert info[0][-len(case["node_info_tail"]) :] == case["node_info_tail"]
        assert len(info[0]) == case["n_node_info"]


@pytest.mark.golden("models_graph_*.json")
def test_virtual_edges_and_cells_are_the_published_ones(golden):
    assert_is_golden(stored_graph(golden), golden.case)
