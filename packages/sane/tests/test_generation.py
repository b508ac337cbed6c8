"""Zoos of networks with varied hyper-parameters."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sane.cli import main
from sane.generation import ZooPlan, ZooWork, train_zoo
from sane.generation import _on as used
from sane.images import images_of, shaped
from sane.networks import COLOURED, build_network, input_shape
from sane.zoo_training import judge, make_optimizer, train_run
from support.reliability import assert_same_files, run, run_killed
from zoo_common.datasets import Part
from zoo_common.zoo import Run, Zoo

PLAN = ZooPlan(
    "MLP",
    epochs=2,
    settings={"optim::lr": (1e-3, 1e-2), "optim::optimizer": ("adam", "sgd"), "training::batchsize": (50, 100)},
    train_images=200,
    test_images=100,
)


def digits(plan, shape=None):
    """The images of a plan."""
    return used(images_of({"data": "digits"}, None), plan, shape, torch.device("cpu"))


def assert_same_runs(a, b):
    """Bitwise, whatever the order of the runs."""
    assert set(a.run_ids) == set(b.run_ids)
    for name in a.run_ids:
        assert torch.equal(a.params[name], b.params[name])


def test_a_zoo_has_its_runs_epochs_metrics_and_hyper_parameters(tmp_path):
    report = train_zoo(PLAN, tmp_path / "zoo", runs=12)
    assert (report.runs, report.failed, report.stopped) == (12, 0, None)
    zoo = Zoo.open(tmp_path / "zoo")
    assert len(zoo) == 12 and zoo.steps[0].tolist() == [1, 2]
    assert {name for part in ("train", "val", "test") for name in (f"{part}_loss", f"{part}_acc")} == set(zoo.metrics)
    for key, values in PLAN.settings.items():
        assert {r.config[key] for r in zoo.runs} == set(values)
    assert len({r.config["seed"] for r in zoo.runs}) == 12
    losses = zoo.metrics["train_loss"].padded()
    assert (losses[:, 1] < losses[:, 0]).all()
    work = ZooWork(PLAN, digits(PLAN), 0)
    network = build_network(work.config(0))
    zoo.layout.load_into(network, zoo.params[0, 1])
    loss, accuracy = judge(network, work.splits.test)
    np.testing.assert_allclose(
        [loss, accuracy], [zoo.metrics[name].gather([0], [1])[0] for name in ("test_loss", "test_acc")], rtol=1e-6
    )


def test_more_runs_and_other_chunks_give_the_same_zoo(tmp_path):
    train_zoo(PLAN, tmp_path / "at once", runs=5)
    for runs, chunk in ((2, 1), (3, 5), (5, 2)):
        train_zoo(PLAN, tmp_path / "in parts", runs=runs, chunk=chunk)
    a, b = (Zoo.open(tmp_path / name) for name in ("at once", "in parts"))
    assert len(b.shards) > 1
    assert_same_runs(a, b)
    train_zoo(PLAN, tmp_path / "in parts", runs=2, seed=1)
    assert len(Zoo.open(tmp_path / "in parts")) == 7


def test_a_run_is_plain_training(tmp_path):
    """The same numbers as a loop written out, and the random state is left alone."""
    splits = digits(PLAN)
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
    work = ZooWork(plan, digits(plan, (1, 32, 32)), 0)
    assert work.splits.train.images.shape == (4, 1, 32, 32)
    trained = work(0)
    assert isinstance(trained, Run) and trained.buffers["bn1.num_batches_tracked"].tolist() == [1]


def test_runs_that_diverge_are_left_out(tmp_path):
    plan = replace(PLAN, settings={"optim::lr": (1e-3, 1e38), "optim::optimizer": ("sgd",)})
    result = train_zoo(plan, tmp_path / "zoo", runs=8)
    assert result.failed > 0 and result.runs == 8 - result.failed
    assert {r.config["optim::lr"] for r in Zoo.open(tmp_path / "zoo").runs} == {1e-3}


def test_training_starts_from_given_weights(tmp_path):
    state = build_network(
        {"model::type": "MLP", "model::i_dim": 64, "model::h_dim": [10], "model::o_dim": 10}
    ).state_dict()
    torch.save(state, tmp_path / "start.pt")
    torch.save({"other": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt does not fit .*Missing key"):
        train_zoo(replace(PLAN, start=str(tmp_path / "other.pt")), tmp_path / "zoo", runs=1)
    save_file(state, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-9])
    torch.save({name: tensor * torch.nan for name, tensor in state.items()}, tmp_path / "nan.pt")
    for name, words in {"cut.safetensors": "is damaged, or no safetensors file", "nan.pt": "are not finite"}.items():
        with pytest.raises(ValueError, match=rf"{name} .*{words}"):
            train_zoo(replace(PLAN, start=str(tmp_path / name)), tmp_path / "zoo", runs=1)
    assert not (tmp_path / "zoo").exists()
    plan = replace(PLAN, start=str(tmp_path / "start.pt"), save=(0, 1))
    train_zoo(plan, tmp_path / "zoo", runs=2)
    zoo = Zoo.open(tmp_path / "zoo")
    for i in range(2):
        assert torch.equal(zoo.params[i, 0], zoo.layout.flatten(state))
        assert not torch.equal(zoo.params[i, 1], zoo.params[i, 0])


@pytest.mark.slow
def test_a_cluster_trains_the_same_zoo(tmp_path):
    train_zoo(PLAN, tmp_path / "here", runs=4)
    train_zoo(PLAN, tmp_path / "there", runs=4, ray=True)
    assert_same_runs(Zoo.open(tmp_path / "here"), Zoo.open(tmp_path / "there"))


@pytest.mark.reliability
def test_a_killed_training_goes_on_to_the_same_zoo(tmp_path):
    command = ["sane", "zoo", "train", "digits", "zoo", "--network", "MLP", "--runs", "8", "--chunk", "2"]
    command += ["--epochs", "2", "--train-images", "200"]
    (tmp_path / "killed").mkdir()
    assert run_killed(command, watch=tmp_path / "killed", seed=0, kills=4, cwd=tmp_path / "killed")
    (tmp_path / "whole").mkdir()
    assert run(command, cwd=tmp_path / "whole").returncode == 0
    assert_same_files(tmp_path / "killed", tmp_path / "whole")


def test_the_command_trains_and_inspects(tmp_path, capsys):
    command = [
        "zoo",
        "train",
        "digits",
        f"{tmp_path / 'zoo'}",
        "--network",
        "MLP",
        "optim::lr=0.001,0.01",
        "model::h_dim=16x8",
        "--runs",
        "6",
    ]
    assert main([*command, "--epochs", "2", "--train-images", "100", "--save", "0,2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 6
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.layout.size == 64 * 16 + 16 + 16 * 8 + 8 + 8 * 10 + 10 and zoo.steps[0].tolist() == [0, 2]
    assert {run.config["optim::lr"] for run in zoo.runs} == {0.001, 0.01}


def test_ctrl_c_and_the_time_limit_keep_what_is_done(tmp_path):
    report = train_zoo(PLAN, tmp_path / "zoo", runs=8, limit_seconds=0)
    assert (report.runs, report.stopped) == (1, "time limit")
    assert train_zoo(PLAN, tmp_path / "zoo", runs=8).runs == 8
    train_zoo(PLAN, tmp_path / "whole", runs=8)
    assert_same_runs(Zoo.open(tmp_path / "zoo"), Zoo.open(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ML"], "model::type 'ML' is unknown"),
        (["MLP", "optim::lrr=1"], "unknown hyper-parameter 'optim::lrr'; did you mean 'optim::lr'?"),
        (["MLP", "optim::lr"], "'optim::lr': give hyper-parameters as KEY=VALUE"),
        (["MLP", "optim::lr=fast"], "optim::lr: expected numbers of at least 0, got 'fast'"),
        (["MLP", "optim::lr=true"], "optim::lr: expected numbers of at least 0, got True"),
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
        (["MLP", "--start", "nowhere.pt"], "nowhere.pt"),
        (["MLP", "--split", "nan", "nan", "nan"], "split must be three fractions that sum to 1"),
        (["CNN", "mnist"], "no data folder given"),
        (["MLP", "--device", "cuda"], "no CUDA device"),
    ],
)
def test_bad_plans_are_refused_in_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    network, *rest = arguments
    data = rest.pop() if "mnist" in rest else "digits"
    assert main(["zoo", "train", data, f"{tmp_path / 'zoo'}", "--network", network, *rest]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "zoo").exists()


def test_another_plan_is_refused_and_so_is_a_missing_extra(tmp_path, monkeypatch):
    train_zoo(PLAN, tmp_path / "zoo", runs=1)
    with pytest.raises(ValueError, match="is another one"):
        train_zoo(replace(PLAN, epochs=3), tmp_path / "zoo", runs=1)
    monkeypatch.setattr("sane.generation.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"sane\[tune\]"):
        train_zoo(PLAN, tmp_path / "other", runs=1, ray=True)
    assert not (tmp_path / "other").exists()


def test_hidden_layers_are_a_number_or_a_list():
    config = {"model::type": "MLP", "model::i_dim": 4, "model::o_dim": 2, "model::nlin": "tanh"}
    one, listed = (build_network({**config, "model::h_dim": hidden}).state_dict() for hidden in (5, [5]))
    assert [t.shape for t in one.values()] == [t.shape for t in listed.values()]
    with pytest.raises(ValueError, match="model::h_dim must be a number of units, or a list of them"):
        build_network({**config, "model::h_dim": "large"})


@pytest.mark.parametrize("kind", COLOURED)
def test_grey_images_fit_networks_that_take_three_channels(kind):
    part = shaped(Part(torch.rand(2, 1, 8, 8), torch.zeros(2)), input_shape({"model::type": kind}))
    assert torch.equal(part.images[:, 0], part.images[:, 2])
    with torch.device("meta"):
        network = build_network({"model::type": kind, "model::o_dim": 3})
    assert network.eval()(part.images.to("meta")).shape == (2, 3)


def test_a_zoo_of_coloured_networks_uses_grey_data(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("sane.generation.ZooWork.check", lambda work: seen.append(work.splits.train.images.shape))
    monkeypatch.setattr("sane.generation._missing", lambda *_: [])
    train_zoo(ZooPlan("densenet121", train_images=4, test_images=3), tmp_path / "zoo", runs=1)
    assert seen == [(4, 3, 32, 32)]
