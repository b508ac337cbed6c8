import pytest
import torch
from support.formats import close_environments, make_net, write_trial
from torch import nn
from zoo_common import ParameterLayout, Run, Zoo


@pytest.fixture(autouse=True)
def closed():
    yield
    close_environments()


@pytest.fixture
def layout():
    """Three tensors and a counter beside them, 12 parameters."""
    return ParameterLayout.from_module(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(1), nn.Identity()))


@pytest.fixture
def make_run(layout):
    """Random runs: ``make_run(id, checkpoints)``; the values follow from the id."""

    def make(run_id, checkpoints=3, **changes):
        generator = torch.Generator().manual_seed(sum(run_id.encode()))
        values = {
            "params": torch.randn(checkpoints, layout.size, generator=generator),
            "steps": [2**i for i in range(checkpoints)],
            "metrics": {"val_loss": torch.rand(checkpoints, generator=generator), "error": list(range(checkpoints))},
            "config": {"seed": len(run_id)},
            "buffers": {"1.num_batches_tracked": torch.arange(checkpoints)},
        }
        return Run(run_id, **{**values, **changes})

    return make


@pytest.fixture
def zoo(tmp_path, layout, make_run):
    """Four runs of 3, 1, 5 and 3 checkpoints in three shards."""
    zoo = Zoo.create(tmp_path / "zoo", layout=layout, task="digits_loss", attributes={"classes": 10})
    zoo.append([make_run("a", 3), make_run("b", 1)], name="0")
    zoo.append([make_run("c", 5)], name="1")
    zoo.append([make_run("d", 3)], name="2")
    return zoo


@pytest.fixture
def trials(tmp_path):
    """Three trials whose order on disk is not that of their names."""
    for seed in (2, 3, 1):
        write_trial(tmp_path / "trials" / f"NN_tune_{seed:05d}_seed={seed}", seed)
    return tmp_path / "trials"


@pytest.fixture
def own(tmp_path):
    """A zoo with buffers, configs and steps of its own, in small shards."""
    layout = ParameterLayout.from_module(make_net())
    zoo = Zoo.create(tmp_path / "own", layout=layout, task="sum", split=(0.5, 0.2, 0.3), attributes={"n": 1})
    for seed in range(5):
        nets = [make_net(10 * seed + i) for i in range(1 + seed)]
        steps = [0, 5, 123_456, 200_000, 10_000_000][: 1 + seed]
        metrics = {"test_loss": [0.1 * i for i in range(1 + seed)], "test_error": [50.0 - i for i in range(1 + seed)]}
        buffers = {"1.num_batches_tracked": torch.stack([net[1].num_batches_tracked for net in nets])}
        zoo.append([Run(f"run.{seed}", layout.stack(nets), steps, metrics, {"seed": seed}, buffers)], name=f"s{seed}")
    return zoo
