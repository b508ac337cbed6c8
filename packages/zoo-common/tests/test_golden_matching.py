"""Weight matching finds the published permutations; traced groups are the published ones where those are right."""

import re
import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from sane.networks import build_network, input_shape
from support.golden import assert_close, assert_stats, fill
from torch import nn
from zoo_common.symmetry import Symmetry
from zoo_common.tracing import trace

ZOO_NETWORKS = {"zoo_cnn_large": "CNN3", "resnet18": "Resnet18", "resnet34": "Resnet34", "MiniAlexNet": "MiniAlexNet"}


def symmetry_of(name, sizes=(), shapes=None):
    """Network of a published specification, and its symmetry.

    Args:
        name: The specification's, with its options.
        sizes: Units of every permutation, for networks that come in several sizes.
        shapes: Those of tensors, as far as they are known.
    """
    kind, shapes = re.match(r"\w+", name)[0], shapes or {}
    if kind == "mlp":
        hidden = list(sizes) or [10 + i for i in range(int(re.search(r"\d+", name)[0]))]
        units = [shapes.get("layer0.weight", (0, 6))[1], *hidden, shapes.get(f"layer{len(hidden)}.bias", (4,))[0]]
        net, shape = mlp(units), (units[0],)
    else:
        config = {"model::type": ZOO_NETWORKS.get(kind), "model::o_dim": 10}
        if kind == "zoo_cnn":
            config["model::type"] = "CNN2" if list(sizes[:3]) == [6, 9, 6] else "CNN"
        first = next(iter(shapes.values()), (0, input_shape(config)[0]))
        config["model::channels_in"] = first[1]
        net, shape = build_network(config).eval(), input_shape(config)
        shape = (shape[0], 16, 16) if kind.startswith("resnet") else shape
    return net, Symmetry.from_module(net, torch.zeros(2, *shape))


def mlp(sizes):
    layers = nn.Sequential()
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers.add_module(f"layer{i}", nn.Linear(a, b))
        layers.add_module(f"relu{i}", nn.ReLU())
    return layers


def weights(net, layout, tag):
    values = {name: fill(tag + name, tuple(tensor.shape), 0.1) for name, tensor in net.state_dict().items()}
    return layout.flatten({
        name: value.abs() + 0.5 if name.endswith("running_var") else value
        for name, value in values.items()
        if name in layout.slices
    })  # fmt: skip


def shapes_in(golden):
    """Shapes that the file tells about the networks of a case: those of all cases with its tag."""
    same = [case for case in golden.document["cases"] if case["tag"] == golden.case["tag"]]
    return {name: stats["shape"] for case in same for name, stats in case.get("aligned_B", {}).items()}


def inner_product(symmetry, vector, found, reference):
    (aligned,) = symmetry.apply(vector[None], found)
    return aligned.double() @ reference.double()


@pytest.mark.golden("rebasin.json", cases="cases")
def test_matching_finds_the_published_permutations(golden):
    case, tag, kind = golden.case, golden.case["tag"], golden.case["case"].split()[0]
    assert kind in ("planted", "independent"), f"unknown case {kind!r}"
    planted = kind == "planted"
    sizes = case["perm_sizes"] if planted else {name: len(found) for name, found in case["found"].items()}
    net, symmetry = symmetry_of(case["name"], list(sizes.values()), shapes_in(golden))
    sizes = {name: size for name, size in sizes.items() if size > 1}  # a single unit has nothing to change places with
    assert [group.size for group in symmetry.groups] == list(sizes.values())
    layout, generator = symmetry.layout, None
    reference = weights(net, layout, f"{tag}A/")
    if planted:
        applied = [
            np.random.RandomState(zlib.crc32(f"{tag}perm/{name}".encode())).permutation(size)
            for name, size in sizes.items()
        ]
        (vector,) = symmetry.apply(reference[None], [torch.from_numpy(p)[None] for p in applied])
        noise = [fill(f"{tag}noise/{spec.name}", spec.shape, case["noise_scale"]).flatten() for spec in layout.tensors]
        vector = vector + torch.cat(noise)
        generator = torch.Generator().manual_seed(0)  # the published random order of groups
    else:
        vector = weights(net, layout, f"{tag}B/")
    found = symmetry.match(vector[None], reference, generator=generator)
    (aligned,) = symmetry.apply(vector[None], found)

    stored = case["found_first12" if planted else "found"]
    for name, permutation in zip(sizes, found, strict=True):
        assert permutation[0, : len(stored[name])].tolist() == stored[name], name
    for when, value in (("before", vector), ("after", aligned)):
        assert_close((value.double() - reference.double()).norm(), case[f"distance_{when}"], what=f"distance {when}")
        assert_close(value.double() @ reference.double(), case[f"inner_product_{when}"], what=f"product {when}")
    if planted:
        for name, f, p in zip(sizes, found, applied, strict=True):
            right = torch.equal(f[0], torch.from_numpy(p).argsort())
            assert right == case["found_equals_argsort_of_planted"][name], name
        assert case["aligned_B"]
        state = {**net.state_dict(), **layout.unflatten(aligned)}
        for name, stats in case["aligned_B"].items():
            assert_stats(state[name], stats, "float32", name)
    elif "inner_product_after_over_8_random_orders" in case:
        orders = [torch.Generator().manual_seed(seed) for seed in range(8)]
        matched = [symmetry.match(vector[None], reference, generator=order) for order in orders]
        products = torch.stack([inner_product(symmetry, vector, found, reference) for found in matched])
        for name, value in case["inner_product_after_over_8_random_orders"].items():
            assert_close(getattr(products, name)(), value, what=f"{name} over random orders")


