"""The optional logger, with a stand-in for Weights & Biases."""

import json
import sys
from types import SimpleNamespace

from gpt_diffusion import train


def test_wandb_gets_the_lines_of_the_log(tiny_config, monkeypatch):
    calls = []

    def init(**options):
        calls.append(("init", options))
        log = lambda values, step: calls.append(("log", values | {"step": step}))
        return SimpleNamespace(log=log, finish=lambda: calls.append(("finish", None)))

    def line_series(**chart):
        return chart

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "wandb.plot", SimpleNamespace(line_series=line_series))
    prompting = ["dataset.target_epoch_size=28", "vis.freq=2", "train.max_steps=3"]  # one epoch
    config = tiny_config("logger=wandb", "wandb.project=mine", "train.behaviour_weight=0", *prompting)
    folder = train(config, quiet=True).folder
    assert [name for name, _ in calls] == ["init", "log", "log", "log", "finish"]
    options = calls[0][1]
    assert (options["name"], options["project"], options["mode"]) == ("digits_loss", "mine", "offline")
    assert options["config"]["train"]["mb_size"] == 8
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [logged for name, logged in calls if name == "log"][:2] == lines
    charts = calls[3][1]
    assert charts["step"] == 3 and charts["dvo_test_set_test_set"]["keys"][0] == "optimal"
    assert len(charts["dvo_training_set_training_set"]["xs"]) == 4
