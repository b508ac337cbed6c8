from copy import deepcopy

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from zoo_common import ParameterLayout

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)
SMALL = ["squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "mobilenet_v3_small"]


class Odd(nn.Module):
    """Tied weights, parameters and buffers without axes, an empty tensor, integer, boolean and complex buffers."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.encoder = nn.Linear(3, 4, bias=False)
        self.decoder = nn.Linear(3, 4)
        self.decoder.weight = self.encoder.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("temperature", torch.tensor(0.5))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.to(dtype)
        self.register_buffer("phase", torch.tensor([1 + 2j]))

    def forward(self, x):
        return self.norm(self.decoder(x)) * self.scale + self.encoder(x)


def bits(tensor):
    """The bytes of a tensor, so that equality is bitwise and NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(bits(actual[name]), bits(tensor)), name


def fill_with_random_bits(module, seed):
    """Any bit pattern, NaN and infinities included; every buffer too."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in {t.data_ptr(): t for t in module.state_dict().values()}.values():
        noise = torch.randint(0, 256, (tensor.numel() * tensor.element_size(),), dtype=torch.uint8, generator=generator)
        if tensor.dtype == torch.bool:
            noise %= 2
        tensor.copy_(noise.view(tensor.dtype).reshape(tensor.shape))


def build(name, monkeypatch):
    """A torchvision model whose random initialisation is skipped, because it takes minutes for the large ones."""
    for function in [f for f in dir(nn.init) if f.endswith("_") and not f.startswith("_")]:
        monkeypatch.setattr(nn.init, function, lambda tensor, *args, **kwargs: tensor)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **options)


def assert_round_trip(module):
    layout = ParameterLayout.from_module(module)
    vector, buffers = layout.flatten(module), layout.buffers_of(module)
    assert_same_state(layout.unflatten(vector, buffers), module.state_dict())
    restored = deepcopy(module)
    for tensor in restored.state_dict().values():
        tensor.zero_()
    layout.load_into(restored, vector, buffers)
    assert_same_state(restored.state_dict(), module.state_dict())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_layout_of_every_torchvision_classifier_follows_its_state_dict(name, monkeypatch):
    module = build(name, monkeypatch)
    layout = ParameterLayout.from_module(module)
    state = module.state_dict()
    floating = [key for key, tensor in state.items() if tensor.is_floating_point()]
    assert list(layout.names) == floating
    assert {spec.name for spec in layout.buffers} == state.keys() - set(floating)
    assert layout.size == sum(state[key].numel() for key in floating)
    assert ParameterLayout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize("name", SMALL)
def test_round_trip_of_torchvision_classifiers_is_bitwise(name, monkeypatch):
    module = build(name, monkeypatch)
    fill_with_random_bits(module, seed=0)
    assert_round_trip(module)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_round_trip_of_every_torchvision_classifier_is_bitwise(name, monkeypatch):
    module = build(name, monkeypatch)
    fill_with_random_bits(module, seed=0)
    assert_round_trip(module)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_with_tied_and_odd_tensors_is_bitwise(dtype):
    module = Odd(dtype)
    fill_with_random_bits(module, seed=1)
    assert_round_trip(module)


def test_what_is_in_the_vector_and_what_beside_it():
    layout = ParameterLayout.from_module(Odd())
    inside = ["scale", "empty", "encoder.weight", "decoder.bias"]
    inside += [f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    assert sorted(layout.names) == sorted(inside)
    assert sorted(spec.name for spec in layout.buffers) == ["mask", "norm.num_batches_tracked", "phase", "temperature"]
    assert layout.aliases == (("decoder.weight", "encoder.weight"),)


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    batch=st.lists(st.integers(1, 3), max_size=2),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_round_trip_of_mixed_dtypes_and_batches_is_exact(shapes, dtypes, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn((*batch, *shape), generator=generator) for shape in shapes]
    state = {f"w{i}": tensor.to(dtype) for i, (tensor, dtype) in enumerate(zip(drawn, dtypes, strict=False))}
    one = {name: tensor[(0,) * len(batch)] for name, tensor in state.items()}
    layout = ParameterLayout.from_state_dict(one)
    vector = layout.flatten(state)
    assert vector.shape == (*batch, layout.size)
    assert_same_state(layout.unflatten(vector), state)


def test_vector_is_the_concatenation_in_state_dict_order():
    state = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor([7.0])}
    layout = ParameterLayout.from_state_dict(state)
    assert layout.flatten(state).tolist() == [0, 3, 1, 4, 2, 5, 7]
    assert [spec.offset for spec in layout.tensors] == [0, 6]


def test_unflatten_gives_views_that_functional_call_differentiates():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    layout = ParameterLayout.from_module(module)
    vector = layout.flatten(module).requires_grad_()
    state = layout.unflatten(vector)
    assert all(tensor.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr() for tensor in state.values())
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    functional_call(module, state, (x,)).square().sum().backward()
    module(x).square().sum().backward()
    torch.testing.assert_close(vector.grad, torch.cat([p.grad.reshape(-1) for p in module.parameters()]))


def test_stacked_modules_flatten_at_once():
    modules = [nn.BatchNorm1d(3) for _ in range(4)]
    for i, module in enumerate(modules):
        fill_with_random_bits(module, seed=i)
    layout = ParameterLayout.from_module(modules[0])
    parameters, buffers = stack_module_state(modules)
    stacked = layout.flatten({**parameters, **buffers})
    assert torch.equal(bits(stacked), bits(layout.stack(modules)))


def test_vmap_over_vectors_equals_a_loop():
    module = nn.Linear(3, 2).double()
    layout = ParameterLayout.from_module(module)
    vectors = torch.randn(4, layout.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.ones(5, 3, dtype=torch.float64)
    together = vmap(lambda v: functional_call(module, layout.unflatten(v), (x,)))(vectors)
    for vector, output in zip(vectors, together, strict=True):
        layout.load_into(module, vector)
        torch.testing.assert_close(module(x), output)


def test_another_dtype_of_the_vector_is_kept():
    layout = ParameterLayout.from_module(nn.Linear(2, 2))
    assert {t.dtype for t in layout.unflatten(torch.zeros(layout.size, dtype=torch.float64)).values()} == {
        torch.float64
    }


def test_equal_content_has_equal_id_and_hash():
    one, same = (ParameterLayout.from_module(nn.Linear(2, 3)) for _ in range(2))
    other = ParameterLayout.from_module(nn.Linear(3, 2))
    assert one == same and one.id == same.id and hash(one) == hash(same)
    assert one.id != other.id


def test_meta_device_gives_the_same_layout():
    with torch.device("meta"):
        meta = Odd()
    assert ParameterLayout.from_module(meta) == ParameterLayout.from_module(Odd())


def test_one_error_lists_everything_that_does_not_fit():
    layout = ParameterLayout.from_module(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"missing bias; unexpected odd; 'weight': expected \(2, 3\), got \(3, 2\)"):
        layout.flatten({"weight": torch.zeros(3, 2), "odd": torch.zeros(1)})


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda layout: layout.unflatten(torch.zeros(7)), ValueError, r"\(\.\.\., 8\), got \(7,\)"),
        (lambda layout: layout.load_into(nn.Linear(2, 3), torch.zeros(8)), ValueError, r"'weight': expected \(2, 3\)"),
        (lambda layout: layout.load_into(nn.Linear(3, 2), torch.zeros(8), {"odd": torch.zeros(1)}), ValueError, "odd"),
        (lambda layout: layout.from_state_dict({"n": torch.tensor(3)}), ValueError, "no floating-point tensor"),
        (lambda layout: layout.from_state_dict({"n": 3}), TypeError, "'n'.*int"),
        (lambda layout: layout.from_json("{}"), ValueError, "not a parameter layout"),
        (
            lambda layout: layout.from_json(layout.to_json().replace('"offset": 6', '"offset": 5')),
            ValueError,
            "offsets",
        ),
    ],
)
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call(ParameterLayout.from_module(nn.Linear(3, 2)))


def test_tied_entries_that_differ_are_refused():
    layout = ParameterLayout.from_module(Odd())
    state = {name: tensor.clone() for name, tensor in Odd().state_dict().items()}
    state["decoder.weight"] += 1
    with pytest.raises(ValueError, match=r"'decoder\.weight' differs from 'encoder\.weight'"):
        layout.flatten(state)
