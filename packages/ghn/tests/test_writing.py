"""Predictions that go to disk part by part, and BatchNorm layers of predicted networks."""

import json
import subprocess
import sys

import pytest
import torch
from ghn import GHN3, condition_bn, evaluate, predict_to, use_batch_statistics
from safetensors.torch import load_file
from support.hypernetworks import filled, torchvision_model
from torch import nn

NORMS = {"weight_norm": True, "ve": True, "layernorm": True}


@pytest.fixture(scope="module")
def ghn():
    return filled(GHN3((16, 16, 11, 11), 1000, 32, heads=4, layers=2, **NORMS))


def on_meta(arch):
    with torch.device("meta"):
        return torchvision_model(arch)


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_files_hold_what_is_predicted_in_memory(ghn, arch, tmp_path):
    expected = ghn(torchvision_model(arch)).state_dict()
    written = predict_to(ghn, on_meta(arch), tmp_path / "one.safetensors")
    parts = predict_to(ghn, on_meta(arch), tmp_path / "parts", shard_bytes=2**20)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert (written.files, written.kept) == (1, ()) and parts.files == len(set(index["weight_map"].values())) > 1
    found = load_file(tmp_path / "one.safetensors")
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6, msg=name)
    for file in set(index["weight_map"].values()):
        for name, value in load_file(tmp_path / "parts" / file).items():
            assert index["weight_map"][name] == file
            torch.testing.assert_close(value, found[name], rtol=0, atol=2e-6, msg=name)


def test_what_is_not_predicted_comes_from_the_model_or_is_asked_for(ghn, tmp_path):
    model, path = torchvision_model("vit_b_32"), tmp_path / "vit.safetensors"
    assert predict_to(ghn, model, path).kept == ("class_token",)
    assert torch.equal(load_file(path)["class_token"], model.class_token)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"class_token are not predicted .*: pass initial=\{name: tensor\}"):
        predict_to(ghn, on_meta("vit_b_32"), path)
    assert path.read_bytes() == before
    token = torch.randn(1, 1, 768)
    predict_to(ghn, on_meta("vit_b_32"), path, initial={"class_token": token})
    assert torch.equal(load_file(path)["class_token"], token)
    with pytest.raises(ValueError, match=r"initial\['class_token'\]: expected \(1, 1, 768\), got \(3,\)"):
        predict_to(ghn, on_meta("vit_b_32"), path, initial={"class_token": torch.ones(3)})


def test_tied_parameters_and_other_dtypes(ghn, tmp_path):
    class Tied(nn.Module):
        expected_input_sz = 16

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 20, 16)
            self.a = self.b = nn.Linear(20, 20, bias=False)
            self.fc = nn.Linear(20, 1000)

        def forward(self, x):
            return self.fc(self.b(torch.relu(self.a(self.conv(x).flatten(1)))))

    predict_to(ghn, Tied().half(), tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["a.weight"], found["b.weight"]) and found["a.weight"].dtype == torch.float16


MEASURED = """
import resource, sys, tempfile, pathlib, torch, torchvision
from ghn import Graph, GHN3, predict_to
from torch import nn

class Big(nn.Module):
    expected_input_sz = 32
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4096, 16, 16)
        self.wide = nn.ModuleList(nn.Linear(4096, 16384) for _ in range(8))
        self.back = nn.ModuleList(nn.Linear(16384, 4096) for _ in range(7))
        self.fc = nn.Linear(16384, 1000)
    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        for i, wide in enumerate(self.wide):
            x = torch.relu(wide(x))
            x = self.back[i](x) if i < 7 else x
        return self.fc(x)

with torch.device("meta"):
    model = Big()
ghn = GHN3((64, 64, 16, 16), 1000, 64, weight_norm=True, ve=True, layernorm=True).eval()
size = 4 * sum(p.numel() for p in ghn.parameters())
graph = Graph(model)
folder = pathlib.Path(sys.argv[1])
written = predict_to(ghn, model, folder, graph=graph, shard_bytes=2**30)
print(written.parameters, written.files, size, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_target_of_a_billion_parameters_needs_little_memory(tmp_path):
    def measured(code, *arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    (base,) = measured(
        "import resource, torch, torchvision; print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    parameters, files, size, peak = map(int, measured(MEASURED, tmp_path))
    assert parameters > 1e9 and files >= 4
    assert peak - int(base) < 1.5 * size + 200e6, (peak - int(base)) / 1e6


def bn_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 3))


def batches(count, size=16):
    random = torch.Generator().manual_seed(1)
    return [
        (3 + 2 * torch.randn(size, 3, 8, 8, generator=random), torch.randint(3, (size,), generator=random))
        for _ in range(count)
    ]


def test_conditioned_layers_have_the_statistics_of_the_data():
    model, data = bn_net().eval(), batches(5)
    use_batch_statistics(model)
    condition_bn(model, data)
    features = model[0](torch.cat([images for images, _ in data]))
    torch.testing.assert_close(model[1].running_mean, features.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, features.var((0, 2, 3)), rtol=1e-2, atol=0)
    assert model[1].track_running_stats and not any(module.training for module in model.modules())
    assert model[1].momentum == 0.1
    condition_bn(model.train(), [images for images, _ in data], batches=2)
    assert int(model[1].num_batches_tracked) == 2 and all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="the loader gives no batch"):
        condition_bn(model, [])


def test_accuracy_with_running_and_with_batch_statistics():
    model, data = bn_net().train(), batches(3)
    for batch_statistics in (False, True):
        right = 0
        for images, labels in data:
            model.train(batch_statistics)
            model[1].track_running_stats = not batch_statistics
            right += (model(images).argmax(1) == labels).sum().item()
        model[1].track_running_stats = True
        found = evaluate(model.train(), data, batch_statistics=batch_statistics)
        assert (found.top1, found.top5, found.count) == (pytest.approx(right / 48), 1.0, 48)
        assert model[1].training and model[1].track_running_stats and int(model[1].num_batches_tracked) == 0
    with pytest.raises(ValueError, match="gives no images"):
        evaluate(model, [])
