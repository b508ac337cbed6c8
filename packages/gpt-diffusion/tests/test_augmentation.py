import pytest
import torch
from gpt_diffusion.augmentation import RulePermuter, permutation_index, permute_module, random_permute_flat
from support.golden import assert_close, fill
from support.networks import INPUTS, filled, network
from zoo_common.layout import ParameterLayout
from zoo_common.tasks import get_task


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


RULES = {"mnist": mnist_rule, "cifar10": cifar10_rule, "cartpole": cartpole_rule}


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


def flatten(net):
    return ParameterLayout.from_module(net).flatten(net)


@pytest.mark.golden("augmentation.json", cases="permutations")
def test_gather_index_is_the_published_one(golden):
    permutations, (task, seed) = golden.case, golden.name.split("/seed")
    rule = RULES[task]
    expected = golden.tensors()[golden.name].long()
    index = permutation_index(network(task), given(rule, permutations))
    assert_close(index, expected, "exact", "index")
    generator = torch.Generator().manual_seed(int(seed))
    assert_close(permutation_index(network(task), drawn(rule), generator), expected, "exact", "drawn index")
    flat = flatten(filled(task))
    for ours in random_permute_flat([flat, flat.expand(2, -1)], network(task), int(seed), drawn(rule)):
        assert torch.equal(ours, flat[expected].expand_as(ours))


@pytest.mark.parametrize("task", RULES)
def test_module_and_vector_agree_and_the_function_stays(task):
    rule, (name, shape) = RULES[task], INPUTS[task]
    net = filled(task).double()
    x = fill(name, (5, *shape)).double()
    before, flat = net(x), flatten(net)
    permute_module(net, drawn(rule), torch.Generator().manual_seed(3))
    (permuted,) = random_permute_flat([flat], net, 3, drawn(rule))
    assert torch.equal(flatten(net), permuted) and not torch.equal(permuted, flat)
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-13)


def test_without_a_seed_the_global_generator_is_used():
    net = network("mnist")
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
            permutation_index(network("mnist"), drawn(rule))


def test_a_rule_permutes_many_checkpoints_each_in_its_own_way():
    """The rule of the published MNIST task, against the symmetry found by tracing."""
    task = get_task("mnist")
    permuter, symmetry = RulePermuter(task.constructor(), randperm_rule), task.symmetry()
    vectors = torch.randn(3, symmetry.layout.size, generator=torch.Generator().manual_seed(0))
    drawn = permuter.random_permutations(3, torch.Generator().manual_seed(1))
    permuted = permuter.apply(vectors, drawn)
    orders = drawn[0][:, 7840:7850] - 7840  # where the biases of the hidden units come from
    assert not torch.equal(orders[0], orders[1])
    torch.testing.assert_close(permuted, symmetry.apply(vectors, [orders]), rtol=0, atol=0)
    rows = torch.tensor([[2, 0, 0], [1, 2, 0]])
    shared = permuter.apply(vectors, drawn, rows=rows)
    torch.testing.assert_close(shared, symmetry.apply(vectors, [orders], rows=rows), rtol=0, atol=0)


def randperm_rule(net, generator, permute_in, permute_out, permute_in_out, register):
    p = torch.randperm(10, generator=generator)
    permute_out((net.fc1.weight, net.fc1.bias), p)
    permute_in(net.fc2.weight, p)
    register(net.fc2.bias)
