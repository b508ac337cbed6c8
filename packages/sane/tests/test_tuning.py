"""A grid of pretrainings on Ray Tune."""

import json
import re

import pytest
from sane.cli import main
from support.autoencoders import SIZES, TRAINING


@pytest.mark.slow
def test_a_grid_trains_every_combination(workshop, tmp_path, capsys):
    common = [f"prepared={workshop}/prepared.safetensors", f"out_dir={tmp_path}", *SIZES, *TRAINING]
    assert main(["pretrain", "small", *common, "--tune", "training.gamma=0.05,0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["trials"]) == {"gamma-0.05", "gamma-0.5"} and found["failed"] == 0
    assert found["best"] in found["trials"]
    assert all((tmp_path / "small" / name / "model.safetensors").exists() for name in found["trials"])
    assert main(["pretrain", "small", *common, "training.epochs=3", "--tune", "training.gamma=0.05,0.5"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match("sane: every trial has failed, the first one with: ValueError: .* differs from the conf", error)


@pytest.mark.slow
def test_lists_and_files_can_be_tried(workshop, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(workshop)
    common = [f"out_dir={tmp_path}", *SIZES, *TRAINING, "training.epochs=1"]
    choices = ["--tune", "prepared=prepared.safetensors", "training.noise=[0.1,0],[0.2,0.2]"]
    assert main(["pretrain", "small", *common, *choices, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["training.noise"] for row in found["trials"].values()] == [[0.1, 0], [0.2, 0.2]]


def test_values_that_do_not_fit_are_named_before_anything_runs(workshop, tmp_path, capsys):
    arguments = ["pretrain", "small", f"out_dir={tmp_path}", "--tune", "training.gamma=0.05,much"]
    assert main(arguments) == 1
    assert "training.gamma: expected float, got 'much'" in capsys.readouterr().err
    assert main([*arguments[:-1], "training.noise=[0.1"]) == 1
    assert "is no YAML value: close its brackets" in capsys.readouterr().err


def test_a_grid_does_not_go_into_the_folder_of_a_training(workshop, capsys):
    assert main(["pretrain", "small", f"out_dir={workshop}/results", "--tune", "training.gamma=0.05,0.5"]) == 1
    assert "holds a single training: give another name" in capsys.readouterr().err
    assert not (workshop / "results" / "small" / "common.yaml").exists()
