import random
import re
import zlib

import numpy as np
import pytest
import torch
import torchvision
from ghn.deepnets import GENOTYPES, Network
from ghn.graph import Graph, GraphBatch
from support.hypernetworks import stored_architecture
from torch import nn


def params_of(case):
    return [None if name == "input" or "Backward" in name else name for _, name, _ in case["nodes"]]


def dialect_of(case):
    return "ppuda" if case.get("graph_code") == "PPUDA" else "ghn3"


def classifier(name, **options):
    """A torchvision classifier without initialisation where that is slow."""
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return getattr(torchvision.models, name)(**options)


def golden_model(case):
    """The model that a golden file names: of torchvision, or a network with the arguments in its description."""
    if not case["model"].startswith("net_"):
        name = re.sub("_(eval|train|compat)$", "", case["model"])
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            return classifier(name).train(case["mode"] != "eval")
    genotype, arguments = re.search(r"genotype=(\w+), num_classes=10, (\{.*\})", case["description"]).groups()
    options = dict(re.findall(r"'(\w+)': ([\w.]+)", arguments))
    values = {"True": True, "False": False, "None": None}
    options = {name: values[text] if text in values else int(text) for name, text in options.items()}
    return Network(num_classes=10, genotype=GENOTYPES[genotype], **options)


def assert_is_golden(graph, case):
    """Types, parameters, edges, virtual edges and the table of the nodes are those of the published code."""
    assert graph.node_types == [node[0] for node in case["nodes"]]
    assert graph.node_params == params_of(case)
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
    types, _, shapes = zip(*golden.case["nodes"], strict=True)
    cells = len(golden.case.get("node_info", [[]]))
    params, dialect = params_of(golden.case), dialect_of(golden.case)
    graph = Graph.from_nodes(types, params, shapes, golden.case["edges"], n_cells=cells, dialect=dialect)
    assert_is_golden(graph, golden.case)


@pytest.mark.golden("models_graph_*.json")
@pytest.mark.parametrize("compat", [True, False])
def test_traced_graphs_are_the_published_ones(golden, compat):
    model, dialect = golden_model(golden.case), dialect_of(golden.case)
    if (
        isinstance(model, Network) and dialect == "ppuda"
    ):  # then the default is the graph of the stored files, see below
        compat = True
    assert_is_golden(Graph(model, dialect=dialect, compat=compat), golden.case)


@pytest.mark.golden("deepnets_loader.json", cases="items")
def test_networks_have_the_graphs_of_the_files_of_deepnets(golden):
    """With a node for each attention and each gate, in both dialects; only the order is ours."""
    split, index, cutoff, images = golden.name.split("/")
    dialect = "ghn3" if images == "cifar10" else "ppuda"
    network = stored_architecture(golden.path.parent, split, int(index)).build(keys="ghn2")
    graph = Graph(network, dialect=dialect, ve_cutoff=int(cutoff.removeprefix("ve")))
    found = graph.n_nodes, len(graph.edges), int(graph.edges[:, 2].sum())
    assert found == (golden.case["n_nodes"], golden.case["ghn2"]["n_edges"], golden.case["ghn2"]["dist_sum"])


def same(a, b):
    return a.node_types == b.node_types and a.node_params == b.node_params and torch.equal(a.edges, b.edges)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16", "googlenet"])
def test_an_empty_batch_gives_the_graph_of_images(name):
    model = classifier(name)
    size = 224
    images = torch.empty(2, 3, size, size)
    assert same(Graph(model), Graph(model, example_inputs=images))  # given inputs are traced on the meta device


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_classifier_has_the_same_graph_however_it_is_traced(name):
    with torch.device("meta") if not name.startswith("regnet") else torch.device("cpu"):
        model = classifier(name)
    graph = Graph(model)
    size = 299 if name == "inception_v3" else 224
    assert same(graph, Graph(model, example_inputs=torch.empty(2, 3, size, size)))
    assert graph.node_types[0] == "input"
    flow = graph.edges[graph.edges[:, 2] == 1]
    assert (flow[:, 0] < flow[:, 1]).all()
    if not name.startswith(("swin_v2", "maxvit")):
        assert same(graph, Graph(model, compat=True))


@pytest.mark.parametrize("name", ["swin_v2_t", "maxvit_t"])
def test_right_graphs_lead_from_the_input_to_the_classifier(name):
    graph = Graph(classifier(name))
    flow = graph.edges[graph.edges[:, 2] == 1]
    assert (flow[:, 0] < flow[:, 1]).all()
    assert graph.node_types[0] == "input"
    sources = set(range(graph.n_nodes)) - set(flow[:, 1].tolist())
    sinks = set(range(graph.n_nodes)) - set(flow[:, 0].tolist())
    assert sources == {0} and sinks == {graph.n_nodes - 1}
    last = [entry for entry in graph.node_info[0] if entry.is_last_weight]
    assert [entry.name for entry in last] == ["head.weight" if name == "swin_v2_t" else "classifier.5.weight"]
    published = Graph(classifier(name), compat=True)
    assert published.n_nodes == {"swin_v2_t": 239, "maxvit_t": 451}[name]  # table of the specification


