"""Training pairs, against what the specification says about their distribution."""

import numpy as np
import pytest
import torch
from gpt_diffusion.dataset import ParameterDataset
from gpt_diffusion.normalization import get_normalizer
from torch import nn
from zoo_common.layout import ParameterLayout
from zoo_common.symmetry import Symmetry
from zoo_common.zoo import Run, Zoo

CHECKPOINTS = 6


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture
def zoo(net, tmp_path):
    """Five runs whose vectors tell run and checkpoint, with falling losses."""
    layout = ParameterLayout.from_module(net)
    zoo = Zoo.create(tmp_path / "zoo", layout=layout)
    runs = []
    for r in range(5):
        params = torch.arange(layout.size) + 1000.0 * r + 100.0 * torch.arange(CHECKPOINTS)[:, None]
        loss = 2.0 - 0.3 * np.arange(CHECKPOINTS) - 0.01 * r
        runs.append(Run(id=f"run{r}", params=params, steps=np.arange(CHECKPOINTS), metrics={"loss": loss}))
    zoo.append(runs)
    return zoo


def dataset(zoo, **options):
    options = {"metric": "loss", "normalizer": get_normalizer("none"), "epoch_size": 1000} | options
    return ParameterDataset(zoo, np.arange(5), **options)


def places(vectors):
    """Run and checkpoint of each vector."""
    first = vectors[:, 0].long()
    return first // 1000, first % 1000 // 100


def test_pairs_come_from_one_run_and_carry_their_metrics(zoo):
    for mode in ("spacing", "prompts"):
        pairs = dataset(zoo, mode=mode).batch(200, 0)
        (run, start), (same, target) = places(pairs.start), places(pairs.target)
        assert torch.equal(run, same)
        assert (start < target).all()
        for index, metric in ((start, pairs.start_metric), (target, pairs.target_metric)):
            torch.testing.assert_close(metric, 2.0 - 0.3 * index.double() - 0.01 * run.double(), rtol=0, atol=1e-12)


def test_every_epoch_visits_each_run_equally_often(zoo):
    data = dataset(zoo, epoch_size=53)
    assert data.epoch_size == 50
    for epoch in range(3):
        runs = torch.cat([places(data.batch(10, 5 * epoch + i).start)[0] for i in range(5)])
        assert torch.bincount(runs).tolist() == [10] * 5


def test_spacing_is_uniform_and_then_the_start(zoo):
    """Chi-square over all (spacing, start) cells; the statistic has 14 degrees of freedom, 36.1 is its 0.1 % tail."""
    data, n = dataset(zoo, epoch_size=20_000), 20_000
    pairs = data.batch(n, 0)
    start, target = places(pairs.start)[1], places(pairs.target)[1]
    statistic = 0.0
    for spacing in range(1, CHECKPOINTS):
        for first in range(CHECKPOINTS - spacing):
            expected = n / (CHECKPOINTS - 1) / (CHECKPOINTS - spacing)
            seen = int(((target - start == spacing) & (start == first)).sum())
            statistic += (seen - expected) ** 2 / expected
    assert statistic < 36.1


def test_prompted_pairs_start_at_the_initialisation_half_of_the_time(zoo):
    pairs = dataset(zoo, mode="prompts", epoch_size=20_000).batch(20_000, 0)
    start = places(pairs.start)[1]
    at_init = 0.5 + 0.5 / (CHECKPOINTS - 1)
    assert abs((start == 0).float().mean().item() - at_init) < 0.02


def test_spacing_limits_hold(zoo):
    pairs = dataset(zoo, min_spacing=2, max_spacing=3).batch(500, 0)
    spacing = places(pairs.target)[1] - places(pairs.start)[1]
    assert set(spacing.tolist()) == {2, 3}


def test_a_batch_depends_on_the_seed_and_its_number_alone(zoo):
    first, again = dataset(zoo), dataset(zoo)
    again.batch(10, 3)
    assert torch.equal(first.batch(10, 7).start, again.batch(10, 7).start)
    assert not torch.equal(first.batch(10, 7).start, first.batch(10, 8).start)
    assert not torch.equal(first.batch(10, 7).start, dataset(zoo, seed=1).batch(10, 7).start)


def test_augmentation_permutes_both_alike_and_keeps_the_function(zoo, net):
    symmetry = Symmetry.from_module(net, torch.zeros(2, 3))
    plain, moved = dataset(zoo).batch(50, 0), dataset(zoo, augment=symmetry).batch(50, 0)
    # entry i of a run's vectors is i plus a constant, so the permutation can be read off
    order = (moved.start - plain.start[:, :1]).long()
    assert torch.equal(order, (moved.target - plain.target[:, :1]).long())
    assert not torch.equal(moved.start, plain.start)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layout, scale = zoo.layout, 1e-4
    for a, b in zip(plain.start[:5], moved.start[:5], strict=True):
        out = [torch.func.functional_call(net, layout.unflatten(v.double() * scale), (x,)) for v in (a, b)]
        torch.testing.assert_close(*out, rtol=1e-10, atol=1e-10)


def test_weights_are_normalised(zoo):
    coefficient = dataset(zoo, normalizer=get_normalizer("openai", 4.0)).batch(10, 0)
    torch.testing.assert_close(coefficient.start, 4.0 * dataset(zoo).batch(10, 0).start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch_size": 4}, r"target_epoch_size \(4\) must be at least the number of runs \(5\)"),
        ({"min_spacing": 6}, "spacing of 6 needs 7"),
        ({"min_spacing": 0}, "1 <= min <= max"),
    ],
)
def test_bad_options_are_named(zoo, options, message):
    with pytest.raises(ValueError, match=message):
        dataset(zoo, **options)


def test_a_batch_larger_than_an_epoch_is_named(zoo):
    with pytest.raises(ValueError, match=r"mb_size \(2000\) is larger than an epoch \(1000 pairs\)"):
        dataset(zoo).batch(2000, 0)


def test_no_runs_are_named(zoo):
    with pytest.raises(ValueError, match="no training runs"):
        ParameterDataset(zoo, np.arange(0), metric="loss", normalizer=get_normalizer("none"))


def test_chunks_do_not_change_a_batch(zoo, net, monkeypatch):
    data = dataset(zoo, augment=Symmetry.from_module(net, torch.zeros(2, 3)), normalizer=get_normalizer("openai", 3.0))
    whole = data.batch(50, 3)
    monkeypatch.setattr("zoo_common.symmetry._CACHED", 7 * 12)
    for part, expected in zip(data.batch(50, 3), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=0)


def test_shards_do_not_change_a_batch(zoo, net, tmp_path):
    scattered = Zoo.create(tmp_path / "scattered", layout=zoo.layout)
    for run in range(len(zoo)):
        scattered.append([zoo.run(run)])
    options = {"augment": Symmetry.from_module(net, torch.zeros(2, 3)), "normalizer": get_normalizer("openai", 3.0)}
    for part, expected in zip(*(dataset(z, **options).batch(50, 3) for z in (scattered, zoo)), strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=0)