def places(symmetry):
    return [{(entry.tensor, entry.axis) for entry in group.entries} for group in symmetry.groups]


def stated_places(case, layout):
    found = {}
    for tensor, axes in case["axes_to_perm"].items():
        for axis, permutation in enumerate(axes):
            if permutation is not None and tensor in layout.slices:
                found.setdefault(permutation, set()).add((tensor, axis))
    assert list(found) == case["perms"]
    return list(found.values())


@pytest.mark.golden("permutation_specs.json", cases="specs")
def test_traced_groups_are_the_published_ones(golden):
    name, case = golden.name, golden.case
    if "axes_to_perm" not in case:
        check_count(re.match(r"\w+", name)[0], case)
        return
    net, symmetry = symmetry_of(name)
    found, left_out = places(symmetry), set(net.state_dict()) - case["axes_to_perm"].keys()
    norms = {name for name in net.state_dict() if "bn" in name or "downsample.1" in name}
    assert left_out == (norms if "batchnorm=False" in name else set())
    found = [{(tensor, axis) for tensor, axis in group if tensor not in left_out} for group in found]
    if "match_last=False" in name:  # leaves the classifier out, which breaks the function
        found = [group - {("fc.weight", 1)} for group in found]
    assert found == stated_places(case, symmetry.layout)


class WideBlock(nn.Module):
    """Of wide_resnet: norms before convolutions."""

    def __init__(self, a, b, first):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(a), nn.Conv2d(a, b, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(b), nn.Conv2d(b, b, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(a, b, 1, bias=False) if first else None

    def forward(self, x):
        h = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(h)))) + (x if self.convShortcut is None else self.convShortcut(h))


class SmallBlock(nn.Module):
    """Of resnet20: a projection in the first stage too."""

    def __init__(self, a, b, first):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)
        self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b)) if first else nn.Identity()

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Stages(nn.Module):
    """Stem, three stages, norm and classifier under the published names."""

    def __init__(self, wide):
        super().__init__()
        self.conv1, self.bn1, self.wide = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(11 if wide else 4), wide
        block, count = (WideBlock, 6) if wide else (SmallBlock, 3)
        for k, (a, b) in enumerate(pairwise((4, 5, 7, 11)), 1):
            layers = nn.Sequential(*(block(b if i else a, b, not i) for i in range(count)))
            self.add_module(f"block{k}" if wide else f"layer{k}", nn.ModuleDict({"layer": layers}) if wide else layers)
        self.add_module("fc" if wide else "linear", nn.Linear(11, 10))

    def forward(self, x):
        x = self.conv1(x) if self.wide else F.relu(self.bn1(self.conv1(x)))
        for k in (1, 2, 3):
            x = getattr(self, f"block{k}")["layer"](x) if self.wide else getattr(self, f"layer{k}")(x)
        x = F.relu(self.bn1(x)) if self.wide else x
        return (self.fc if self.wide else self.linear)(x.mean((2, 3)))


def check_count(name, case):
    """What the file tells about a network without a table: how many tensors it has, and the permutations' names.

    Three of the published specifications do not keep the function (SANE spec, D24): resnet50 gives the output of stage 1
    the name True, vgg16 permutes the classes, mobilenet takes depthwise convolutions for dense ones.
    """
    models = torchvision.models
    makers = {"vgg16": models.vgg16_bn, "mobilenet": models.mobilenet_v2}
    makers |= {"resnet20": lambda: Stages(wide=False), "wide_resnet": lambda: Stages(wide=True)}
    with torch.device("meta"):
        net = makers[name]() if name in makers else getattr(models, name)()
    names, perms = dict(net.named_modules()), case["perms"]
    count = len(net.state_dict()) if name != "resnet20" else len(list(net.parameters()))  # no running statistics
    groups = trace(net, [torch.zeros(2, 3, 32, 32)]).groups
    if name == "vgg16":  # one dense layer, not three
        assert case["n_parameters"] == count - 4
        convolutions = [name for name, part in net.features.named_children() if isinstance(part, nn.Conv2d)]
        assert perms == [*(f"P_Conv_{place}" for place in convolutions), "P_Dense_0"]
        assert len(groups) == len(convolutions) + 2
        return
    assert case["n_parameters"] == count
    outer = [perm for perm in perms if "inner" not in str(perm)]
    assert [perm for perm in outer if perm is not True] == [f"P_bg{k}" for k in range(len(outer) - (True in outer))]
    inner = [re.fullmatch(r"P_(.+)_inner\d?", perm)[1] for perm in perms if perm not in outer]
    assert all(place in names for place in inner)
    if name == "mobilenet":
        assert len(groups) != len(perms)
    else:
        assert len(groups) == len(perms) == len(set(perms))
