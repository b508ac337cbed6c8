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

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = tiny_config("logger=wandb", "wandb.project=mine", "train.behaviour_weight=0")
    folder = train(config, quiet=True).folder
    assert [name for name, _ in calls] == ["init", "log", "log", "log", "log", "finish"]
    options = calls[0][1]
    assert (options["name"], options["project"], options["mode"]) == ("digits_loss", "mine", "offline")
    assert options["config"]["train"]["mb_size"] == 8
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [logged for name, logged in calls if name == "log"] == lines
