"""Zoos of networks with varied hyper-parameters."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sane.cli import main
from sane.generation import ZooPlan, ZooWork, fitting_splits, train_zoo
from sane.networks import build_network
from sane.zoo_training import judge, make_optimizer, train_run
from support.reliability import assert_same_files, run, run_killed
from zoo_common.datasets import load_dataset
from zoo_common.zoo import Run, Zoo

PLAN = ZooPlan(
    "MLP",
    epochs=2,
    settings={"optim::lr": (1e-3, 1e-2), "optim::optimizer": ("adam", "sgd"), "training::batchsize": (50, 100)},
    train_images=200,
    test_images=100,
)


def assert_same_runs(a, b):
    """Bitwise, whatever the order of the runs."""
    assert set(a.run_ids) == set(b.run_ids)
    for name in a.run_ids:
        assert torch.equal(a.params[name], b.params[name])


def test_a_zoo_has_its_runs_epochs_metrics_and_hyper_parameters(tmp_path):
    assert train_zoo(PLAN, tmp_path / "zoo", runs=12, progress=False)[:2] == (12, 0)
    zoo = Zoo.open(tmp_path / "zoo")
    assert len(zoo) == 12 and zoo.steps[0].tolist() == [1, 2]
    assert {name for part in ("train", "val", "test") for name in (f"{part}_loss", f"{part}_acc")} == set(zoo.metrics)
    for key, values in PLAN.settings.items():
        assert {r.config[key] for r in zoo.runs} == set(values)
    assert len({r.config["seed"] for r in zoo.runs}) == 12
    assert zoo.metrics["train_acc"].padded()[:, -1].max() > 0.3
    work = ZooWork(PLAN, fitting_splits(PLAN, load_dataset("digits"), torch.device("cpu")), 0)
    network = build_network(work.config(0))
    zoo.layout.load_into(network, zoo.params[0, 1])
    loss, accuracy = judge(network, work.splits.test)
    np.testing.assert_allclose(
        [loss, accuracy], [zoo.metrics[name].gather([0], [1])[0] for name in ("test_loss", "test_acc")], rtol=1e-6
    )


def test_more_runs_and_other_chunks_give_the_same_zoo(tmp_path):
    train_zoo(PLAN, tmp_path / "at once", runs=5, progress=False)
    for runs, chunk in ((2, 1), (3, 5), (5, 2)):
        train_zoo(PLAN, tmp_path / "in parts", runs=runs, chunk=chunk, progress=False)
    a, b = (Zoo.open(tmp_path / name) for name in ("at once", "in parts"))
    assert len(b.shards) > 1
    assert_same_runs(a, b)
    train_zoo(PLAN, tmp_path / "in parts", runs=2, seed=1, progress=False)
    assert len(Zoo.open(tmp_path / "in parts")) == 7


def test_a_run_is_plain_training(tmp_path):
    """The same numbers as a loop written out, and the random state is left alone."""
    splits = fitting_splits(PLAN, load_dataset("digits"), torch.device("cpu"))
    config = ZooWork(PLAN, splits, 0).config(3) | {"optim::scheduler": "OneCycleLR"}
    before = torch.get_rng_state()
    trained = train_run(config, splits, 2, [0, 2], None)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(config["seed"])
    network, batch = build_network(config), config["training::batchsize"]
    first = trained.layout.flatten(network).detach().clone()
    optimizer = make_optimizer(network, config)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config["optim::lr"], total_steps=2 * (200 // batch))
    for _ in range(2):
        for rows in torch.randperm(200).view(-1, batch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(splits.train.images[rows]), splits.train.labels[rows]).backward()
            optimizer.step()
            schedule.step()
    assert torch.equal(trained.vectors[0], first)
    assert torch.equal(trained.vectors[1], trained.layout.flatten(network))


def test_images_are_resized_and_buffers_are_kept(tmp_path):
    plan = ZooPlan("Resnet18", epochs=1, train_images=4, test_images=2, settings={"training::batchsize": (4,)})
    work = ZooWork(plan, fitting_splits(plan, load_dataset("digits"), torch.device("cpu")), 0)
    assert work.splits.train.images.shape == (4, 1, 32, 32)
    trained = work(0)
    assert isinstance(trained, Run) and trained.buffers["bn1.num_batches_tracked"].tolist() == [1]


def test_runs_that_diverge_are_left_out(tmp_path):
    plan = replace(PLAN, settings={"optim::lr": (1e-3, 1e38), "optim::optimizer": ("sgd",)})
    result = train_zoo(plan, tmp_path / "zoo", runs=8, progress=False)
    assert result.dropped > 0 and result.runs == 8 - result.dropped
    assert {r.config["optim::lr"] for r in Zoo.open(tmp_path / "zoo").runs} == {1e-3}


def test_training_starts_from_given_weights(tmp_path):
    state = build_network(
        {"model::type": "MLP", "model::i_dim": 64, "model::h_dim": [32, 32], "model::o_dim": 10}
    ).state_dict()
    torch.save(state, tmp_path / "start.pt")
    plan = replace(PLAN, start=str(tmp_path / "start.pt"), save=(0, 1))
    train_zoo(plan, tmp_path / "zoo", runs=2, progress=False)
    zoo = Zoo.open(tmp_path / "zoo")
    for i in range(2):
        assert torch.equal(zoo.params[i, 0], zoo.layout.flatten(state))
        assert not torch.equal(zoo.params[i, 1], zoo.params[i, 0])


@pytest.mark.slow
def test_a_cluster_trains_the_same_zoo(tmp_path):
    train_zoo(PLAN, tmp_path / "here", runs=4, progress=False)
    train_zoo(PLAN, tmp_path / "there", runs=4, ray=True, progress=False)
    assert_same_runs(Zoo.open(tmp_path / "here"), Zoo.open(tmp_path / "there"))


@pytest.mark.reliability
def test_a_killed_training_goes_on_to_the_same_zoo(tmp_path):
    command = [
        "sane",
        "zoo",
        "train",
        "MLP",
        "zoo",
        "--runs",
        "8",
        "--chunk",
        "2",
        "--epochs",
        "2",
        "--train-images",
        "200",
    ]
    (tmp_path / "killed").mkdir()
    assert run_killed(command, watch=tmp_path / "killed", seed=0, kills=4, cwd=tmp_path / "killed")
    (tmp_path / "whole").mkdir()
    assert run(command, cwd=tmp_path / "whole").returncode == 0
    assert_same_files(tmp_path / "killed", tmp_path / "whole")


def test_the_command_trains_and_inspects(tmp_path, capsys):
    command = ["zoo", "train", "MLP", f"{tmp_path / 'zoo'}", "optim::lr=0.001,0.01", "model::h_dim=16x8", "--runs", "6"]
    assert main([*command, "--epochs", "2", "--train-images", "100", "--save", "0,2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 6
    assert main(["zoo", "inspect", f"{tmp_path / 'zoo'}", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["runs"], about["checkpoints"], sum(about["split"].values())) == (6, 12, 6)
    assert about["weights"] == 64 * 16 + 16 + 16 * 8 + 8 + 8 * 10 + 10
    assert about["varied"]["optim::lr"] == ["0.001", "0.01"]
    assert about["metrics"]["train_loss"][1] < about["metrics"]["train_loss"][0]
    assert main(["zoo", "inspect", f"{tmp_path / 'zoo'}"]) == 0
    assert "6 runs (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ML"], "model::type 'ML' is unknown"),
        (["MLP", "optim::lrr=1"], "unknown hyper-parameter 'optim::lrr'; did you mean 'optim::lr'?"),
        (["MLP", "optim::lr"], "'optim::lr': give hyper-parameters as KEY=VALUE"),
        (["MLP", "optim::lr=fast"], "optim::lr: expected numbers of at least 0, got 'fast'"),
        (["MLP", "optim::lr=-1"], "optim::lr: expected numbers of at least 0, got -1"),
        (["MLP", "optim::optimizer=lamb"], "optim::optimizer 'lamb' is unknown; use one of adam, sgd, rms_prop"),
        (["MLP", "optim::scheduler=cosine"], "optim::scheduler 'cosine' is unknown"),
        (["MLP", "model::nlin=sine"], "model::nlin 'sine' is unknown"),
        (["MLP", "training::batchsize=5000"], "training::batchsize 5000: use 1 to 1000"),
        (["CNN", "model::dropout=0,0.5"], "model::dropout=0.5: the networks of a zoo have one layout"),
        (["MLP", "--save", "2,1"], "save: expected rising epochs from 0 to 10, got [2, 1]"),
        (["MLP", "--save", "1-5"], "--save '1-5': give epochs as 0,1,5,10"),
        (["MLP", "--runs", "0"], "runs (0), chunk (10) and epochs (10) must be at least 1"),
        (["MLP", "--train-images", "0"], "train_images must be at least 1, got 0"),
        (["MLP", "--start", "nowhere.pt"], "nowhere.pt: no such file"),
        (["CNN", "--data", "mnist"], "no data folder given"),
        (["MLP", "--device", "cuda"], "no CUDA device"),
    ],
)
def test_bad_plans_are_refused_in_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["zoo", "train", arguments[0], f"{tmp_path / 'zoo'}", *arguments[1:]]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "zoo").exists()


def test_another_plan_is_refused_and_so_is_a_missing_extra(tmp_path, monkeypatch):
    train_zoo(PLAN, tmp_path / "zoo", runs=1, progress=False)
    with pytest.raises(ValueError, match="is another one"):
        train_zoo(replace(PLAN, epochs=3), tmp_path / "zoo", runs=1, progress=False)
    monkeypatch.setattr("sane.generation.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"sane\[tune\]"):
        train_zoo(PLAN, tmp_path / "other", runs=1, ray=True, progress=False)
    assert not (tmp_path / "other").exists()


def test_an_empty_zoo_is_named(tmp_path, capsys):
    assert main(["zoo", "inspect", f"{tmp_path}"]) == 1
    assert "there is no zoo" in capsys.readouterr().err
