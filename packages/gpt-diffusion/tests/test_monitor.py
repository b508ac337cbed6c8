"""Prompting while training (``vis.freq``): when, what is logged, what is kept, and what it must not change."""

import dataclasses
import json
import signal

import numpy as np
import pytest
import torch
from gpt_diffusion import evaluate, load_pretrained, train
from gpt_diffusion import training as training_module
from gpt_diffusion.distributed import Processes
from gpt_diffusion.evaluation import trajectory_prompts
from gpt_diffusion.monitor import Monitor, Verdict
from gpt_diffusion.training import _prepare_run, forecast
from zoo_common.tasks import get_task
from zoo_common.zoo import Zoo

EPOCHS = ["dataset.target_epoch_size=28", "train.mb_size=8", "train.max_steps=15"]  # 3 steps in each
OFTEN = [*EPOCHS, "vis.freq=2", "vis.recursive_probe=true"]
ALONE = Processes(0, 1, torch.device("cpu"))


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture
def scored(monkeypatch):
    """Make the prompt alignments of a training the given ones."""

    def use(*scores):
        rest, plain = iter(scores), Monitor.judge

        def judge(self, model, progress=None):
            verdict = plain(self, model, progress)
            return Verdict(verdict.scores, verdict.curves, next(rest))

        monkeypatch.setattr(Monitor, "judge", judge)

    return use


def test_a_model_is_prompted_after_the_first_epoch_and_after_every_freq(tiny_config):
    config = tiny_config(*OFTEN)
    run = _prepare_run(config, None, ALONE)
    assert run.per_epoch == 3 and run.monitor.times(15, 3) == 3
    judged = [line for line in log_of(train(config, quiet=True).folder) if "loss" not in line]
    assert [(line["step"], line["epoch"]) for line in judged] == [(3, 1), (6, 2), (12, 4)]
    for line in judged:
        for group in ("training_set", "test_set"):
            assert line.keys() >= {f"prompt_alignment_{group}", f"one_step_{group}", f"recursive_{group}"}


def test_the_scores_are_those_of_eval(tiny_config, digits_zoo):
    config = tiny_config(*EPOCHS, "vis.freq=5", "vis.recursive_probe=true")
    folder = train(config, quiet=True).folder
    line, zoo, task = log_of(folder)[-1], Zoo.open(digits_zoo), get_task("digits_loss")
    for group, split in (("training_set", "train"), ("test_set", "test")):
        starts = zoo.params.gather(zoo.split(split)[:2], np.zeros(2, int))
        expected = evaluate(load_pretrained(folder), task, starts)
        assert line[f"prompt_alignment_{group}"] == pytest.approx(expected.alignment, rel=1e-4)
        assert line[f"one_step_{group}"] == pytest.approx(expected.reached.mean().item(), rel=1e-4)
        assert line[f"recursive_{group}"] == pytest.approx(expected.recursive.observed[:, -1].mean().item(), rel=1e-4)


def test_prompting_changes_nothing_in_the_training(tiny_config):
    often, never = (
        train(tiny_config(f"exp_name=f{freq}", *EPOCHS, f"vis.freq={freq}"), quiet=True).folder for freq in (1, 0)
    )
    assert [line for line in log_of(often) if "loss" in line] == log_of(never)
    a, b = (load_pretrained(folder).model.state_dict() for folder in (often, never))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (never / "best.safetensors").exists()


def test_the_best_model_is_kept(tiny_config, scored, monkeypatch):
    weights, plain = [], training_module.Training.judge

    def judge(self, *arguments):
        weights.append({name: tensor.clone() for name, tensor in self.average.state_dict().items()})
        plain(self, *arguments)

    monkeypatch.setattr(training_module.Training, "judge", judge)
    scored(0.1, 0.7, float("nan"), 0.4, None)
    folder = train(tiny_config(*EPOCHS, "vis.freq=1"), quiet=True).folder
    best = load_pretrained(folder / "best.safetensors").model.state_dict()
    assert all(torch.equal(best[name], weights[1][name]) for name in best)
    assert not any(torch.equal(best[name], weights[2][name]) for name in best if name.endswith("proj.weight"))


