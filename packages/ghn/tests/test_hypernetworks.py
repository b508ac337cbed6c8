"""Predicting: options, several models, gradients, errors, and equality with the plain implementation."""

import importlib.util
from pathlib import Path

import pytest
import torch
from ghn import GHN, GHN3, Graph, GraphBatch
from support.elsewhere import elsewhere
from support.hypernetworks import filled, torchvision_model
from torch import nn

_spec = importlib.util.spec_from_file_location("plain", Path(__file__).parents[1] / "benchmarks" / "plain.py")
plain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)

NORMS = {"weight_norm": True, "ve": True, "layernorm": True}
KINDS = {
    "ghn3": lambda: GHN3((16, 16, 11, 11), 10, 32, heads=4, layers=2, **NORMS),
    "ghn2 of GHN-3": lambda: GHN3((16, 16, 11, 11), 10, 32, is_ghn2=True, **NORMS),
    "ghn2": lambda: GHN((16, 16, 11, 11), 10, **NORMS),
    "ghn1": lambda: GHN((16, 16, 11, 11), 10),
    "mlp": lambda: GHN((16, 16, 11, 11), 10, "mlp", **NORMS),
    "mlp decoder": lambda: GHN((16, 16, 11, 11), 10, decoder="mlp", **NORMS),
}


