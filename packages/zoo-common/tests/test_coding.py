import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import nn
from zoo_common import ParameterLayout, Population, Run, Zoo, load_dataset
from zoo_common.cli import main
from zoo_common.coding import DeltaParams, Rounding, encode, rounding

STORAGES = ["float32", "float16", "bfloat16", "delta10"]


def walks(lengths, size, seed=0, scale=0.01):
    """Random walks (N, D), as training would make them, and the offsets of the runs."""
    generator = torch.Generator().manual_seed(seed)
    runs = [torch.randn(n, size, generator=generator).mul_(scale).cumsum(0) for n in lengths]
    starts = [torch.randn(size, generator=generator) for _ in lengths]
    return torch.cat([a + b for a, b in zip(starts, runs, strict=True)]), np.cumsum([0, *lengths])


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4).filter(any),
    seed=st.integers(0, 2**32 - 1),
)
def test_differences_come_back_within_half_a_step(lengths, sizes, seed):
    params, offsets = walks(lengths, sum(sizes), seed)
    tensors = encode(params, offsets, sizes, "delta10")
    decoded = DeltaParams(tensors, offsets)
    everything = decoded[:]
    half = tensors["params/scale"].repeat_interleave(tensors["params/groups"].diff(), dim=1) / 2
    # decoding adds two float32 numbers of the size of the parameters: 2 units of 6e-8 of them
    assert ((everything - params).abs() <= half + 3e-7 * params.abs().max()).all()
    index = torch.tensor([len(params) - 1, 0, len(params) // 2])
    assert torch.equal(decoded[index], everything[index]) and torch.equal(decoded[0], everything[0])
    assert torch.equal(decoded[1:3], everything[1:3])


def test_a_shard_with_differences_follows_its_formula(tmp_path, layout):
    """By the docstring of zoo_common.coding alone, one number at a time."""
    zoo = Zoo.create(tmp_path / "zoo", layout=layout, dtype="delta10")
    params, _ = walks([20, 3], layout.size)
    buffers = {"1.num_batches_tracked": torch.arange(23)}
    parts = [slice(0, 20), slice(20, 23)]
    runs = [
        Run(f"{p}", params[p], range(p.stop - p.start), buffers={k: b[p] for k, b in buffers.items()}) for p in parts
    ]
    zoo.append([Run(f"r{i}", run.params, run.steps, buffers=run.buffers) for i, run in enumerate(runs)], name="a")
    file = load_file(zoo.path / "shards" / "a.safetensors")
    keys, groups = file["params/keys"].astype(np.float64), file["params/groups"]
    for row, key in [(0, 0), (7, 0), (15, 0), (16, 1), (19, 1), (20, 2), (22, 2)]:
        for i in range(layout.size):
            group = np.searchsorted(groups, i, side="right") - 1
            fine = file["params/fine"][row, i // 4] >> 2 * (i % 4) & 3
            steps = 4 * int(file["params/coarse"][row, i]) + int(fine)
            weight = float(file["params/weight"][row])
            ahead = weight * (keys[key + 1, i] - keys[key, i]) if weight else 0
            value = keys[key, i] + ahead + float(file["params/scale"][row, group]) * steps
            run, checkpoint = (0, row) if row < 20 else (1, row - 20)
            assert zoo.params[run, checkpoint][i].item() == pytest.approx(value, abs=3e-7)
            assert params[row, i].item() == pytest.approx(value, abs=1e-4)
    assert file["params/weight"][[0, 7, 16, 19, 20, 22]].tolist()[2:] == [0, 0, 0, 0]  # no further key in the run


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -3e38])
def test_a_diverged_checkpoint_does_not_touch_the_others(value):
    params, offsets = walks([40, 40], 300)
    plain = DeltaParams(encode(params, offsets, [200, 100], "delta10"), offsets)[:]
    spoilt = params.clone()
    spoilt[16:18, 3] = value  # row 16 is a key
    coded = DeltaParams(encode(spoilt, offsets, [200, 100], "delta10"), offsets)[:]
    rows = [*range(14), *range(32, 80)]
    assert (coded[rows] - params[rows]).abs().max() < 2 * (plain - params).abs().max()
    assert coded[16:18, 128:].isfinite().all(), "only a group is lost"
    if np.isfinite(value):
        assert coded[16, 3] == pytest.approx(value, rel=1e-3)
    else:
        assert coded[16:18, :128].isnan().all()


@pytest.fixture(scope="module")
def trained():
    """Eight networks trained on the digits, 40 checkpoints each: (8, 40, D), the network, the test data."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))
    images, labels = load_dataset("digits").train
    population = Population(network)
    generator = torch.Generator().manual_seed(0)
    bounds = torch.cat([p.new_full((p.numel(),), p.shape[-1] ** -0.5) for p in network.parameters()])
    vectors = (2 * torch.rand(8, len(bounds), generator=generator) - 1) * bounds
    saved, momentum = [], torch.zeros_like(vectors)
    for step in range(400):
        if step in {*range(10), *range(10, 400, 13)}:
            saved.append(vectors.clone())
        batch = torch.randint(len(images), (64,), generator=generator)
        vectors.requires_grad_()
        logits = population(vectors, images[batch])
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels[batch].expand(8, -1), reduction="none")
        (gradient,) = torch.autograd.grad(loss.mean(1).sum(), vectors)
        momentum = 0.9 * momentum + gradient
        vectors = vectors.detach() - 0.05 * momentum
    return torch.stack(saved, dim=1), network, load_dataset("digits").test


def test_a_real_zoo_shrinks_by_2_5_and_keeps_its_metrics(tmp_path, trained):
    params, network, (images, labels) = trained
    population = Population(network)
    sizes, found = {}, {}
    for dtype in STORAGES:
        zoo = Zoo.create(tmp_path / dtype, layout=ParameterLayout.from_module(network), dtype=dtype)
        zoo.append([Run(f"{i}", run, range(40)) for i, run in enumerate(params)], name="a")
        sizes[dtype] = (zoo.path / "shards" / "a.safetensors").stat().st_size
        vectors = torch.cat([zoo.params[i] for i in range(8)]).float()
        found[dtype] = population.metrics(vectors, images, labels)
    assert found["float32"].error.view(8, 40)[:, -1].max() < 15, "the networks are trained"
    assert sizes["float32"] / sizes["delta10"] > 2.5
    lost = {dtype: (metrics.error - found["float32"].error).abs().mean() for dtype, metrics in found.items()}
    assert lost["delta10"] < 0.03 and lost["delta10"] < lost["bfloat16"]  # points; one image in 397 is 0.25
    assert (found["delta10"].loss - found["float32"].loss).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", STORAGES)
def test_all_reads_agree_in_every_storage(tmp_path, layout, make_run, dtype):
    zoo = Zoo.create(tmp_path / "zoo", layout=layout, dtype=dtype)
    zoo.append([make_run("a", 3), make_run("b", 20)])
    zoo.append([make_run("c", 1)])
    zoo = Zoo.open(zoo.path)
    assert zoo.params["b"].dtype == zoo.dtype and zoo.params["b"].shape == (20, layout.size)
    torch.testing.assert_close(zoo.params["b"].float(), make_run("b", 20).params, rtol=0.01, atol=0.01)
    for run, checkpoint in [("a", 0), ("b", 17), ("c", -1)]:
        assert torch.equal(zoo.params[run][checkpoint], zoo.params[run, checkpoint])
        gathered = zoo.params.gather([zoo.index(run), 0], [checkpoint, 0])
        assert torch.equal(gathered[0], zoo.params[run, checkpoint].float())
        weights = layout.flatten(zoo.weights(run, checkpoint))
        assert torch.equal(weights, zoo.params[run, checkpoint].float())
    every = torch.cat([zoo.params[i] for i in range(3)]).double()
    torch.testing.assert_close(zoo.stats(runs=[0, 1, 2]).mean, every.mean(0), rtol=1e-12, atol=1e-12)
    assert zoo.filter().kept.tolist() == [0, 1, 2] and zoo.verify().problems == ()


@pytest.mark.parametrize("dtype", STORAGES)
def test_the_rounding_error_is_that_of_what_is_read(tmp_path, layout, make_run, dtype, capsys):
    zoo = Zoo.create(tmp_path / "zoo", layout=layout, dtype=dtype)
    runs = [make_run("a", 3), make_run("b", 20), make_run("c", 2)]
    runs[2].params[0, 0] = float("inf")
    zoo.append(runs[:2])
    zoo.append(runs[2:])
    given = torch.cat([run.params for run in runs]).double()
    error = torch.cat([zoo.params[i] for i in range(3)]).double() - given
    error, given = error.where(error.isfinite(), 0), given.where(error.isfinite(), 0)
    found = Zoo.open(zoo.path).rounding()
    assert found.largest == error.abs().max().item() and (found.largest == 0) == (dtype == "float32")
    assert main(["inspect", str(zoo.path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["storage"] == dtype and shown["rounding_error"]["largest"] == found.largest
    relative = (error.square().sum() / given.square().sum()).sqrt().item()
    assert shown["rounding_error"]["relative_rms"] == pytest.approx(relative, rel=1e-9)


def test_rounding_errors_add_up():
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(10, 7, generator=generator)
    stored = given.half()
    whole, parts = rounding(given, stored), [rounding(given[i : i + 5], stored[i : i + 5]) for i in (0, 5)]
    assert (parts[0] + parts[1]).relative_rms == pytest.approx(whole.relative_rms, rel=1e-12)
    expected = ((stored.double() - given.double()).norm() / given.double().norm()).item()
    assert whole.relative_rms == pytest.approx(expected, rel=1e-12)
    assert Rounding().relative_rms == 0
