"""The nearest checkpoint, whatever the order and the scale of the hidden units."""

import itertools

import numpy as np
import pytest
import torch
from gpt_diffusion.novelty import nearest_checkpoints
from torch import nn
from zoo_common.layout import ParameterLayout
from zoo_common.symmetry import Symmetry
from zoo_common.zoo import Run, Zoo

HIDDEN, RUNS, CHECKPOINTS = 4, 12, 3


def zoo_of(net, path, seed=0):
    layout = ParameterLayout.from_module(net)
    zoo = Zoo.create(path, layout=layout)
    generator = torch.Generator().manual_seed(seed)
    zoo.append(
        [
            Run(
                id=f"run{r:02d}",
                params=torch.randn(CHECKPOINTS, layout.size, generator=generator),
                steps=np.arange(CHECKPOINTS),
                metrics={},
            )
            for r in range(RUNS)
        ]
    )
    return zoo


@pytest.fixture
def shallow(tmp_path):
    net = nn.Sequential(nn.Linear(5, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 3))
    return zoo_of(net, tmp_path / "zoo"), Symmetry.from_module(net, torch.zeros(2, 5))


@pytest.fixture
def deep(tmp_path):
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return zoo_of(net, tmp_path / "zoo"), Symmetry.from_module(net, torch.zeros(2, 5))


def rescale(vectors, symmetry, generator):
    """Multiply what enters each hidden unit and divide what leaves it; for one hidden layer."""
    layout, vectors = symmetry.layout, vectors.clone()
    views = layout.unflatten(vectors)
    factor = torch.rand(len(vectors), HIDDEN, generator=generator) * 3 + 0.2
    views["0.weight"] *= factor[..., None]
    views["0.bias"] *= factor
    views["2.weight"] /= factor[:, None]
    return vectors


def test_the_distance_is_the_least_over_all_permutations(shallow):
    zoo, symmetry = shallow
    networks = torch.randn(3, symmetry.layout.size, generator=torch.Generator().manual_seed(1))
    found = nearest_checkpoints(networks, zoo, np.arange(RUNS), symmetry)
    orders = torch.tensor(list(itertools.permutations(range(HIDDEN))))
    balanced = symmetry.balance(networks)
    for i, network in enumerate(balanced):
        everyone = symmetry.apply(network.expand(len(orders), -1), [orders])
        distances = torch.stack(
            [(symmetry.balance(zoo.params[r].clone())[:, None] - everyone).norm(dim=-1).amin(1) for r in range(RUNS)]
        )
        torch.testing.assert_close(found.distance[i], distances.min(), rtol=1e-5, atol=1e-5)
        assert divmod(int(distances.argmin()), CHECKPOINTS) == (int(found.run[i]), int(found.checkpoint[i]))


def test_planted_copies_are_found(shallow):
    """Exact, permuted, rescaled, both, and of an intermediate checkpoint."""
    zoo, symmetry = shallow
    generator = torch.Generator().manual_seed(2)
    original = zoo.params.gather([3, 5, 7, 9], [2, 1, 0, 2])
    copies = original.clone()
    copies[1:2] = symmetry.permute(original[1:2], generator)
    copies[2:3] = rescale(original[2:3], symmetry, generator)
    copies[3:4] = rescale(symmetry.permute(original[3:4], generator), symmetry, generator)
    found = nearest_checkpoints(copies, zoo, np.arange(RUNS), symmetry)
    assert found.distance.max() < 1e-2
    assert found.run.tolist() == [3, 5, 7, 9]
    assert found.checkpoint.tolist() == [2, 1, 0, 2]


def test_permuted_copies_in_deep_networks_are_found(deep):
    zoo, symmetry = deep
    copies = symmetry.permute(zoo.params.gather([3, 5], [2, 1]), torch.Generator().manual_seed(3))
    found = nearest_checkpoints(copies, zoo, np.arange(RUNS), symmetry)
    assert found.distance.max() < 1e-2
    assert found.run.tolist() == [3, 5]


def test_only_the_given_runs_are_searched(shallow):
    zoo, symmetry = shallow
    network = zoo.params[3, 2][None].clone()
    others = np.setdiff1d(np.arange(RUNS), [3])
    assert nearest_checkpoints(network, zoo, others, symmetry).distance.item() > 0.5
    with pytest.raises(ValueError, match="no runs to compare with"):
        nearest_checkpoints(network, zoo, np.arange(0), symmetry)
