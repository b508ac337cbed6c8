"""Groups of traced networks: which there are, that they are all, and what is said of the rest."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from zoo_common.symmetry import Symmetry
from zoo_common.tracing import trace


class Net(nn.Module):
    """Layers and a function that uses them, for short examples."""

    def __init__(self, function, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class Block(nn.Module):
    """Attention by hand: one linear layer for queries, keys and values, as in many transformers."""

    def __init__(self, width, heads, fused):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, length, width = x.shape
        parts = self.qkv(self.norm(x)).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)).softmax(dim=-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(n, length, width))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width, squeezed):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.b(torch.relu(self.a(x)))))))


class Positions(nn.Module):
    """Parameters that are used as values: a token, positions, a scale per channel."""

    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 6)), nn.Parameter(torch.zeros(1, 4, 6))
        self.scale, self.a, self.b = nn.Parameter(torch.ones(6)), nn.Linear(5, 6), nn.Linear(6, 2)
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True)

    def forward(self, x):
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), self.a(x)], dim=1) + self.position
        return self.b((h + self.scale * self.attention(h, h, h, need_weights=False)[0])[:, 0])


def halves(net, x):
    left, right = net.a(x).chunk(2, 1)
    return net.b(left * right)


def conv(*sizes, **options):
    return nn.Conv2d(*sizes, 3, padding=1, **options)


# name: (network, input shape, sizes of its permutation groups, sizes of its scale groups)
EXAMPLES = {
    "norm": (
        lambda: nn.Sequential(conv(2, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 3), nn.Flatten(), nn.Linear(48, 2)),
        (2, 4, 4),
        [4, 3],
        [4, 3],
    ),
    "group norm": (
        lambda: nn.Sequential(conv(2, 6), nn.GroupNorm(3, 6), nn.ReLU(), conv(6, 2), nn.Flatten()),
        (2, 4, 4),
        [3],
        [6],
    ),
    "residual": (
        lambda: Net(
            lambda n, x: n.c(torch.relu(n.a(x) + n.b(torch.relu(n.a(x))))),
            a=nn.Linear(3, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 2),
        ),
        (3,),
        [5],
        [5],
    ),
    "dense": (
        lambda: Net(
            lambda n, x: n.c(torch.relu(torch.cat([n.a(x), n.b(torch.relu(n.a(x)))], 1)).flatten(1)),
            a=conv(2, 4), b=conv(4, 3), c=nn.Linear(7 * 16, 2),
        ),
        (2, 4, 4),
        [4, 3],
        [4, 3],
    ),
    "depthwise": (
        lambda: nn.Sequential(conv(2, 4), nn.ReLU(), conv(4, 8, groups=4), nn.ReLU(), conv(8, 2), nn.Flatten()),
        (2, 4, 4),
        [4],
        [4, 8],
    ),
    "grouped": (
        lambda: nn.Sequential(conv(2, 6), nn.ReLU(), conv(6, 9, groups=3), nn.ReLU(), conv(9, 2), nn.Flatten()),
        (2, 4, 4),
        [3],
        [9],
    ),
    "grouped on the input": (lambda: nn.Sequential(conv(2, 6, groups=2), conv(6, 2), nn.Flatten()), (2, 4, 4), [], [6]),
    "squeeze-excite": (
        lambda: nn.Sequential(conv(2, 4), Gate(4, 3), conv(4, 2), nn.Flatten()),
        (2, 4, 4),
        [4, 3],
        [4, 3],
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2), nn.Flatten()),
        (2, 3, 3),
        [4],
        [4],
    ),
    "shared": (Shared, (4,), [5], [5]),
    "halves": (lambda: Net(halves, a=nn.Linear(4, 6), b=nn.Linear(3, 2)), (4,), [3], []),
    "tokens": (Positions, (3, 5), [6, 3], []),
    "attention": (lambda: nn.Sequential(nn.Linear(3, 6), Block(6, 2, fused=False), nn.Linear(6, 2)), (4, 3), [6, 2], [6]),
    "fused attention": (
        lambda: nn.Sequential(nn.Linear(3, 6), Block(6, 2, fused=True), nn.Linear(6, 2)),
        (4, 3),
        [6, 2],
        [6],
    ),
    "one head": (
        lambda: nn.Sequential(nn.Linear(3, 6), Block(6, 1, fused=True), nn.Linear(6, 2)),
        (4, 3),
        [6, 6, 6],
        [6],
    ),
    "pixel shuffle": (
        lambda: nn.Sequential(conv(2, 12), nn.PixelShuffle(2), nn.ReLU(), conv(3, 2), nn.Flatten()),
        (2, 4, 4),
        [3],
        [3],
    ),
    "channels first": (lambda: nn.Sequential(conv(2, 5), nn.Flatten(2), nn.Linear(16, 3), nn.Flatten(), nn.Linear(15, 2)), (2, 4, 4), [5], []),
    "flip": (
        lambda: Net(lambda n, x: n.b(n.a(x) + n.a(x).flip(1)), a=nn.Linear(4, 6), b=nn.Linear(6, 2)),
        (4,),
        [3],
        [3],
    ),
    "unknown": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Softmin(1), nn.Linear(6, 5), nn.Linear(5, 2)), (4,), [5], [5]),
    "padded": (
        lambda: Net(lambda n, x: n.b(F.pad(n.a(x), (1, 1, 1, 1), value=2.0)).flatten(1), a=conv(2, 3), b=conv(3, 2)),
        (2, 4, 4),
        [3],
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_groups_of_an_example(name):
    """``from_module`` proves each claim; here, that the claims are those that can be made."""
    make, shape, permuted, scaled = EXAMPLES[name]
    torch.manual_seed(0)
    symmetry = Symmetry.from_module(make(), torch.zeros(2, *shape))
    assert [group.size for group in symmetry.groups] == permuted
    assert [group.size for group in symmetry.scales if len(group.entries) > 1] == scaled


# network: (permutation groups, scale groups)
PUBLISHED = {
    "resnet18": (12, 12),
    "resnet50": (37, 37),
    "squeezenet1_1": (25, 25),
    "mobilenet_v2": (25, 7),
    "mobilenet_v3_small": (27, 19),
    "shufflenet_v2_x0_5": (80, 105),
}
SLOW = {
    "vgg11_bn": (10, 10),
    "resnet34": (20, 20),
    "resnet101": (71, 71),
    "resnet152": (105, 105),
    "resnext50_32x4d": (21, 21),
    "densenet121": (120, 120),
    "efficientnet_b0": (40, 7),
    "convnext_tiny": (22, 22),
    "vit_b_16": (25, 25),
}
CASES = [*PUBLISHED.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW.items())]


@pytest.mark.parametrize(("name", "counts"), CASES)
def test_networks_of_torchvision(name, counts):
    """Proven as a whole; and a proof with power: one tensor left behind is noticed."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(**({"image_size": 32} if name.startswith("vit") else {}))
    symmetry = Symmetry.from_module(net, torch.zeros(2, 3, 32, 32))
    assert (len(symmetry.groups), len(symmetry.scales)) == counts
    assert len(symmetry.fixed) == 1 and "outputs" in next(iter(symmetry.fixed.values()))
    moved = {entry.tensor for group in symmetry.groups for entry in group.entries}
    assert moved >= {name for name in symmetry.layout.names if not name.endswith("bias")} - set(symmetry.fixed)


