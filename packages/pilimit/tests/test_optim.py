"""PiSGD against formulas written out in float64; schedulers, accumulation, clipping without waiting."""

import copy

import pytest
import torch
from pilimit import InfMLP, PiSGD, clip_grad_norm_, grad_norms, param_groups
from pilimit.expectations import f00
from torch.nn import functional as F

MULTS = {"first_layer_lr_mult": 0.1, "last_layer_lr_mult": 4.0, "bias_lr_mult": 0.5}


def make():
    return InfMLP(6, 3, 5, depth=2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def batch(t, n=4):
    generator = torch.Generator().manual_seed(t)
    return torch.randn(n, 6, dtype=torch.float64, generator=generator), torch.arange(n) % 3


def backward(net, t, n=4):
    x, y = batch(t, n)
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    return loss.item()


def rate_of(name, lr):
    if name.endswith("bias"):
        return lr * MULTS["bias_lr_mult"]
    return lr * {"0": MULTS["first_layer_lr_mult"], "2": MULTS["last_layer_lr_mult"]}.get(name.split(".")[1], 1.0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("apply_mult", [True, False])
def test_steps_are_heavy_ball_on_the_operator(momentum, dampening, weight_decay, apply_mult):
    """Atoms: velocity and weight are coefficient vectors over all rows ever appended."""
    net, lr = make(), 0.3
    options = {"apply_lr_mult_to_wd": apply_mult}
    dampening = dampening if momentum else 0.0
    optimizer = PiSGD(param_groups(net, **MULTS), lr, momentum, dampening, weight_decay, **options)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], 0.5)
    names = {name: p for name, p in net.named_parameters()}
    weights = {
        name: (p.atoms.tensors()[2] if name.endswith("weight") else p.detach().clone()) for name, p in names.items()
    }
    velocity = {name: torch.zeros_like(value) for name, value in weights.items()}
    for t in range(4):
        optimizer.zero_grad()
        backward(net, t)
        for name, p in names.items():
            rate = rate_of(name, lr)
            decay = weight_decay * (1 if apply_mult else lr / rate)
            if name.endswith("weight"):
                rows = len(p.pending()[0])
                weights[name] = torch.cat([weights[name], torch.zeros(rows, dtype=torch.float64)])
                velocity[name] = torch.cat([velocity[name], torch.zeros(rows, dtype=torch.float64)])
                gradient = torch.zeros_like(weights[name])
                gradient[-rows:] = 1
            else:
                gradient = p.grad
            gradient = gradient + decay * weights[name]
            velocity[name] = momentum * velocity[name] + (1 - dampening) * gradient
            weights[name] = weights[name] - rate * velocity[name]
        optimizer.step()
        scheduler.step()
        lr = 0.3 if t < 1 else 0.15
        for name, p in names.items():
            actual = p.atoms.tensors()[2] if name.endswith("weight") else p
            torch.testing.assert_close(actual, weights[name], rtol=1e-12, atol=1e-14, msg=f"{name} {t}")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("apply_mult", [True, False])
def test_a_multiplier_of_zero_appends_nothing(momentum, apply_mult):
    net = make()
    groups = param_groups(net, last_layer_lr_mult=0.0)
    optimizer = PiSGD(groups, 0.5, momentum, weight_decay=0.1, apply_lr_mult_to_wd=apply_mult)
    before = net.layers[2].atoms.tensors()[2]
    for t in range(2):
        optimizer.zero_grad()
        backward(net, t)
        optimizer.step()
    assert [len(layer.atoms) for layer in net.infinite_layers()] == [13, 5]
    factor = 1 if momentum or apply_mult else 0.95**2
    torch.testing.assert_close(net.layers[2].atoms.tensors()[2], before * factor)


def test_accumulated_batches_are_one_batch():
    whole, parts = make(), make()
    optimizers = [PiSGD(net.parameters(), 0.5, 0.9, weight_decay=0.01) for net in (whole, parts)]
    for t in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        x, y = batch(t, 8)
        F.cross_entropy(whole(x), y).backward()
        for rows in (slice(0, 4), slice(4, 8)):
            (F.cross_entropy(parts(x[rows]), y[rows]) / 2).backward()
        for net, optimizer in zip((whole, parts), optimizers, strict=True):
            clip_grad_norm_(net.parameters(), 0.2)
            optimizer.step()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-12, atol=1e-14)


def test_zeroed_gradients_append_nothing():
    plain, zeroed = make(), make()
    for net, to_none in ((plain, True), (zeroed, False)):
        optimizer = PiSGD(net.parameters(), 0.5)
        for t in range(3):
            optimizer.zero_grad(set_to_none=to_none)
            backward(net, t)
            optimizer.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(zeroed.state_dict()[name], value)


def test_many_strong_decays_lose_no_digits():
    net = make()
    atoms, expected = net.layers[1].atoms, net.layers[1].atoms.tensors()[2]
    for _ in range(40):
        atoms.decay(0.3)
        atoms.append(torch.ones(1, 5, dtype=torch.float64), torch.ones(1, 5, dtype=torch.float64), 2.0)
        expected = torch.cat([0.3 * expected, torch.tensor([2.0], dtype=torch.float64)])
    torch.testing.assert_close(atoms.tensors()[2], expected, rtol=1e-13, atol=0)
    atoms.decay(0.0)
    assert not atoms.tensors()[2].any()


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("per_param", [False, True])
def test_clipping_scales_by_operator_norms(per_param, exclude):
    net, reference = make(), make()
    backward(net, 0)
    backward(reference, 0)
    norms = {}
    for name, p in reference.named_parameters():
        if name.endswith("weight"):
            a, b = p.pending()
            norms[name] = torch.trace(a.T @ f00(b @ b.T) @ a).sqrt()
        else:
            norms[name] = p.grad.norm()
    for (_, norm), name in zip(grad_norms(net.parameters()), norms, strict=True):
        torch.testing.assert_close(norm, norms[name], rtol=1e-7, atol=0)
    total = sum(norm**2 for name, norm in norms.items() if not (exclude and name == "layers.2.weight")) ** 0.5
    found = clip_grad_norm_(net.parameters(), 0.05, per_param=per_param, exclude_last_layer=exclude)
    torch.testing.assert_close(found, total, rtol=1e-7, atol=0)
    for (name, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
        factor = min(1.0, 0.05 / (norms[name] if per_param else total))
        torch.testing.assert_close(p.grad, q.grad * factor, rtol=1e-6, atol=0, msg=name)


def test_no_clipping_below_the_threshold_nor_without_one():
    net, reference = make(), make()
    backward(net, 0)
    backward(reference, 0)
    for threshold in (0.0, -1.0, 1e9):
        clip_grad_norm_(net.parameters(), threshold)
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_optimizer_states_go_on_where_they_were():
    net, twin = make(), make()
    optimizer = PiSGD(net.parameters(), 0.3, 0.9, weight_decay=0.01)
    for t in range(3):
        optimizer.zero_grad()
        backward(net, t)
        optimizer.step()
    twin.load_state_dict(net.state_dict())
    resumed = PiSGD(twin.parameters(), 1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch itself shares the tensors
    for each, own in ((net, optimizer), (twin, resumed)):
        for t in range(3, 6):
            own.zero_grad()
            backward(each, t)
            own.step()
    for name, value in net.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_a_torch_optimizer_refuses_atoms():
    net = make()
    backward(net, 0)
    with pytest.raises(RuntimeError, match="size"):
        torch.optim.SGD(net.parameters(), 0.1).step()