class Net(nn.Module):
    """Kernels of all kinds: larger than the decoder's, depthwise, grouped, of even size; channels that do not divide."""

    expected_input_sz = 32

    def __init__(self, width=20, classes=10, kernel=13):
        super().__init__()
        self.stem = nn.Conv2d(3, width, kernel, padding=kernel // 2)
        self.bn = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False)
        self.wide = nn.Conv2d(width, 40, (1, 7), padding=(0, 3))
        self.even = nn.Conv2d(40, 24, 2, groups=2)
        self.fc1, self.fc = nn.Linear(24, 50), nn.Linear(50, classes)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.wide(x + self.depthwise(x)))
        return self.fc(torch.relu(self.fc1(self.even(x).mean((2, 3)))))


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_of_the_plain_implementation(kind):
    """Every element, in float64, for networks of different sizes in one call."""
    ghn = filled(KINDS[kind]().double())
    models = [Net().double(), Net(32, kernel=3).double(), Net(7).double()]
    graphs = [Graph(model, dialect=ghn.dialect, ve_cutoff=50 if ghn.ve else 1) for model in models]
    with torch.no_grad():
        expected = [weights(model) for model in plain.predict(ghn, models, graphs)]
    for batch in (graphs, GraphBatch(graphs)):
        for model, wanted in zip(ghn(models, batch), expected, strict=True):
            for name, value in weights(model).items():
                torch.testing.assert_close(value, wanted[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_plain_implementation(kind):
    ghn = filled(KINDS[kind]().double())
    models = [Net().double(), Net(32, kernel=3).double()]
    graphs = [Graph(model, dialect=ghn.dialect, ve_cutoff=50 if ghn.ve else 1) for model in models]
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for predict in (lambda: ghn(models, graphs, keep_grads=True), lambda: plain.predict(ghn, models, graphs, True)):
        predict()
        assert not any(isinstance(parameter, nn.Parameter) for parameter in models[0].parameters())
        sum((model(x) ** 2).mean() for model in models).backward()
        found.append({name: p.grad for name, p in ghn.named_parameters()})
        ghn.zero_grad()
    for name, grad in found[0].items():
        other = found[1][name]
        if grad is None or other is None:
            assert (grad is None or not grad.any()) and (other is None or not other.any()), name
        else:
            torch.testing.assert_close(grad, other, rtol=1e-8, atol=1e-10, msg=name)


def test_several_models_are_predicted_as_each_alone():
    ghn = filled(GHN3((16, 16, 11, 11), 1000, 32, heads=4, layers=2, **NORMS))
    alone = [weights(ghn(torchvision_model(arch))) for arch in ("resnet18", "mobilenet_v3_small")]
    models, x = ghn([torchvision_model("resnet18"), torchvision_model("mobilenet_v3_small")], return_embeddings=True)
    assert isinstance(models, list) and len(x) == 53 + 125
    for model, expected in zip(models, alone, strict=True):
        for name, value in weights(model).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-6, msg=name)


def test_two_positional_embeddings_beyond_the_decoder_in_one_call():
    ghn = filled(GHN3((16, 16, 11, 11), 1000, 32, heads=4, layers=1, **NORMS))
    models = [torchvision_model("vit_b_16") for _ in range(2)]
    ghn(models, generator=torch.Generator().manual_seed(0))
    first, second = (model.encoder.pos_embedding[0] for model in models)
    torch.testing.assert_close(first[1:], second[1:], rtol=0, atol=1e-6)
    assert not torch.equal(first[0], second[0]) and first[0].abs().max() < 0.1
    again = torchvision_model("vit_b_16")
    ghn(again, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.encoder.pos_embedding[0, 0], first[0], rtol=0, atol=0)


def test_the_classification_layer_can_be_kept():
    ghn, model = filled(KINDS["ghn3"]()), Net(classes=7)
    before = weights(model)
    with pytest.raises(
        ValueError, match=r"fc\.weight has 7 outputs, .* predicts 10 classes.*predict_class_layers=False"
    ):
        ghn(model)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    ghn(model, predict_class_layers=False)
    kept = [name for name, value in weights(model).items() if torch.equal(value, before[name])]
    assert kept == ["fc.weight", "fc.bias"]


def test_batch_norm_can_run_on_batch_statistics():
    model = Net().eval()
    filled(KINDS["ghn3"]())(model)
    assert model.bn.track_running_stats and not model.bn.training
    filled(KINDS["ghn3"]())(model, bn_track_running_stats=False)
    x = 5 + 3 * torch.randn(8, 3, 32, 32)
    out = model.bn(model.stem(x))
    torch.testing.assert_close(out.std((0, 2, 3)), model.bn.weight, rtol=1e-2, atol=1e-2)
    assert int(model.bn.num_batches_tracked) == 0
    older = Net().eval()
    filled(KINDS["ghn2"]())(older)  # the default of the older code
    assert older.bn.training


def test_unpredicted_layers_are_removed_only_if_asked():
    class WithGroupNorm(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(2, 20)

        def forward(self, x):
            x = torch.relu(self.norm(self.stem(x)))
            return self.fc(torch.relu(self.fc1(self.even(self.wide(x)).mean((2, 3)))))

    ghn, model = filled(KINDS["ghn3"]()), WithGroupNorm()
    ghn(model)
    assert model.norm.weight is not None and model.bn.weight is not None
    ghn(model, reduce_graph=True)
    assert model.norm.weight is None and model.norm.bias is None and model.stem.weight is not None


def test_a_prediction_with_gradients_can_be_followed_by_one_without():
    ghn, model = filled(KINDS["ghn3"]()), Net()
    ghn(model, keep_grads=True)
    with_gradients = weights(model)
    assert model.stem.weight.grad_fn is not None
    ghn(model)
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
    for name, value in weights(model).items():
        torch.testing.assert_close(value, with_gradients[name], rtol=0, atol=1e-6, msg=name)


def test_light_networks_get_tensors():
    """They hold shapes where others have parameters."""
    ghn, model = filled(KINDS["ghn3"]()), Net()
    graph, expected = Graph(model), weights(ghn(Net()))
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                del module._parameters[name]
                setattr(module, name, list(value.shape))
    stored = Graph(node_feat=graph.node_feat, node_info=graph.node_info, edges=graph.edges)
    ghn(model, stored, keep_grads=True)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=0, atol=1e-6, msg=name)


def test_targets_of_other_dtypes_and_low_precision():
    ghn = filled(KINDS["ghn3"]())
    expected = weights(ghn(Net()))
    half = ghn(Net().bfloat16())
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
    for name, value in weights(half).items():
        torch.testing.assert_close(value.float(), expected[name], rtol=1e-2, atol=1e-3, msg=name)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = weights(ghn(Net()))
    low = weights(ghn.bfloat16()(Net()))
    for found in (mixed, low):
        for name, value in found.items():
            assert value.dtype == torch.float32
            assert (value - expected[name]).norm() <= 0.02 * expected[name].norm(), name


def test_channels_last_targets_are_written_in_place():
    ghn = filled(KINDS["ghn3"]())
    expected, model = weights(ghn(Net())), Net().to(memory_format=torch.channels_last)
    ghn(model)
    for name, value in weights(model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=name)


def test_other_layers_are_predicted_if_asked():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.norm = nn.Conv1d(4, 12, 5), nn.GroupNorm(3, 12)
            self.lstm = nn.LSTM(12, 6, batch_first=True)
            self.token = nn.Parameter(torch.randn(1, 1, 6))
            self.head = nn.Linear(6, 10)

        def forward(self, x):
            x = self.norm(self.conv1(x)).transpose(1, 2)
            return self.head((self.lstm(x)[0] + self.token).mean(1))

    ghn, model = filled(KINDS["ghn3"]()), Other()
    before = weights(model)
    ghn(model, example_inputs=torch.randn(2, 4, 16))
    kept = {name for name, value in weights(model).items() if torch.equal(value, before[name])}
    assert {"conv1.weight", "norm.weight", "lstm.weight_ih_l0", "token"} <= kept
    ghn(model, example_inputs=torch.randn(2, 4, 16), extended=True)
    after = weights(model)
    assert not [name for name, value in after.items() if torch.equal(value, before[name])]
    assert all(value.isfinite().all() for value in after.values())
    assert (after["norm.weight"] > 0).all() and after["token"].abs().max() <= 1


def test_deep_decoders_of_low_rank():
    """Parameters grow with the square of the width, and the matrices have the rank."""

    def count(hid, rank):
        with torch.device("meta"):
            ghn = GHN3((hid, hid, 11, 11), 10, hid, heads=4, layers=1, rank=rank, **NORMS)
        return sum(p.numel() for p in ghn.decoder.conv.parameters())

    assert count(128, 0) > 7 * count(64, 0) and count(128, 4) < 4.1 * count(64, 4)
    ghn, model = filled(GHN3((16, 16, 11, 11), 10, 32, heads=4, layers=1, rank=3, **NORMS)), Net(16)
    ghn(model)
    assert torch.linalg.matrix_rank(model.even.weight[:16, :16, 0, 0], atol=1e-4) <= 4  # 3, and the bias
    ghn(model, keep_grads=True)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert ghn.decoder.conv[2].weight.grad.any()


def test_graphs_and_models_must_fit_together():
    ghn, graph = filled(KINDS["ghn3"]()), Graph(Net())
    with pytest.raises(ValueError, match="2 graphs for 1 models: give one for each"):
        ghn([Net()], [graph, graph])
    with pytest.raises(ValueError, match=r"the graph has a node for '.*', which the model has not: give the graph of"):
        ghn(nn.Linear(3, 10), graph)
    with torch.device("meta"):
        meta = Net()
    with pytest.raises(ValueError, match=r"stem\.weight is on the meta device, .*: use predict_to"):
        ghn(meta)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_shape": (16, 16, 11)}, r"max_shape must be four positive numbers .*got \(16, 16, 11\)"),
        ({"hypernet": "rnn"}, "hypernet must be gatedgnn, mlp or graphormer, got 'rnn'"),
        ({"decoder": "rnn"}, "decoder must be conv or mlp, got 'rnn'"),
        ({"hypernet": "graphormer", "heads": 3}, r"hid \(32\) must be a multiple of heads \(3\)"),
    ],
)
def test_wrong_settings_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        GHN(**{"max_shape": (16, 16, 11, 11), "num_classes": 10, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_on_the_cpu_when_hypernetwork_or_model_are_elsewhere(kind):
    expected = weights(filled(KINDS[kind]())(Net()))
    with elsewhere() as device:
        ghn = filled(KINDS[kind]()).to(device)
        for model in (Net(), Net().to(device)):
            found = weights(ghn(model))
            for name, value in found.items():
                torch.testing.assert_close(value.cpu(), expected[name], msg=name)
        ghn(Net().to(device), keep_grads=True)(torch.randn(2, 3, 32, 32, device=device)).sum().backward()
        assert all(p.grad is None or p.grad.device == device for p in ghn.parameters())


@pytest.mark.gpu
def test_predictions_on_a_gpu_are_those_on_the_cpu():
    for make in KINDS.values():
        ghn = filled(make())
        expected = weights(ghn(Net()))
        ghn.cuda()
        for model in (Net(), Net().cuda()):
            for name, value in weights(ghn(model)).items():
                torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-3, atol=1e-3, msg=name)
        ghn(Net().cuda(), keep_grads=True)(torch.randn(2, 3, 32, 32, device="cuda")).sum().backward()
        assert ghn.embed.weight.grad.isfinite().all()
