import math

import pytest
import torch
from torch import nn
from zoo_common import Zoo, ZooRecorder


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


def train(model, recorder, steps=3):
    """Three steps; returns the state dict at each recorded one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = []
    for step in range(steps):
        loss = model(torch.randn(4, 3)).square().mean()
        recorder.record(step, loss=loss)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return states


def test_a_recorded_run_holds_the_weights_of_every_step(tmp_path):
    model = make_model()
    with ZooRecorder(tmp_path / "zoo", model, config={"lr": 0.1}) as recorder:
        states = train(model, recorder)
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.runs[0].config == {"lr": 0.1} and zoo.steps[0].tolist() == [0, 1, 2]
    assert (zoo.metrics["loss"][0] > 0).all()
    for checkpoint, state in enumerate(states):
        weights = zoo.weights(0, checkpoint)
        assert weights.keys() == state.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0)


def test_runs_of_one_zoo_get_different_ids(tmp_path):
    for _ in range(3):
        with ZooRecorder(tmp_path / "zoo", make_model()) as recorder:
            recorder.record(0)
    assert len(set(Zoo.open(tmp_path / "zoo").run_ids)) == 3


def test_a_metric_left_out_is_nan(tmp_path):
    with ZooRecorder(tmp_path / "zoo", make_model(), run_id="a") as recorder:
        recorder.record(0, loss=1.0)
        recorder.record(5, error=0.5)
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.metrics["loss"]["a", 0] == 1 and math.isnan(zoo.metrics["loss"]["a", 1])
    assert math.isnan(zoo.metrics["error"]["a", 0]) and zoo.metrics["error"]["a", 1] == 0.5


def test_a_failed_training_writes_no_run(tmp_path):
    with pytest.raises(RuntimeError, match="diverged"), ZooRecorder(tmp_path / "zoo", make_model()) as recorder:
        recorder.record(0)
        raise RuntimeError("diverged")
    assert len(Zoo.open(tmp_path / "zoo")) == 0


def test_mistakes_are_told_before_the_training(tmp_path):
    with ZooRecorder(tmp_path / "zoo", make_model(), run_id="a") as recorder:
        recorder.record(0)
    with pytest.raises(ValueError, match=r"run 'a' is in .*zoo already"):
        ZooRecorder(tmp_path / "zoo", make_model(), run_id="a")
    with pytest.raises(ValueError, match="layout"):
        ZooRecorder(tmp_path / "zoo", nn.Linear(1, 1))
    with pytest.raises(ValueError, match="run id 'a b'"):
        ZooRecorder(tmp_path / "zoo", make_model(), run_id="a b")
    with pytest.raises(ValueError, match="nothing was recorded"):
        ZooRecorder(tmp_path / "zoo", make_model(), run_id="b").close()
    recorder = ZooRecorder(tmp_path / "zoo", make_model(), run_id="c")
    recorder.record(4)
    with pytest.raises(ValueError, match="step 4 comes after step 4"):
        recorder.record(4)