def test_the_proof_notices_a_group_that_lacks_a_tensor(monkeypatch):
    import zoo_common.symmetry as module

    def forgetful(net, examples, *, scaling=False):
        found = trace(net, examples, scaling=scaling)
        if scaling:
            return found
        group = found.groups[3]
        assert len(group.entries) == 6
        object.__setattr__(group, "entries", group.entries[:-1])
        return found

    monkeypatch.setattr(module, "trace", forgetful)
    with pytest.raises(ValueError, match=r"module 'layer2\.0\.conv1': permuting its units changes the output"):
        Symmetry.from_module(torchvision.models.resnet18(), torch.zeros(2, 3, 32, 32))


class Branching(nn.Linear):
    def forward(self, x):
        if x.sum() > 0:  # the line that is named
            return x
        return -x


def test_a_network_that_cannot_be_traced_is_named_with_the_line():
    with pytest.raises(
        ValueError, match=r"cannot trace Sequential: .*control flow.*test_tracing\.py: if x\.sum\(\) > 0"
    ):
        Symmetry.from_module(nn.Sequential(nn.Linear(3, 4), Branching(4, 4)), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"cannot trace Sequential: .*\[2, 5\] X \[3, 4\]"):
        Symmetry.from_module(nn.Sequential(nn.Linear(3, 4)), torch.zeros(2, 5))


