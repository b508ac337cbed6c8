import random

import numpy as np
import pytest
import torch
from support.reliability import flip_bit
from torch import nn
from zoo_common import load_checkpoint, load_training, save_checkpoint, save_training


def test_tied_and_mixed_weights_come_back_with_metadata(tmp_path):
    shared = torch.randn(2, 3)
    state = {"a": shared, "b": shared, "c": torch.tensor(3), "d": torch.randn(2).half(), "e": shared.T}
    save_checkpoint(tmp_path / "c.safetensors", state, {"loss": 0.1, "task": "digits"})
    checkpoint = load_checkpoint(tmp_path / "c.safetensors")
    assert checkpoint.metadata == {"loss": 0.1, "task": "digits"}
    assert list(checkpoint.state) == list(state)
    for name, tensor in state.items():
        torch.testing.assert_close(checkpoint.state[name], tensor, rtol=0, atol=0)


def make_training(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    return model, optimizer, scheduler, torch.Generator().manual_seed(seed)


def train(model, optimizer, scheduler, generator, steps):
    for _ in range(steps):
        x = torch.randn(16, 4, generator=generator) + random.random() + np.random.normal()  # noqa: NPY002
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()


def save(path, parts, progress=None):
    model, optimizer, scheduler, generator = parts
    save_training(
        path,
        modules={"model": model},
        optimizers={"adam": optimizer},
        schedulers={"cycle": scheduler},
        generators={"data": generator},
        progress=progress,
    )


def load(path, parts):
    model, optimizer, scheduler, generator = parts
    return load_training(
        path,
        modules={"model": model},
        optimizers={"adam": optimizer},
        schedulers={"cycle": scheduler},
        generators={"data": generator},
    )


def test_resumed_training_is_bitwise_the_uninterrupted_one(tmp_path):
    whole = make_training()
    train(*whole, steps=4)
    save(tmp_path / "t", whole)
    train(*whole, steps=6)
    torch.manual_seed(99)
    random.seed(99)
    resumed = make_training(seed=5)
    train(*resumed, steps=1)
    load(tmp_path / "t", resumed)
    train(*resumed, steps=6)
    for (name, a), b in zip(whole[0].state_dict().items(), resumed[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert whole[2].get_last_lr() == resumed[2].get_last_lr()


def test_progress_comes_back_as_it_was(tmp_path):
    parts = make_training()
    rng = np.random.default_rng(3)
    progress = {
        "step": 3,
        "best": float("inf"),
        "note": None,
        "order": np.arange(5, dtype=np.uint32),
        "loss": np.float32(0.25),
        "history": [1.5, (2, "x"), {"a/b": torch.ones(2)}],
        "a/b": {0: True},
        "generator": rng.bit_generator.state,
    }
    save(tmp_path / "t", parts, progress)
    loaded = load(tmp_path / "t", parts)
    assert loaded.keys() == progress.keys()
    assert loaded["order"].dtype == np.uint32 and loaded["order"].tolist() == [0, 1, 2, 3, 4]
    assert loaded["loss"] == np.float32(0.25) and isinstance(loaded["loss"], np.float32)
    assert loaded["history"][:2] == [1.5, (2, "x")] and loaded["history"][2]["a/b"].tolist() == [1, 1]
    assert {k: loaded[k] for k in ("step", "best", "note", "a/b", "generator")} == {
        k: progress[k] for k in ("step", "best", "note", "a/b", "generator")
    }


def test_what_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"progress/hooks/1: function"):
        save(tmp_path / "t", make_training(), {"hooks": [1, lambda: None]})
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused_with_all_differences_and_left_alone(tmp_path):
    save(tmp_path / "t", make_training())
    other = nn.ModuleDict({"0": nn.Linear(4, 9), "7": nn.Linear(1, 1)})
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_training(tmp_path / "t", modules={"model": other})
    message = str(caught.value)
    for part in ("missing 7.weight", "unexpected 2.weight", "'0.weight'", "(9, 4)", "(8, 4)", "['adam']", "['data']"):
        assert part in message
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_another_dtype_or_optimizer_is_refused(tmp_path):
    parts = make_training()
    save(tmp_path / "t", parts)
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parts[0].parameters()])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    with pytest.raises(ValueError, match=r"float64.*optimizer adam: expected groups"):
        load(tmp_path / "t", (parts[0].double(), optimizer, scheduler, parts[3]))


def test_kinds_of_checkpoints_are_not_confused(tmp_path):
    save(tmp_path / "t", make_training())
    with pytest.raises(ValueError, match="weightspace-training file, expected a weightspace-checkpoint"):
        load_checkpoint(tmp_path / "t")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_checkpoint(tmp_path / "absent")


def test_a_damaged_training_checkpoint_changes_nothing(tmp_path):
    parts = make_training()
    save(tmp_path / "t", parts)
    flip_bit(tmp_path / "t")
    before = {name: tensor.clone() for name, tensor in parts[0].state_dict().items()}
    with pytest.raises(ValueError, match=r"/t.* (damaged|truncated)"):
        load(tmp_path / "t", parts)
    assert all(torch.equal(before[name], tensor) for name, tensor in parts[0].state_dict().items())


def test_global_generators_are_restored(tmp_path):
    parts = make_training()
    save(tmp_path / "t", parts)
    expected = torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002
    load(tmp_path / "t", parts)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected  # noqa: NPY002
