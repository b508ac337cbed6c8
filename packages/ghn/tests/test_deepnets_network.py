import hashlib

import pytest
import torch
from ghn.deepnets.genotypes import Genotype
from ghn.deepnets.network import Network
from support.golden import assert_close, fill
from torch import nn


def golden_network(args, keys="ghn2"):
    return Network(**{**args, "genotype": Genotype.from_json(args["genotype"])}, keys=keys)


def fill_network(net):
    """Set the golden weights: a recipe per name, ones added where a norm scales."""
    norms = {f"{path}.weight" for path, m in net.named_modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)}
    for name, p in net.named_parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        p.data = fill(name, p.shape, scale) + (name in norms)
    return net.double().eval()


@pytest.mark.golden("deepnets_networks.json", cases="cases")
def test_networks_are_the_published_ones(golden):
    args = golden.case["args"]
    for keys, expected in (("ghn2", golden.case["ghn2_network"]), ("ghn3", golden.case["ghn3_network"])):
        if not isinstance(expected, dict):
            continue
        net = golden_network(args, keys)
        named = [f"{name}:{'x'.join(map(str, p.shape))}" for name, p in net.named_parameters()]
        assert len(named) == expected["n_tensors"]
        assert named == expected.get("params", named)
        assert hashlib.sha256("\n".join(named).encode()).hexdigest() == expected["params_sha256"]
        shapes = []
        for cell in net.cells:
            cell.register_forward_hook(lambda module, inputs, output, out=shapes: out.append(output))
        image = args.get("is_imagenet_input", True)
        x = fill("input", (2, 3, 224, 224) if image else (4, 3, 32, 32)).double()
        with torch.no_grad():
            logits, _ = fill_network(net)(x)
        for output, (shape, mean, std) in zip(shapes, expected["cells_float64"], strict=True):
            assert list(output.shape) == shape
            assert_close(output.mean(), mean, "float32")
            assert_close(output.std(), std, "float32")
        assert_close(logits[:, :10], expected["logits_float64"], "float32")
