import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torchvision
from ghn import Graph, check, resolve_model
from torch import nn


def flow(graph):
    """For each node the nodes before it, by parameter or type."""
    names = [param or kind for kind, param in zip(graph.node_types, graph.node_params, strict=True)]
    before = {name: [] for name in names}
    for a, b, length in graph.edges.tolist():
        if length == 1:
            before[names[b]].append(names[a])
    return before


class Text(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.rnn = rnn(8, 12, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(24, 3)

    def forward(self, tokens):
        output, state = self.rnn(self.embed(tokens))
        h = state[0] if isinstance(state, tuple) else state
        assert output.shape == (len(tokens), tokens.shape[1], 24) and h.shape == (4, len(tokens), 12)
        return self.out(output[:, -1]) + h[-1, :, :3]


class Tokens(nn.Module):
    """A transformer in the manner of HuggingFace: keyword inputs, a class token, a mapping out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.positions = nn.Parameter(torch.zeros(1, 7, 16))
        self.class_token = nn.Parameter(torch.zeros(1, 1, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids) + self.positions
        x = self.encoder(torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1))
        return {"logits": self.head(x[:, 0]), "nothing": None}


class Signal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv1d(2, 8, 5), nn.GroupNorm(4, 8)
        self.b, self.instance = nn.Conv1d(8, 8, 3, groups=8, dilation=2), nn.InstanceNorm1d(8, affine=True)
        self.up, self.act = nn.ConvTranspose1d(8, 4, 3), nn.PReLU()
        self.gamma = nn.Parameter(torch.ones(4, 1))
        self.out = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        x = self.act(self.norm(self.a(x)))
        return self.out((self.up(self.instance(self.b(x))) * self.gamma).mean(-1))


class Volume(nn.Sequential):
    def __init__(self):
        conv, norm = nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4)
        super().__init__(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2))


class Repeated(nn.Module):
    """One layer three times."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        for _ in range(3):
            x = torch.relu(self.layer(x))
        return self.out(x)


TOKENS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
MODELS = {
    "lstm": (lambda: Text(nn.LSTM), TOKENS),
    "gru": (lambda: Text(nn.GRU), TOKENS),
    "transformer": (Tokens, {"input_ids": TOKENS, "attention_mask": None}),
    "1-D": (Signal, torch.zeros(2, 2, 40)),
    "3-D": (Volume, torch.zeros(2, 1, 8, 8, 8)),
    "repeated": (Repeated, torch.zeros(2, 4)),
    "attention": (lambda: nn.MultiheadAttention(8, 2), (torch.zeros(5, 2, 8),) * 3),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_extended_dialect_reaches_every_parameter(name, training):
    make, inputs = MODELS[name]
    model = make().train(training)
    graph = Graph(model, example_inputs=inputs, extended=True)
    assert check(model, example_inputs=inputs).counts["kept"] == 0
    norms = {f"{path}.bias" for path, m in model.named_modules() if "norm" in type(m).__name__.lower()}
    named = {param.removeprefix(".") for param in graph.node_params if param}
    assert named == {key for key, _ in model.named_parameters()} - norms
    edges = graph.edges[graph.edges[:, 2] == 1]
    assert graph.node_types[0] == "input" and (edges[:, 0] < edges[:, 1]).all()


def test_layers_are_joined_in_the_order_of_the_data():
    before = flow(Graph(Signal(), example_inputs=torch.zeros(2, 2, 40), extended=True))
    chain = [
        "input",
        "a.weight",
        "a.bias",
        "norm.weight",
        "act.weight",
        "b.weight",
        "b.bias",
        "instance.weight",
        "up.weight",
        "up.bias",
        ".gamma",
    ]
    assert before == {"input": []} | {
        b: [a] for a, b in zip([*chain, "glob_avg"], [*chain[1:], "glob_avg", "out.weight"], strict=True)
    }


def test_recurrent_layers_are_chains_of_their_weights():
    before = flow(Graph(Text(nn.LSTM), example_inputs=TOKENS, extended=True))
    assert before["rnn.weight_ih_l0"] == before["rnn.weight_ih_l0_reverse"] == ["embed.weight"]
    assert before["rnn.weight_hh_l1"] == ["rnn.bias_ih_l1"]
    assert len(before) == 2 + 16 + 2 + 2  # input, embedding, the layer's tensors, concat and sum, output


def test_packed_sequences_are_understood():
    class Packed(Text):
        def forward(self, tokens):
            x = nn.utils.rnn.pack_padded_sequence(self.embed(tokens), torch.tensor([7, 3]), batch_first=True)
            output, _ = self.rnn(x)
            return self.out(output.data)

    assert len([p for p in Graph(Packed(nn.GRU), example_inputs=TOKENS, extended=True).node_params if p]) == 19


def test_published_dialects_leave_other_layers_out():
    report = check(Signal(), example_inputs=torch.zeros(2, 2, 40))
    assert report.of("published") == ["out.weight"]
    assert report.counts == {"published": 1, "extended": 12, "kept": 0}


def test_check_tells_who_sets_what_and_why():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.scale = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Parameter(torch.ones(4, 1, 1))
            self.forgotten, self.fc = nn.Linear(2, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc((self.norm(self.conv(x)) * self.scale).mean((2, 3)))

    report = check(Net())
    found = {entry.name: (entry.setter, entry.reason) for entry in report.parameters}
    assert found["norm.bias"] == ("published", "BatchNorm2d: together with its weight")
    assert found["scale"] == ("extended", "Net: the published dialect has no node for it")
    assert found["forgotten.bias"] == ("kept", "Linear: no operation on the traced input reads it")
    assert report.of("kept") == ["forgotten.weight", "forgotten.bias"]
    assert "2 tensors kept" in str(report) and str(report).count("\n") == len(found)


@pytest.mark.parametrize(
    ("name", "kept"), [("convnext_tiny", "layer_scale"), ("swin_t", "relative_position_bias_table")]
)
def test_check_agrees_with_the_tables_of_the_specification(name, kept):
    report = check(resolve_model(name, meta=True))
    left = [entry.name for entry in report.parameters if entry.setter != "published"]
    assert len(left) == {"convnext_tiny": 18, "swin_t": 12}[name] and all(kept in entry for entry in left)


def test_frozen_and_shared_parameters_have_nodes():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).requires_grad_(False)
    model[2].weight = model[0].weight
    report = check(model, example_inputs=torch.zeros(1, 4))
    assert report.counts == {"published": 3, "extended": 0, "kept": 0}
    assert {entry.reason for entry in report.parameters} == {"Linear; frozen, but predicted"}


def test_the_input_size_is_that_of_timms_description():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 3))
    model.default_cfg = {"input_size": (1, 5, 5)}
    assert Graph(model).expected_input_sz == (1, 5, 5)


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("resnt50", ValueError, "unknown model 'resnt50'; did you mean resnet50"),
        ("deepnets:test/3", ValueError, "cannot be read in this version"),
        ("absent_module:make", ImportError, "No module named 'absent_module'"),
        ("torch.nn:Absent", ValueError, "no callable 'Absent'"),
        ("torch.nn:Linear", ValueError, "'torch.nn:Linear' cannot be built: TypeError"),
        ("os:getcwd", ValueError, "gives a str, not a module"),
    ],
)
def test_unknown_models_are_named(name, error, match):
    with pytest.raises(error, match=match):
        resolve_model(name)


