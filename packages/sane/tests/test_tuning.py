"""A grid of pretrainings on Ray Tune."""

import json

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


def test_values_that_do_not_fit_are_named_before_anything_runs(workshop, tmp_path, capsys):
    arguments = ["pretrain", "small", f"out_dir={tmp_path}", "--tune", "training.gamma=0.05,much"]
    assert main(arguments) == 1
    assert "training.gamma: expected float, got 'much'" in capsys.readouterr().err


def test_a_grid_does_not_go_into_the_folder_of_a_training(workshop, capsys):
    assert main(["pretrain", "small", f"out_dir={workshop}/results", "--tune", "training.gamma=0.05,0.5"]) == 1
    assert "holds a single training: give another name" in capsys.readouterr().err
    assert not (workshop / "results" / "small" / "common.yaml").exists()
