"""The command line: help, every command on a small zoo, and one line for what does not fit."""

import json
import re
from importlib.metadata import version

import numpy as np
import pytest
import torch
from sane.cli import main
from sane.preparation import open_prepared
from support.autoencoders import CNN, zoo_of_networks
from zoo_common import Zoo
from zoo_common.checkpoint import load_checkpoint, save_checkpoint


def said(capsys, *arguments):
    """What a command prints as JSON."""
    capsys.readouterr()
    status = main([*map(str, arguments), "--json"])
    out = capsys.readouterr()
    assert status == 0, out.err
    return json.loads(out.out)


def error(capsys, *arguments):
    """The one line on stderr of a command that fails."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("arguments", [["--help"], ["zoo", "--help"], ["zoo"]])
def test_help_has_examples(arguments, capsys):
    assert main(arguments) == 0
    assert "sane zoo train digits zoo" in capsys.readouterr().out


def test_help_lists_all_commands(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    names = ["zoo", "preprocess", "align", "pretrain", "diagnose", "embed", "predict", "sample", "finetune"]
    assert [name for name in names if f"• {name} " not in shown] == []


def test_every_option_says_what_it_is(capsys):
    for name in ("preprocess", "align", "pretrain", "diagnose", "embed", "predict", "sample", "finetune"):
        assert main([name, "--help"]) == 0
        assert not re.search(r" --[\w-]+ \S+[\s│]+\(default", capsys.readouterr().out), name


def test_settings_are_shown_as_one_object(capsys):
    assert said(capsys, "pretrain", "small", "--show", "model.window=9")["model"]["window"] == 9


def test_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sane {version('sane')}\n"


@pytest.mark.parametrize("arguments", [["train"], ["--fast"], ["zoo", "make"], ["embed"]])
def test_wrong_usage_is_status_2(arguments):
    assert main(arguments) == 2


def test_a_zoo_is_trained_grows_and_is_inspected(tmp_path, capsys):
    options = ["--epochs", 2, "--chunk", 2, "--train-images", 64, "--test-images", 40]
    options = ["training::batchsize=16", "optim::lr=0.001,0.002,0.003", *options]
    made = said(capsys, "zoo", "train", "digits", tmp_path / "zoo", "--runs", 3, *options)
    assert (made["runs"], made["failed"], made["stopped"]) == (3, 0, None)
    before = Zoo.open(tmp_path / "zoo").params["digits-CNN-s0-000002"].clone()
    assert said(capsys, "zoo", "train", "digits", tmp_path / "zoo", "--runs", 4, *options)["runs"] == 4
    zoo = Zoo.open(tmp_path / "zoo")
    assert torch.equal(zoo.params["digits-CNN-s0-000002"], before)
    assert len({run.config["optim::lr"] for run in zoo.runs}) > 1 and zoo.runs[0].checkpoints == 2
    seen = said(capsys, "zoo", "inspect", tmp_path / "zoo")
    assert seen["runs"] == 4 and seen["properties"]["epoch"]["largest"] == 2
    assert "the zoo" in error(capsys, "zoo", "train", "digits", tmp_path / "zoo", "--runs", 4, *options[:-1], 30)
    line = error(capsys, "zoo", "train", "digits", tmp_path / "b", "--network", "CNN9", "--runs", 1)
    assert "model::type 'CNN9' is unknown; use one of MLP, CNN," in line


def test_the_commands_from_a_zoo_to_samples(workshop, tmp_path, capsys):
    prepared = said(capsys, "preprocess", workshop / "zoo", "-o", tmp_path / "p.safetensors", "--token-size", 40)
    assert sum(prepared["checkpoints"].values()) == 42 and prepared["tokens"] == "78 x 40"
    small, data = workshop / "results" / "small", workshop / "prepared.safetensors"

    found = said(capsys, "embed", small, workshop / "zoo", "-o", tmp_path / "e.safetensors", "--halo", 16, 8)
    stored = load_checkpoint(tmp_path / "e.safetensors")
    assert found["embeddings"] == [42, 4] == list(stored.state["embeddings"].shape)
    assert "approximation" in found["method"] and 0 < found["cosine to full attention"] <= 1

    report = said(capsys, "predict", small, data, "--elsewhere", data, "--resamples", 50)
    names = {(score["property"], score["features"]) for score in report["scores"]}
    assert len(names) == 18 and {("ggap", "spectra"), ("epoch", "embedding by layer")} <= names
    assert all(str(data) in s["elsewhere"] for s in report["scores"] if s["r2"] is not None)

    whole, seen = (said(capsys, "diagnose", small, data, "--num", 3, *o) for o in ([], ["--halo", 78, 0]))
    assert seen["relative_error"] == pytest.approx(whole["relative_error"], rel=1e-4)  # one window is all
    assert len(seen["layers"]) == 5 and 0 <= seen["accuracy_before"] <= 1 and seen["note"] == "none"
    assert (seen["warning"] is None) == (seen["relative_error"] < 0.9)

    new = tmp_path / "new.safetensors"
    sampled = said(
        capsys,
        "sample",
        small,
        data,
        "-o",
        new,
        "--num",
        3,
        "--strategy",
        "subsampled",
        "--draws",
        6,
        "--relative",
        "--anchors",
        4,
        "--train-images",
        128,
        "--judge-images",
        100,
    )
    names = [group["name"] for group in sampled["groups"]]
    assert names == ["sampled", "best anchor", "anchor + noise", "average of anchors", "random initialisation"]
    assert [group["networks"] for group in sampled["groups"]] == [3, 1, 3, 1, 3]
    assert sampled["novelty"]["samples"] > 0 and len(sampled["groups"][0]["finetuned"]) == 1
    assert load_checkpoint(new).state["module_list.0.weight"].shape == (3, 8, 1, 5, 5)
    best = said(capsys, "sample", small, data, "-o", new, "--strategy", "bootstrapped", "--num", 2, "--anchors", 4, "--draws", 4, "--keep", 2, "--iterations", 2, "--no-compare", "--halo", 16, 8)  # fmt: skip
    assert best["networks"] == 2 and len(best["rounds"]) == 2

    tuned = said(capsys, "finetune", new, "--epochs", 1, "--train-images", 64, "-o", tmp_path / "tuned.safetensors")
    stored = load_checkpoint(new)
    save_checkpoint(tmp_path / "nan.safetensors", {k: v * torch.nan for k, v in stored.state.items()}, stored.metadata)
    line = error(capsys, "finetune", tmp_path / "nan.safetensors", "--train-images", 64)
    assert "2 of the 2 networks in" in line and "have weights that are not finite" in line
    each = torch.tensor(tuned.pop("test_acc_each"))  # (epochs + 1, networks)
    assert each.shape == torch.tensor(tuned.pop("validation_acc_each")).shape == (2, 2)
    assert tuned.keys() == {"zero-shot", "after epoch 1", "ensemble"}
    assert each.mean(1)[1].item() == pytest.approx(tuned["after epoch 1"]["test_acc_mean"])
    said(capsys, "finetune", new, "--epochs", 1, "--train-images", 64, "--reset-classifier", 12)
    said(capsys, "align", workshop / "zoo", tmp_path / "aligned")
    assert "not made by this command" in error(capsys, "align", workshop / "zoo", tmp_path / "aligned", "--each")
    aligned, zoo = Zoo.open(tmp_path / "aligned"), Zoo.open(workshop / "zoo")
    assert set(aligned.run_ids) == set(zoo.run_ids)
    run = zoo.run_ids[0]
    assert np.allclose(aligned.params[run].norm(dim=1), zoo.params[run].norm(dim=1))
    assert aligned.metrics["test_acc"][run].tolist() == zoo.metrics["test_acc"][run].tolist()


def test_tables_are_printed_for_people(workshop, capsys):
    small, data = str(workshop / "results" / "small"), str(workshop / "prepared.safetensors")
    assert main(["predict", small, data, "--properties", "test_acc", "config:lr", "config:model::type"]) == 0
    out = capsys.readouterr().out
    assert (
        "score (95 %)" in out and "R2 " in out and "lr is 0.1 for all training checkpoints: nothing to predict" in out
    )
    assert "config:model::type is CNN for all training checkpoints" in out and "nan" not in out
    assert main(["predict", small, data, "--properties", "epoch", "--halo", "16", "8", "--resamples", "5"]) == 0
    assert "an approximation; cosine to full attention: " in capsys.readouterr().out
    assert main(["diagnose", small, data, "--num", "2"]) == 0
    assert "norm ratio" in capsys.readouterr().out


def test_problems_are_one_line_with_a_remedy(workshop, tmp_path, capsys):
    zoo, small, data = workshop / "zoo", workshop / "results" / "small", workshop / "prepared.safetensors"
    cases = {
        "there is no zoo": ["preprocess", tmp_path / "absent"],
        "--token-size must be a number": ["preprocess", zoo, "--token-size", "big"],
        "no training checkpoint": ["preprocess", zoo, "--steps", 99, "-o", tmp_path / "x.safetensors"],
        f"{tmp_path} is a folder": ["preprocess", zoo, "-o", tmp_path],
        "give the one that `sane preprocess` has written": ["predict", small, zoo],
        "there is no file": ["pretrain", "small", f"prepared={tmp_path / 'absent'}"],
        "dropout must be from 0 to below 1, got 1.5": ["pretrain", "small", f"prepared={data}", f"out_dir={tmp_path}", "model.window=12", "model.dropout=1.5", "training.batch=4"],
        "--limit-seconds does not go with --tune": ["pretrain", "small", "--tune", "training.gamma=0,1", "--limit-seconds", 1],
        "does not exist": ["preprocess", zoo, "-o", tmp_path / "a" / "b.safetensors"],
        "there is no model": ["embed", tmp_path, zoo, "-o", tmp_path / "x.safetensors"],
        "halo (9) must be from 0 to below the window (8)": ["embed", small, zoo, "--halo", 8, 9],
        "'val_acc' is not in the zoo": ["predict", small, data, "--properties", "val_acc"],
        "baseline 'spectrum' is unknown": ["predict", small, data, "--baselines", "spectrum"],
        "--anchors (99) is more than the": ["sample", small, data, "--anchors", 99, "-o", tmp_path / "x.safetensors"],
        "--epochs must be at least 0, got -1": ["sample", small, data, "--epochs", -1],
        "--train-images must be at least 1, got 0": ["sample", small, data, "--train-images", 0],
        "--condition must be at least 0": ["sample", small, data, "--condition", -3],
        "--resamples must be at least 1": ["predict", small, data, "--resamples", 0],
        "--num must be at least 1": ["diagnose", small, data, "--num", 0],
        "not enough memory, use smaller sizes": ["pretrain", "small", f"prepared={data}", f"out_dir={tmp_path}", "model.window=12", "model.d_model=1000000000000", "training.batch=4"],
        "--properties is empty": ["predict", small, data, "--properties"],
        "--seed must be at least 0, got -1": ["predict", small, data, "--seed", -1],
        "--lr must not be negative and must be finite, got nan": ["sample", small, data, "--lr", "nan"],
        "4 of the 4 sampled networks have weights that are not finite: use a smaller --bandwidth": ["sample", small, data, "--num", 4, "--anchors", 2, "--bandwidth", 1e38, "--no-compare", "-o", tmp_path / "x.safetensors"],
        f"{data} is what this command reads": ["sample", small, data, "-o", data],
        "zoo.json is what this command reads": ["preprocess", zoo, "-o", zoo / "zoo.json"],
        "model.safetensors is what this command reads": ["embed", small, zoo, "-o", small / "model.safetensors"],
        "--batch must be at least 1": ["finetune", data, "--batch", 0],
        "holds no networks: give a file of `sane sample`": ["finetune", small / "model.safetensors"],
        "is a folder: give a file of `sane sample`": ["finetune", small],
        "is the zoo itself": ["align", zoo, zoo],
        "draws must be at least 10": ["sample", small, data, "--anchors", 2, "--strategy", "subsampled", "--draws", 3, "-o", tmp_path / "x.safetensors"],
        "device must be auto, cpu or cuda": ["pretrain", "small", "device=tpu"],
        "must have the form key=value,value": ["pretrain", "small", "--tune", "training.gamma"],
    }  # fmt: skip
    for words, arguments in cases.items():
        line = error(capsys, *arguments)
        assert words in line or (words.startswith("must have") and "needs Ray Tune" in line), line
    assert not list(tmp_path.iterdir())


def test_a_zoo_prepared_otherwise_than_the_model_is_refused(workshop, tmp_path, capsys):
    other = tmp_path / "p.safetensors"
    said(capsys, "preprocess", workshop / "zoo", "-o", other, "--token-size", 50)
    line = error(capsys, "predict", workshop / "results" / "small", other)
    assert "tokens of 50 scalars" in line and "prepare the zoo with its token_size and ignore_bn" in line
    said(capsys, "preprocess", workshop / "zoo", "-o", other, "--token-size", 40, "--split", "published")
    assert "aligned with another reference" in error(capsys, "predict", workshop / "results" / "small", other)
    prepared = open_prepared(workshop / "prepared.safetensors")
    prepared.samples["test"] = prepared.samples["train"]
    prepared.save(other)
    for command in (["predict"], ["diagnose"], ["sample", "-o", tmp_path / "new.safetensors"]):
        line = error(capsys, command[0], workshop / "results" / "small", other, *command[1:])
        assert "of its test runs took part in training or fitting: use the file that the model was trained on" in line


def test_other_zoos_are_aligned_with_the_reference_of_the_model(workshop, tmp_path, capsys):
    made = zoo_of_networks(tmp_path / "zoo", {**CNN, "dataset::name": "digits"}, runs=12, checkpoints=2, seed=5)
    files = [tmp_path / "last.safetensors", tmp_path / "none.safetensors"]
    for file in files:
        said(capsys, "preprocess", made.path, "-o", file, "--token-size", 40, "--align", file.stem)
    small = [workshop / "results" / "small", workshop / "prepared.safetensors", "--resamples", 5]
    found = said(capsys, "predict", *small, "--elsewhere", *files, "--properties", "test_acc")
    for score in found["scores"]:
        last, none = (score["elsewhere"][str(file)] for file in files)
        assert last[0] is not None and last == pytest.approx(none, rel=1e-3, abs=1e-4)
    own = tmp_path / "own.safetensors"
    said(capsys, "preprocess", workshop / "zoo", "-o", own, "--token-size", 40, "--split", "published")
    assert "of its test runs took part in training or fitting: give another zoo" in error(
        capsys, "predict", *small, "--elsewhere", own
    )
    line = error(capsys, "predict", small[0], files[1])
    assert "is prepared with align=none, the model's zoo with align=last: use the file it was trained on" in line


def test_transfer_to_another_number_of_classes_can_go_on(workshop, tmp_path, capsys):
    new, tuned = tmp_path / "new.safetensors", tmp_path / "tuned.safetensors"
    small, data = workshop / "results" / "small", workshop / "prepared.safetensors"
    options = ["--num", 2, "--anchors", 2, "--choose", "first", "--no-compare"]
    said(capsys, "sample", small, data, "-o", new, *options)
    some = ["--train-images", 64, "--epochs", 2, "--schedule", "onecycle"]
    report = said(capsys, "finetune", new, "--reset-classifier", 12, "-o", tuned, *some)
    again = said(capsys, "finetune", tuned, *some)
    assert again["zero-shot"] == report["after epoch 2"]
    assert "the data have 10 classes, the networks tell 5 apart: use --reset-classifier 10" in error(
        capsys, "finetune", new, "--reset-classifier", 5, *some
    )


def test_missing_images_are_fetched_if_asked_for(tmp_path, monkeypatch, capsys):
    def fetch(source, folder):
        folder.mkdir(parents=True, exist_ok=True)
        images, labels = np.zeros((40, 28, 28), np.uint8), (np.arange(40) % 10).astype(np.uint8)
        parts = {f"{part}_images": images for part in ("train", "test")}
        np.savez(folder / "mnist.npz", **parts, train_labels=labels, test_labels=labels)

    monkeypatch.setattr("zoo_common.datasets._torchvision_download", fetch)
    arguments = ["zoo", "train", "mnist", tmp_path / "zoo", "--runs", 1, "--epochs", 1, "--data-dir", tmp_path / "data"]
    arguments += ["training::batchsize=10"]
    assert "--download" in error(capsys, *arguments)
    assert said(capsys, *arguments, "--download")["runs"] == 1