def test_models_are_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "own_nets_of_a_test.py").write_text("import torch\ndef net(): return torch.nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(resolve_model("own_nets_of_a_test:net"), nn.Linear)
    assert isinstance(resolve_model("resnet18", num_classes=7, meta=True), torchvision.models.ResNet)
    assert resolve_model("DARTS", small_images=True, meta=True).expected_input_sz == 32
    assert not next(resolve_model("regnet_x_400mf", meta=True).parameters()).is_meta  # its initialisation needs values


def run(capsys, *arguments):
    from ghn.cli import main

    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_check_and_graph_print_json(capsys):
    status, out, _ = run(capsys, "check", "resnet18", "--json")
    assert status == 0 and json.loads(out)["counts"] == {"published": 62, "extended": 0, "kept": 0}
    status, out, _ = run(capsys, "graph", "resnet18", "--json")
    found = json.loads(out)
    assert status == 0 and found["nodes"] == len(found["graph"]) == 53 and len(found["edges"]) == 60
    assert found["graph"][1] == {"type": "conv", "parameter": "conv1.weight", "shape": [64, 3, 7, 7]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "absent"], "ghn: unknown model 'absent'"),
        (["graph", "resnet18", "--input", "2", "3"], "ghn: ResNet fails on example_inputs (float32 (2, 3))"),
        (["graph", "torch.nn:ReLU"], "ghn: ReLU has no parameters"),
    ],
)
def test_problems_are_one_line(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert status == 1 and not out and err.startswith(message) and err.count("\n") == 1


def test_models_of_timm_need_the_extra(monkeypatch):
    made = SimpleNamespace(
        is_model=lambda name: name == "tiny",
        list_models=lambda: ["tiny"],
        create_model=lambda name, pretrained, num_classes=2: nn.Linear(2, num_classes),
    )
    monkeypatch.setitem(sys.modules, "timm", made)
    assert resolve_model("timm:tiny", num_classes=5).out_features == 5
    with pytest.raises(ValueError, match="timm has no model 'tinyy'; close: tiny"):
        resolve_model("timm:tinyy")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'ghn\[timm\]'"):
        resolve_model("timm:tiny")