def test_tracing_leaves_no_traces():
    model = classifier("mobilenet_v3_small")
    model.features[0].eval()
    model.note = torch.zeros(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = [id(p) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    for inputs in (None, torch.empty(2, 3, 64, 64)):
        Graph(model, example_inputs=inputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == identities
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


def test_deep_models_need_no_recursion():
    layers = [layer for _ in range(3000) for layer in (nn.Conv2d(3, 3, 1), nn.ReLU())]
    graph = Graph(nn.Sequential(*layers), ve_cutoff=1)
    assert graph.n_nodes == 6001


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 30 * 30, 2)
        self.expected_input_sz = 32

    def forward(self, x):
        return self.fc(self.conv(x).view(x.size(0), -1))


def test_flattening_by_view_works_on_an_empty_batch():
    graph = Graph(Views())
    assert graph.node_params[1:] == ["conv.weight", "conv.bias", "fc.weight", "fc.bias"]
    assert graph.expected_input_sz == 32


class LooksAtValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x) if x.sum().item() < 1e9 else x


class Gated(nn.Module):
    """Skips a layer if its images are black."""

    def __init__(self):
        super().__init__()
        self.conv, self.other, self.expected_input_sz = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), 8

    def forward(self, x):
        x = self.conv(x)
        return self.other(x) if x.abs().sum() > 0 else x


def test_code_that_looks_at_values_runs_for_real():
    assert Graph(Gated()).node_params[-1] == "other.bias"  # an empty batch has a sum of 0
    assert Graph(LooksAtValues(), example_inputs=torch.zeros(3, 4)).node_params == [None, "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        (nn.ReLU(), {}, "ReLU has no parameters"),
        (nn.LazyLinear(2), {}, "'weight' has no shape yet"),
        (nn.Linear(4, 2), {}, r"Linear fails on the guessed input \(float32 \(2, 3, 224, 224\)\).*example_inputs"),
        (nn.Linear(4, 2), {"example_inputs": {"x": torch.ones(1)}}, r"fails on example_inputs \(x=float32 \(1,\)\)"),
        (nn.Linear(4, 2), {"node_feat": torch.ones(2, 1)}, "not both"),
        (torchvision.models.vit_b_32, {"dialect": "ppuda"}, "2021 know no VisionTransformer"),
        (None, {}, "needs a model"),
        (None, {"node_feat": torch.tensor([9, 4]), "edges": torch.tensor([[0, 2, 1]])}, "node 2 of a graph of 2"),
        (None, {"node_feat": torch.tensor([9, 4]), "A": torch.zeros(3, 3)}, r"\(3, 3\) for 2 nodes"),
    ],
)
def test_bad_input_is_named(model, options, match):
    with torch.device("meta"):
        model = model() if callable(model) and not isinstance(model, nn.Module) else model
    with pytest.raises(ValueError, match=match):
        Graph(model, **options)


def test_stored_graphs_are_what_was_traced():
    graph = Graph(classifier("resnet18"))
    for stored in ({"A": graph.distances}, {"edges": graph.edges}):
        again = Graph(node_feat=graph.node_feat, node_info=graph.node_info, **stored)
        assert same(graph, again) and again.node_info == graph.node_info
        assert again.node_shapes == graph.node_shapes


def small_graphs():
    chain = Graph.from_nodes(
        ["input", "conv", "bias"], [None, "a.weight", "a.bias"], [None, (2, 3), (2,)], [[0, 1], [1, 2]]
    )
    pair = Graph.from_nodes(["input", "conv"], [None, "b.weight"], [None, (2, 3)], [[0, 1]])
    return [pair, chain]


def test_batches_hold_graphs_side_by_side():
    sparse, dense = (GraphBatch(small_graphs(), dense=dense) for dense in (False, True))
    assert sparse.node_feat.tolist() == [[9, 0], [4, 0], [9, 1], [4, 1], [10, 1]]
    assert sparse.edges.tolist() == [[0, 1, 1, 0], [0, 1, 1, 1], [0, 2, 2, 1], [1, 2, 1, 1]]
    assert sparse.n_nodes.tolist() == [2, 3]
    assert dense.node_feat[..., 0].tolist() == [[9, 4, 0], [9, 4, 10]]
    assert dense.edges.tolist() == [[[0, 1, 0], [0] * 3, [0] * 3], [[0, 1, 2], [0, 0, 1], [0] * 3]]
    assert dense.mask[..., 0].tolist() == [[True, True, False], [True] * 3]
    x = torch.arange(10.0).reshape(5, 2)
    padded = dense.to_dense(x)
    assert padded.shape == (2, 3, 2) and not padded[0, 2].any()
    assert torch.equal(dense.to_sparse(padded), x)
    assert len(dense) == 2 and [graph.n_nodes for graph in dense] == [2, 3] and dense[1].n_nodes == 3
    assert dense.on_device("cpu")


def test_scattered_batches_are_balanced():
    sizes = [9, 2, 3, 8, 4, 2]
    graphs = [Graph.from_nodes(["conv"] * n, [None] * n, [None] * n, []) for n in sizes]
    nets = [nn.Identity() for _ in sizes]
    shares = GraphBatch(graphs).scatter(["cpu", "cpu"], nets)
    assert [sorted(share.n_nodes.tolist()) for _, share in shares] == [[2, 3, 9], [2, 4, 8]]
    assert {id(net): graph for own, share in shares for net, graph in zip(own, share, strict=True)} == {
        id(net): graph for net, graph in zip(nets, graphs, strict=True)
    }
