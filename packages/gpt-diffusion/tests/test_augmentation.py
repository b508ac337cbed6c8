import pytest
import torch
import torch.nn.functional as F
from gpt_diffusion.augmentation import permutation_index, permute_module, random_permute_flat
from support.golden import assert_close, assert_stats, fill
from torch import nn


class MnistMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(784, 10), nn.Linear(10, 10)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Cifar10Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean(dim=(2, 3)))


class CartpoleActor(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(1))
        self.actor = nn.Sequential(nn.Linear(4, 32), nn.SELU(), nn.Linear(32, 32), nn.SELU(), nn.Linear(32, 1))

    def forward(self, x):
        return self.actor(x)


def mnist_rule(net, draw, permute_in, permute_out, permute_in_out, register):
    p = draw(10)
    permute_out((net.fc1.weight, net.fc1.bias), p)
    permute_in(net.fc2.weight, p)
    register(net.fc2.bias)


def cifar10_rule(net, draw, permute_in, permute_out, permute_in_out, register):
    p, q = draw(16), draw(32)
    permute_out(net.conv1.weight, p)
    permute_in_out(net.conv2.weight, p, q)
    permute_in(net.fc.weight, q)
    register(net.fc.bias)


def cartpole_rule(net, draw, permute_in, permute_out, permute_in_out, register):
    p, q = draw(32), draw(32)
    register(net.log_std)
    permute_out((net.actor[0].weight, net.actor[0].bias), p)
    permute_in_out(net.actor[2].weight, p, q)
    permute_out(net.actor[2].bias, q)
    permute_in(net.actor[4].weight, q)
    register(net.actor[4].bias)


TASKS = {
    "mnist": (MnistMlp, mnist_rule, "mnist_x", (1, 28, 28)),
    "cifar10": (Cifar10Cnn, cifar10_rule, "cifar_x", (3, 32, 32)),
    "cartpole": (CartpoleActor, cartpole_rule, "cart_obs", (4,)),
}


def drawn(rule):
    """The rule as an aug_fn that draws its permutations from the generator, one call per hidden layer."""
    return lambda net, generator, *callbacks: rule(net, lambda n: torch.randperm(n, generator=generator), *callbacks)


def given(rule, permutations):
    """The rule as an aug_fn with stored permutations."""
    rest = [torch.tensor(p) for p in permutations]

    def draw(n):
        assert len(rest[0]) == n
        return rest.pop(0)

    return lambda net, generator, *callbacks: rule(net, draw, *callbacks)


def filled(name):
    net = TASKS[name][0]()
    with torch.no_grad():
        for key, tensor in net.state_dict().items():
            tensor.copy_(fill(f"{name}/{key}", tensor.shape, 0.1))
    return net


def flatten(net):
    return torch.cat([tensor.flatten() for tensor in net.state_dict().values()])


@pytest.mark.golden("augmentation.json", cases="permutations")
def test_gather_index_is_the_published_one(golden):
    permutations, (task, seed) = golden.case, golden.name.split("/seed")
    constructor, rule, *_ = TASKS[task]
    expected = golden.tensors()[golden.name].long()
    index = permutation_index(constructor(), given(rule, permutations))
    assert_close(index, expected, "exact", "index")
    generator = torch.Generator().manual_seed(int(seed))
    assert_close(permutation_index(constructor(), drawn(rule), generator), expected, "exact", "drawn index")
    flat = flatten(filled(task))
    for ours in random_permute_flat([flat, flat.expand(2, -1)], constructor(), int(seed), drawn(rule)):
        assert torch.equal(ours, flat[expected].expand_as(ours))


@pytest.mark.golden("task_models.json", cases="results")
def test_task_networks_of_these_tests_are_the_published_ones(golden):
    task, result, document = golden.name, golden.case, golden.document
    _, _, name, shape = TASKS[task]
    out = filled(task)(fill(f"{document['tag']}/{name}", (document["n"], *shape)))
    if task == "cartpole":
        assert_close(out[:, 0], result["action_mean"], "float32", "action")
        return
    labels = torch.arange(document["n"]) % 10
    assert_stats(out, result["logits"], "float32", "logits")
    assert_close(out[0], result["logits_row0"], "float32", "logits of row 0")
    losses = F.cross_entropy(out, labels, reduction="none")
    assert_close(losses, result["inst_loss"], "float32", "losses")
    assert_close(losses.mean(), result["loss"], "float32", "loss")
    wrong = 100.0 * (out.argmax(1) != labels)
    assert_close(wrong.mean(), result["error"], "float32", "error")
    if "inst_err" in result:
        assert_close(wrong, result["inst_err"], "exact", "errors")


@pytest.mark.golden("parameter_layouts.json", cases="layouts")
def test_flat_vectors_are_the_published_ones(golden):
    case, pieces, offset = golden.case, {}, 0
    for tensor in case["tensors"]:
        assert tensor["offset"] == offset
        pieces[tensor["key"]] = fill(f"{case['task']}/{tensor['key']}", tensor["shape"], 0.1)
        assert pieces[tensor["key"]].numel() == tensor["size"]
        offset += tensor["size"]
    assert offset == case["n_params"]
    assert_stats(torch.cat([piece.flatten() for piece in pieces.values()]), case["flat"], "float32", "flat")
    if case["task"] in TASKS:
        state = filled(case["task"]).state_dict()
        assert list(state) == list(pieces)
        assert all(torch.equal(state[key], piece) for key, piece in pieces.items())


@pytest.mark.parametrize("task", TASKS)
def test_module_and_vector_agree_and_the_function_stays(task):
    _, rule, name, shape = TASKS[task]
    net = filled(task).double()
    x = fill(name, (5, *shape)).double()
    before, flat = net(x), flatten(net)
    permute_module(net, drawn(rule), torch.Generator().manual_seed(3))
    (permuted,) = random_permute_flat([flat], net, 3, drawn(rule))
    assert torch.equal(flatten(net), permuted) and not torch.equal(permuted, flat)
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-13)


def test_without_a_seed_the_global_generator_is_used():
    net = MnistMlp()
    torch.manual_seed(5)
    (permuted,) = random_permute_flat([torch.arange(7960)], net, None, drawn(mnist_rule))
    torch.manual_seed(5)
    assert torch.equal(permuted[7840:7850], 7840 + torch.randperm(10))


def test_a_rule_that_leaves_state_dict_order_is_named():
    def swapped(net, draw, permute_in, permute_out, permute_in_out, register):
        register(net.fc1.bias)

    def short(net, draw, permute_in, permute_out, permute_in_out, register):
        register(net.fc1.weight)

    def long(net, draw, permute_in, permute_out, permute_in_out, register):
        mnist_rule(net, draw, permute_in, permute_out, permute_in_out, register)
        register(net.fc2.bias)

    for rule, match in (
        (swapped, r"tensor 0 in state-dict order is fc1.weight \(10, 784\).*shape \(10,\)"),
        (short, "fc1.bias was not visited"),
        (long, r"tensor 4 in state-dict order is the end"),
    ):
        with pytest.raises(ValueError, match=match):
            permutation_index(MnistMlp(), drawn(rule))