def test_what_must_keep_its_place_is_named_with_the_reason():
    net = nn.Sequential(nn.Linear(4, 6), nn.Softmin(1), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    fixed = Symmetry.from_module(net, torch.zeros(2, 4)).fixed
    assert fixed == {
        "0": "module '1' (Softmin) has no known symmetry",
        "4": "its units are outputs of the network",
    }
    net = Net(lambda n, x: n.b(torch.cumsum(n.a(x), 1)), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    reason = Symmetry.from_module(net, torch.zeros(2, 4)).fixed["a"]
    assert "'cumsum'" in reason and "test_tracing.py: net = Net(lambda" in reason


def test_tied_weights_are_one_tensor():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            h = self.embed(ids)
            return self.head(h + torch.relu(self.mix(h)))

    symmetry = Symmetry.from_module(Tied(), torch.randint(7, (2, 5)))
    (group,) = symmetry.groups
    assert {(e.tensor, e.axis) for e in group.entries} == {
        ("embed.weight", 1),
        ("mix.weight", 0),
        ("mix.weight", 1),
        ("mix.bias", 0),
    }


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 4)
            self.c, self.d = nn.Linear(4, 2), nn.Linear(4, 1)

        def forward(self, x, y, scale=2.0):
            h = torch.relu(self.a(x) + scale * self.b(y))
            return {"class": self.c(h), "value": [self.d(h)]}

    symmetry = Symmetry.from_module(Two(), [torch.zeros(2, 3), torch.zeros(2, 5)])
    assert [group.size for group in symmetry.groups] == [4]
    assert sorted(symmetry.fixed) == ["c", "d"]


def test_tracing_changes_neither_the_network_nor_the_mode():
    net = torchvision.models.resnet18()
    before = [tensor.clone() for tensor in net.state_dict().values()]
    Symmetry.from_module(net, torch.zeros(2, 3, 32, 32))
    assert net.training
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))


def test_units_beside_fixed_positions():
    """One half of an axis is the input, which keeps its place; the other half may be permuted."""
    net = Net(lambda n, x: n.b(torch.cat([torch.relu(n.a(x)), x], 1)), a=nn.Linear(4, 6), b=nn.Linear(10, 2))
    symmetry = Symmetry.from_module(net, torch.zeros(2, 4))
    assert [entry.block for entry in symmetry.groups[0].entries] == [1, 1, None]
    assert [group.size for group in symmetry.scales] == [6]


def test_weights_that_are_also_values_keep_their_places():
    """Once as the weight of a layer, once as a number added to another's units."""
    net = Net(lambda n, x: n.b(n.a(x) + n.a.weight.sum(1)), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    symmetry = Symmetry.from_module(net, torch.zeros(2, 4))
    assert not symmetry.groups
    assert symmetry.fixed["a"] == "its weights are used by a layer and as a value"