def test_a_resumed_training_remembers_the_best_score(tiny_config, scored):
    config = tiny_config(*EPOCHS, "vis.freq=1")
    scored(0.9, 0.8, 0.7, 0.6, 0.5)
    run = _prepare_run(config, None, ALONE)
    config.folder.mkdir(parents=True)
    while run.step < 3:
        run.advance()
    run.judge(config.folder, config.folder / "log", training_module.tqdm(disable=True), lambda: False)
    run.save(config.folder / "state.safetensors")
    again = _prepare_run(config, None, ALONE)
    again.load(config.folder / "state.safetensors")
    assert (again.best, again.judged, again.due) == (0.9, 3, False)


def test_an_interrupted_prompting_is_made_up_for(tiny_config, monkeypatch):
    whole = train(tiny_config("exp_name=whole", *OFTEN), quiet=True)
    config, plain = tiny_config("exp_name=broken", *OFTEN), Monitor.judge

    def judge(self, model, progress):
        signal.raise_signal(signal.SIGINT)
        return plain(self, model, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "judge", judge)
        stopped = train(config, quiet=True)
    assert (stopped.step, stopped.interrupted) == (3, True)
    assert not any("prompt_alignment_test_set" in line for line in log_of(config.folder))
    assert train(config, resume=True, quiet=True).finished
    assert log_of(config.folder) == log_of(whole.folder)
    assert (config.folder / "best.safetensors").exists()


def test_debug_mode_learns_one_run_and_prompts_for_its_own_metrics(tiny_config, digits_zoo):
    config = tiny_config(*OFTEN, "debug_mode=true")
    run, zoo = _prepare_run(config, None, ALONE), Zoo.open(digits_zoo)
    assert run.dataset.runs.tolist() == [zoo.split("train")[0]]
    first = torch.from_numpy(zoo.metrics["val_loss"][int(run.dataset.runs[0])])
    pairs = run.dataset.batch(8, 0)
    assert (pairs.start_metric == first[0]).all() and torch.isin(pairs.target_metric, first[1:]).all()
    (group,) = run.monitor.groups.values()
    assert torch.equal(group.prompts, trajectory_prompts(first[None], 4, True))
    folder = train(config, quiet=True).folder
    line = next(line for line in log_of(folder) if "loss" not in line)
    assert "prompt_alignment_training_set" in line and "prompt_alignment_test_set" not in line
    assert not (folder / "best.safetensors").exists()  # there is nothing unseen


def test_networks_without_a_finite_metric_do_not_end_the_training(tiny_config, monkeypatch):
    config = tiny_config(*OFTEN)
    run = _prepare_run(config, None, ALONE)
    monkeypatch.setattr(run.monitor, "_measure", lambda vectors: torch.full((len(vectors),), torch.nan))
    run.step = 3
    config.folder.mkdir(parents=True)
    run.judge(config.folder, config.folder / "log", training_module.tqdm(disable=True), lambda: False)
    json.loads((config.folder / "log").read_text())
    assert run.judged == 3


def test_without_data_a_model_is_trained_but_not_prompted(tiny_config, monkeypatch, caplog):
    def absent():
        raise FileNotFoundError("the digits are not here")

    task = get_task("digits_loss")
    monkeypatch.setattr(training_module, "get_task", lambda *_: dataclasses.replace(task, data_fn=absent))
    report = train(tiny_config(*OFTEN, "train.behaviour_weight=0"), quiet=True)
    assert report.finished and all("loss" in line for line in log_of(report.folder))
    assert "the model is not prompted while it learns (vis.freq): the digits are not here" in caplog.text


def test_the_forecast_counts_the_prompting(tiny_config):
    found = forecast(tiny_config(*OFTEN), timed_steps=1)
    assert found.seconds > found.prompting_seconds > 0
    assert forecast(tiny_config(*OFTEN, "vis.freq=0"), timed_steps=1).prompting_seconds == 0


def test_the_networks_of_all_processes_come_in_the_order_of_the_runs(tiny_config, digits_zoo):
    """Three processes share five networks; one of them takes one twice, which does not count."""
    zoo, task = Zoo.open(digits_zoo), get_task("digits_loss")
    config = tiny_config("vis.num_nets_per_gpu=4")
    info = _prepare_run(config, None, ALONE).info
    runs = zoo.split("train")[:5]
    groups = [
        Monitor(config, zoo, task, info, {"g": runs}, Processes(r, 3, ALONE.device)).groups["g"] for r in range(3)
    ]
    assert [group.total for group in groups] == [5, 5, 5]
    collected = torch.stack([group.starts for group in groups], dim=1).flatten(0, 1)[:5]
    assert torch.equal(collected, zoo.params.gather(runs, np.zeros(5, int)))
