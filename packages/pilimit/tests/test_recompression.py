"""Recompression is the best there is on the atoms it keeps, its error is exact, and dropping or merging would be seen."""

import copy

import pytest
import torch
from pilimit import InfMLP, PiSGD, clip_grad_norm_, reduce_atoms
from pilimit.atoms import Atoms
from pilimit.expectations import f00
from pilimit.recompression import choose_pivots, recompress
from torch.nn import functional as F

KEEP = 40


def kernel(x, y):
    return f00(x.double() @ y.double().T)


def operator(atoms):
    a, b, amult = atoms.tensors()
    return F.normalize(b.double(), dim=1), a.double() * amult.double()[:, None]


def distance(one, other):
    """Hilbert-Schmidt norm of a difference, from the definition."""
    b, c = torch.cat([one[0], other[0]]), torch.cat([one[1], -other[1]])
    return float((kernel(b, b) * (c @ c.T)).sum().clamp(min=0).sqrt())


def batch(t, n=8, dtype=torch.float64):
    x = torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(t % 20))
    return x.to(dtype), (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1)


def trained(steps=120, dtype=torch.float64, **options):
    net = InfMLP(6, 3, 5, depth=2, bias_alpha=0.5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    optimizer = PiSGD(net.parameters(), 0.3, **options)
    go_on(net, optimizer, steps)
    return net, optimizer


def go_on(net, optimizer, steps, first=0):
    for t in range(first, first + steps):
        x, labels = batch(t, dtype=net.dtype)
        optimizer.zero_grad()
        F.cross_entropy(net(x).float(), labels).backward()
        clip_grad_norm_(net.parameters(), 0.4)
        optimizer.step()


def dropped(atoms, count):
    """The newest atoms alone, as a cyclic buffer has it."""
    b, c = operator(atoms)
    return b[-count:], c[-count:]


def merged(atoms, count):
    """Coefficients added to those of the nearest of some atoms."""
    b, c = operator(atoms)
    nearest = (b @ b[:count].T).argmax(1)
    return b[:count], torch.zeros_like(c[:count]).index_add(0, nearest, c)


@pytest.mark.parametrize("layer", [1, 2])
def test_the_result_is_the_projection_and_its_error_is_exact(layer):
    atoms = trained()[0].layers[layer].atoms
    whole = operator(atoms)
    rivals = [distance(whole, make(atoms, KEEP)) for make in (dropped, merged)]
    compression, _ = recompress(atoms, KEEP)
    kept = operator(atoms)
    assert (compression.before, compression.after, len(atoms)) == (len(whole[0]), KEEP, KEEP)
    assert compression.norm == pytest.approx(distance(whole, (whole[0][:0], whole[1][:0])), rel=1e-9)
    assert compression.error == pytest.approx(distance(whole, kept), rel=1e-6)
    # the difference is orthogonal to all that the kept atoms can represent
    rest = kernel(kept[0], whole[0]) @ whole[1] - kernel(kept[0], kept[0]) @ kept[1]
    assert rest.norm() < 1e-7 * (kernel(kept[0], whole[0]) @ whole[1]).norm()
    # so dropping and merging, which leave atoms in the same number, are worse by far
    assert compression.error < 0.05 * compression.norm
    assert rivals[0] > 15 * compression.error and rivals[1] > 3 * compression.error


def test_outputs_of_the_last_layer_change_within_the_bound():
    net = trained()[0]
    x = batch(99, 200)[0]
    twin = copy.deepcopy(net)
    with torch.no_grad():
        before, g = net(x), net.pre_activations(x)
        compression, _ = recompress(net.layers[2].atoms, KEEP)
        change = (net(x) - before).norm(dim=1)
        bound = compression.error * g.norm(dim=1) / 2**0.5
    assert (change <= bound * (1 + 1e-9)).all() and change.max() > 0.003 * bound.max()
    reduction = reduce_atoms(twin, KEEP, held_out=x)
    assert reduction.last_layer_bound == pytest.approx(bound.max().item(), rel=0.01)
    assert 0 < reduction.output_change < 0.01
    assert [len(layer.atoms) for layer in twin.infinite_layers()] == [KEEP, KEEP]
    assert reduction.output_change == pytest.approx(float((twin(x).detach() - before).norm() / before.norm()))


def test_the_bound_holds_at_the_inputs_of_the_removed_atoms():
    """There the change is largest."""
    layer = trained()[0].layers[2]
    b, _ = operator(layer.atoms)
    with torch.no_grad():
        before = layer(b)
        compression, _ = recompress(layer.atoms, KEEP)
        change = (layer(b) - before).norm(dim=1)
    bound = compression.error / 2**0.5
    assert 0.02 * bound < change.max() <= bound


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.01}, {"momentum": 0.5, "dampening": 0.3}])
def test_training_goes_on_as_if_nothing_had_happened(options):
    net, optimizer = trained(**options)
    twin, other = trained(**options)
    x = batch(99, 200)[0]
    reduction = reduce_atoms(twin, 4 * KEEP, optimizer=other)
    if options:
        assert 0 < reduction.layers[0].velocity_error < 0.03 * reduction.layers[0].velocity_norm
    go_on(net, optimizer, 10, 120)
    go_on(twin, other, 10, 120)
    with torch.no_grad():
        assert (net(x) - twin(x)).norm() < 2e-3 * net(x).norm()
    for layer in twin.infinite_layers():
        assert len(layer.atoms) == 4 * KEEP + 80


def test_without_the_velocity_of_old_atoms_training_would_go_elsewhere():
    """What the test above would miss, were the velocity dropped."""
    (net, optimizer), (twin, other) = (trained(momentum=0.9) for _ in range(2))
    reduce_atoms(twin, 4 * KEEP)
    other.state.clear()
    x = batch(99, 200)[0]
    go_on(net, optimizer, 10, 120)
    go_on(twin, other, 10, 120)
    with torch.no_grad():
        assert (net(x) - twin(x)).norm() > 2e-2 * net(x).norm()


@pytest.mark.filterwarnings("ignore:torch.* on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_numbers_are_those_whose_error_is_told(dtype):
    net, _ = trained(dtype=dtype)
    atoms = net.layers[1].atoms
    whole = operator(atoms)
    compression, _ = recompress(atoms, KEEP)
    assert compression.error == pytest.approx(distance(whole, operator(atoms)), rel=1e-3)
    assert compression.error < 0.05 * compression.norm and atoms.dtype == dtype


def test_pivots_are_different_and_duplicates_are_left_out():
    b = F.normalize(torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    b = torch.cat([b, b, b])
    pivots = choose_pivots(b, torch.rand(90, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 60)
    assert len(pivots) == 30 and len(set((pivots % 30).tolist())) == 30
    atoms = Atoms(4, 2, torch.float64)
    atoms.append(torch.randn(90, 2, dtype=torch.float64), b, 1.0)
    compression, _ = recompress(atoms, 60)
    assert compression.after == 30 and compression.error < 1e-6 * compression.norm


def test_a_layer_of_zero_needs_no_atoms_and_too_few_are_an_error():
    net, optimizer = trained(momentum=0.9)
    with pytest.raises(ValueError, match="at least 2 atoms must be kept, got 1"):
        reduce_atoms(net, 1, optimizer=optimizer)
    atoms = Atoms(4, 2, torch.float32)
    atoms.append(torch.zeros(9, 2), F.normalize(torch.randn(9, 4)), 1.0)
    compression, _ = recompress(atoms, 5)
    assert (compression.after, compression.norm, compression.error) == (0, 0.0, 0.0)
