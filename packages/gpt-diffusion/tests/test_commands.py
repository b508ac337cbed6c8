"""The command line: results, one-line errors, nothing left behind."""

import dataclasses
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from gpt_diffusion import load_pretrained, train
from gpt_diffusion.cli import main, overrides_first
from gpt_diffusion.curves import read_curves
from gpt_diffusion.evaluation import batched_metric, mean_and_band
from gpt_diffusion.prompting import spread_losses
from safetensors.torch import load_file, save_file
from support.reliability import assert_same_tensors, flip_bit, truncate
from torch import nn
from zoo_common.tasks import Task, get_task
from zoo_common.zoo import Zoo


@pytest.fixture(scope="module")
def trained(digits_zoo, tmp_path_factory):
    """Folder of a run of a few steps."""
    from gpt_diffusion import load_config

    folder = tmp_path_factory.mktemp("runs")
    small = ["dataset.target_epoch_size=64", "transformer.n_embd=16", "transformer.n_layer=1", "transformer.n_head=2"]
    small += ["train.max_steps=4", "train.mb_size=8", "sampling.steps=3", "vis.num_nets_per_gpu=2", "vis.dvo_steps=3"]
    config = load_config("digits_loss", [f"dataset.path={digits_zoo}", f"out_dir={folder}", *small])
    return train(config, quiet=True).folder


def call(capsys, *arguments):
    """Status, stdout and stderr of the command."""
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def result_of(capsys, *arguments):
    """The JSON object that a successful command prints."""
    status, out, err = call(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out.splitlines()[-1])


def error_of(capsys, *arguments):
    """The single line that a refused command prints."""
    status, out, err = call(capsys, *arguments)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.mb_sise=3"], "unknown configuration key 'train.mb_sise'; did you mean 'train.mb_size'"),
        (["train.lr_sch=step"], "train.lr_sch: expected one of cos, fixed, got 'step'"),
        (["train.mb_size=many"], "train.mb_size: expected int, got 'many'"),
        (["dataset.name=mnist_loss"], "the zoo holds fc1.weight (10, 64), "),
        (["dataset.name=digit_los"], "unknown task 'digit_los'; did you mean 'digits_loss'"),
        (["dataset.train_metric=avg_test_err2"], "no metric 'avg_test_err2'; the zoo has "),
        (["dataset.path=nowhere"], "nowhere"),
        (["resume_path=other.txt"], "resume_path: other.txt is neither a .pt file nor a released model"),
        (["logger=wandb"], "pip install 'gpt-diffusion[wandb]'"),
    ],
)
def test_a_training_that_cannot_begin_is_one_line(settings, message, capsys, digits_zoo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    options = [f"dataset.path={digits_zoo}", f"out_dir={tmp_path / 'results'}", "train.behaviour_weight=0", *settings]
    assert message in error_of(capsys, "train", "digits_loss", *options)
    assert not (tmp_path / "results").exists()


def test_changes_of_a_resumed_training_and_a_full_disk_are_one_line(trained, capsys, monkeypatch, tmp_path):
    config = trained / "config.yaml"
    message = error_of(capsys, "train", config, "train.wd=0.5", "sampling.steps=4", "--resume")
    assert (
        "config.yaml differs from the configuration given: train.wd (0.01 there, 0.5 given), sampling.steps (3"
        in message
    )
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = error_of(capsys, "train", config, f"out_dir={tmp_path / 'new'}")
    assert "has 0.00 GB left, the training needs 0.00 GB: make room" in message
    assert not (tmp_path / "new" / "digits_loss" / "state.safetensors").exists()


def test_generate_then_train_then_sample(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = result_of(capsys, "generate", "digits", "zoo", "--runs", 20, "--steps", 10, "--strategy", "stacked")
    assert made["runs"] == 20
    small = ["train.max_steps=2", "dataset.target_epoch_size=64", "train.mb_size=4", "transformer.n_embd=8"]
    assert result_of(capsys, "train", "digits_loss", *small)["finished"]
    sampled = result_of(capsys, "sample", "results/digits_loss", "--prompt", "2.2", "-o", "new.safetensors")
    assert sampled["networks"] == 1
    net = get_task("digits_loss").constructor()
    net.load_state_dict(load_file("new.safetensors"))


def test_sample_starts_from_given_weights_and_measures_them(capsys, trained, tmp_path):
    task = get_task("digits_loss")
    torch.manual_seed(3)
    net = task.constructor()
    save_file(net.state_dict(), tmp_path / "mine.safetensors")
    out = tmp_path / "out.safetensors"
    result = result_of(capsys, "sample", trained, "--start", tmp_path / "mine.safetensors", "--prompt", 1.0, "-o", out)
    assert result["start"] == pytest.approx(task.test_fn(*task.data_fn(), net), rel=1e-5)
    net.load_state_dict(load_file(out))
    assert result["reached"] == pytest.approx(task.test_fn(*task.data_fn(), net), rel=1e-5)


def test_several_samples_are_stacked_and_repeatable(capsys, trained, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        options = ["--prompt", 1.0, "--num", 3, "--recursive", 2, "--seed", 5, "-o", file]
        assert result_of(capsys, "sample", trained, *options)["networks"] == 3
    a, b = map(load_file, files)
    assert a["fc1.weight"].shape == (3, 10, 64)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["fc1.weight"][0], a["fc1.weight"][1])
    further, options = tmp_path / "further.safetensors", ["--start", files[0], "--prompt", 1.0]
    assert result_of(capsys, "sample", trained, *options, "-o", further)["networks"] == 3
    for name, tensor in load_file(further).items():
        assert tensor.shape == a[name].shape and not torch.equal(tensor, a[name])
    walk = ["walk", trained, "--start", files[0], "-o", tmp_path / "walk.gif"]
    assert "holds 3 networks; a walk begins at one" in error_of(capsys, *walk)


def test_copies_are_looked_for_among_the_runs_that_the_training_saw(capsys, tiny_config, digits_zoo, tmp_path):
    """With ``dataset.split=published`` these are the first ones, whatever the zoo's own split is."""
    config = tiny_config("dataset.split=published", "dataset.num_test_runs=4", "train.max_steps=1")
    folder, zoo = train(config, quiet=True).folder, Zoo.open(digits_zoo)
    unseen = set(zoo.split("test")) | set(zoo.split("validation"))
    run = min(unseen)
    assert run < len(zoo) - 4, "trained on, though the zoo's split says otherwise"
    save_file(zoo.weights(int(run), -1), tmp_path / "copy.safetensors")
    report = result_of(capsys, "novelty", folder, "--samples", tmp_path / "copy.safetensors")
    assert report["training_runs"] == len(zoo) - 4
    assert (report["samples"][0]["verdict"], report["samples"][0]["run"]) == ("copy", zoo.run_ids[run])
    published = Path(__file__).parent / "golden" / "checkpoint_datasets" / "mnist"
    assert "make a zoo of them with `gpt-diffusion import`" in error_of(capsys, "novelty", folder, "--zoo", published)


def test_tasks_are_listed_and_one_that_cannot_be_loaded_is_named(capsys, monkeypatch):
    from gpt_diffusion import commands

    def look_up(name):
        if name == "broken":
            raise ValueError("the entry point is broken")
        return get_task(name)

    monkeypatch.setattr(commands, "task_names", lambda: ["digits_loss", "cartpole", "broken"])
    monkeypatch.setattr(commands, "get_task", look_up)
    shown = result_of(capsys, "tasks")
    assert shown["digits_loss"]["metric"] == "val_loss" and shown["digits_loss"]["weights"] == 760
    assert (shown["cartpole"]["goal"], shown["cartpole"]["best_prompt"]) == ("high", 500.0)
    assert shown["broken"] == {"error": "the entry point is broken"}
    status, out, _ = call(capsys, "tasks")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == list(shown)


def test_eval_prints_alignment_of_both_groups(capsys, trained, tmp_path):
    curves = tmp_path / "curves.json"
    result = result_of(capsys, "eval", trained, "--out", curves)
    for group in ("training_set", "test_set"):
        assert result[group]["networks"] == 2
        assert result[group]["prompt_alignment"] <= 1
        stored = json.loads(curves.read_text())[group]
        assert stored["prompt_alignment"] == result[group]["prompt_alignment"]
        assert len(stored["one_step"]["observed"][0]) == 1 + 3
    again = result_of(capsys, "eval", trained, "--out", curves)
    assert again == result


def test_eval_writes_curves_and_figures_into_the_run_folder(capsys, trained, digits_zoo):
    result = result_of(capsys, "eval", trained)
    assert Path(result["curves"]) == trained / "eval.json"
    assert [Path(file).name for file in result["figures"]] == ["eval-dvo.png", "eval-recursive.png"]
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in result["figures"])
    stored = json.loads((trained / "eval.json").read_text())
    zoo = Zoo.open(digits_zoo)
    for group, split in (("training_set", "train"), ("test_set", "test")):
        one_step = stored[group]["one_step"]
        dvo = stored["figures"][f"dvo_{group}_{group}"]
        assert dvo["key"] == ["optimal", f"dnn_{group}_0", f"dnn_{group}_1", "identity"]
        best = zoo.metrics["val_loss"].padded()[zoo.split(split)].min()
        largest = max(map(max, one_step["desired"]))
        assert (dvo["x"][0], dvo["y"][0]) == ([0, largest], [pytest.approx(best)] * 2)
        assert (dvo["x"][2], dvo["y"][2]) == (one_step["desired"][1], one_step["observed"][1][1:])
        assert dvo["x"][3] == dvo["y"][3] == [0, largest]
        recursive = stored["figures"][f"recursive_{group}_zero"]
        assert recursive["key"] == [f"dnn_{group}_0", f"dnn_{group}_1", "optimal"]
        assert (recursive["x"][0], recursive["x"][2]) == ([0, 1, 2], [0, 3])
        assert recursive["y"][1] == stored[group]["recursive"]["observed"][1]
    assert result["novelty"]["counts"].keys() == {"copy", "near copy", "new"}
    assert "novelty" not in result_of(capsys, "eval", trained, "--no-novelty")


def test_bands_are_t_intervals():
    values = torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    mean, band = mean_and_band(values)
    assert mean.tolist() == pytest.approx([7 / 3, 5])
    assert band.tolist() == pytest.approx([4.302653 * (7 / 3 / 3) ** 0.5, 0])
    assert mean_and_band(values[:1])[1].tolist() == [0, 0]


def test_eval_takes_prompts_from_the_trajectories(capsys, trained, digits_zoo, tmp_path):
    out = tmp_path / "curves.json"
    result_of(capsys, "eval", trained, "--prompts", "trajectory", "--out", out, "--no-novelty", "--figures", "no")
    assert list(tmp_path.iterdir()) == [out]
    zoo = Zoo.open(digits_zoo)
    for group, split in (("training_set", "train"), ("test_set", "test")):
        losses = torch.from_numpy(zoo.metrics["val_loss"].padded()[zoo.split(split)[:2]])
        wanted = spread_losses(losses, 3, True)
        torch.testing.assert_close(
            torch.tensor(json.loads(out.read_text())[group]["one_step"]["desired"]), wanted.float()
        )


def test_figures_are_an_extra(capsys, monkeypatch, trained, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "curves.json"
    assert "pip install 'gpt-diffusion[plot]'" in error_of(capsys, "eval", trained, "--figures", "yes", "--out", out)
    assert not list(tmp_path.iterdir())
    result = result_of(capsys, "eval", trained, "--out", out, "--no-novelty")
    assert "matplotlib is missing" in result["figures"]
    assert list(tmp_path.iterdir()) == [out]


def test_eval_against_optimizers(capsys, trained, tmp_path):
    out = tmp_path / "curves.json"
    options = ["--against", "sgd,adam", "--against-steps", 60, "--out", out, "--no-novelty"]
    result = result_of(capsys, "eval", trained, *options)
    assert (tmp_path / "curves-against.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads(out.read_text())
    for name in ("sgd", "adam"):
        rival = stored["against"][name]
        assert rival["limit"] == 60 and len(rival["needed"]) == 2
        assert rival["mean"][0] == pytest.approx(stored["test_set"]["start_metric"], rel=1e-5)
        assert rival["mean"][-1] < rival["mean"][0]
        assert "never reach it" in result["against"][name]["words"]
    assert "'lion' is unknown; choose from sgd, adam" in error_of(capsys, "eval", trained, "--against", "sgd,lion")
    assert "--against-steps must be" in error_of(capsys, "eval", trained, *options[:3], 0)


def test_eval_writes_and_reads_the_published_figure_files(capsys, trained, tmp_path):
    files, out = tmp_path / "figure_files", tmp_path / "curves.json"
    options = ["--out", out, "--no-novelty", "--against", "sgd", "--against-steps", 8]
    result = result_of(capsys, "eval", trained, "--curve-files", files, "--figures", "no", *options)
    assert sorted(map(str, files.iterdir())) == sorted(result["curve_files"])
    stored = json.loads(out.read_text())["figures"]
    for name, curves in stored.items():
        assert torch.load(files / f"{name}.pt", weights_only=True) == curves == read_curves(files / f"{name}.pt")
    line = stored["recursive_test_set_zero"]
    rival = json.loads(out.read_text())["against"]["sgd"]
    assert (line["key"][-1], line["x"][-1], line["y"][-1]) == ("gradient-based", [0, 1, 2], rival["mean"][:3])
    assert "gradient-based" not in stored["recursive_training_set_zero"]["key"]
    plain, both = tmp_path / "curves-dvo.png", tmp_path / "beside-dvo.png"
    result_of(capsys, "eval", trained, *options[:3])
    result_of(capsys, "eval", trained, "--beside", files, "--out", tmp_path / "beside.json", "--no-novelty")
    assert plain.read_bytes() != both.read_bytes()
    assert "there is none of dvo_training_set" in error_of(capsys, "eval", trained, "--beside", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no published figure file"),
        ({"x": [[1.0]], "y": [[1.0]]}, "no published figure file"),
        ({"x": [[1.0, 2.0]], "y": [[1.0]], "key": ["a"]}, "no published figure file"),
        ({"x": [1.0], "y": [1.0], "key": ["a"]}, "no published figure file"),
        ({"x": [[1.0], []], "y": [[1.0], []], "key": ["dnn_a_0", "dnn_a_1"]}, "different numbers of points"),
    ],
)
def test_other_files_are_no_figure_files(content, message, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"a.pt.*{message}"):
        read_curves(tmp_path / "a.pt")


def test_lines_of_tensors_and_arrays_are_read(tmp_path):
    lines = {"x": [torch.arange(2), np.arange(2)], "y": torch.ones(2, 2), "key": ["optimal", "dnn_test_set_0"]}
    torch.save(lines, tmp_path / "a.pt")
    assert read_curves(tmp_path / "a.pt") == {"x": [[0, 1]] * 2, "y": [[1, 1]] * 2, "key": lines["key"]}


def test_sample_says_whether_the_samples_are_new(capsys, trained, digits_zoo, tmp_path):
    out = tmp_path / "out.safetensors"
    result = result_of(capsys, "sample", trained, "--prompt", 1.0, "--num", 3, "-o", out)
    assert sum(result["novelty"]["counts"].values()) == 3
    assert "novelty" not in result_of(capsys, "sample", trained, "--prompt", 1.0, "-o", out, "--no-novelty")
    report = result_of(capsys, "novelty", trained, "--num", 3, "--prompt", 1.0)
    assert report["counts"] == result["novelty"]["counts"]
    assert [s["metric"] for s in report["samples"]] == pytest.approx(load_metadata(out, 3, capsys, trained))
    status, text, _ = call(capsys, "novelty", trained, "--samples", out)
    assert status == 0 and "1 networks" in text


def load_metadata(out, num, capsys, trained):
    """Metrics that sample has noted in its file."""
    from zoo_common.checkpoint import load_checkpoint

    other = out.with_name("three.safetensors")
    call(capsys, "sample", trained, "--prompt", 1.0, "--num", num, "-o", other, "--no-novelty")
    return load_checkpoint(other).metadata["observed"]


def test_samples_without_the_training_zoo_are_not_judged(capsys, trained, tmp_path):
    model = load_pretrained(trained)
    dataset = dataclasses.replace(model.config.dataset, path=str(tmp_path / "gone"))
    moved = dataclasses.replace(model, config=dataclasses.replace(model.config, dataset=dataset))
    moved.save(tmp_path / "model.safetensors")
    out = tmp_path / "out.safetensors"
    result = result_of(capsys, "sample", tmp_path / "model.safetensors", "--prompt", 1.0, "-o", out)
    assert out.exists()
    assert "not checked: there is no zoo in" in result["novelty"]["verdict"]
    assert "there is no zoo in" in error_of(capsys, "novelty", tmp_path / "model.safetensors")


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_walk_films_the_hidden_units(capsys, trained, tmp_path, suffix):
    out = tmp_path / f"walk{suffix}"
    shown = result_of(capsys, "walk", trained, "-o", out, "--latents", "2", "--points", "3", "--scale", "4")
    assert shown["networks"] == 6
    assert out.stat().st_size > 100 and (tmp_path / "walk.png").read_bytes().startswith(b"\x89PNG")
    assert "--latents (1)" in error_of(capsys, "walk", trained, "-o", out, "--latents", "1")
    assert "walk.avi: a walk is written as" in error_of(capsys, "walk", trained, "-o", tmp_path / "walk.avi")


def test_train_shows_all_keys_and_forecasts_without_writing(capsys, digits_zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(capsys, "train", "digits_loss", "--show", "train.mb_size=7")
    assert status == 0
    assert "mb_size: 7" in out
    path = f"dataset.path={digits_zoo}"
    forecast = result_of(capsys, "train", "digits_loss", "--dry-run", path, "transformer.n_embd=8")
    assert forecast["steps"] == 1500
    assert not list(tmp_path.iterdir())


def test_unknown_things_are_named_with_the_nearest(capsys, tmp_path):
    assert "did you mean 'digits_loss'" in error_of(capsys, "train", "digit_loss")
    assert "did you mean 'digits'" in error_of(capsys, "generate", "digit", tmp_path / "zoo")
    assert "there is no zoo in nowhere" in error_of(capsys, "train", "digits_loss", "dataset.path=nowhere")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--runs", "0"], ["runs", "at least 1", "got 0"]),
        (["--save-count", "0"], ["save_count", "got 0"]),
        (["--share-batches", "0"], ["share_batches", "got 0"]),
    ],
)
def test_zero_counts_are_named(capsys, tmp_path, arguments, parts):
    error = error_of(capsys, "generate", "digits", tmp_path / "zoo", *arguments)
    assert all(part in error for part in parts)
    assert not (tmp_path / "zoo").exists()


def test_a_prompt_beyond_the_training_runs_is_sampled_with_a_warning(capsys, trained, tmp_path):
    info = load_pretrained(trained).info
    known = (info.best_metric + info.worst_metric) / 2
    commands = {
        "sample": ["-o", tmp_path / "a.safetensors", "--no-novelty"],
        "walk": ["-o", tmp_path / "a.gif", "--latents", 2, "--points", 2],
        "novelty": ["--num", 2],
    }
    for command, options in commands.items():
        status, _, err = call(capsys, command, trained, "--prompt", 50, *options, "--json")
        assert status == 0 and err.count("\n") == 1
        seen = f"val_loss from {info.best_metric:.4g} to {info.worst_metric:.4g}"
        assert f"warning: the prompt 50 is outside of what the model has seen: {seen}" in err
        result_of(capsys, command, trained, "--prompt", known, *options)
        assert "--prompt must be a finite number, got nan" in error_of(
            capsys, command, trained, "--prompt", "nan", *options
        )


def test_bad_files_are_named_and_nothing_is_written(capsys, trained, tmp_path):
    out = tmp_path / "out.safetensors"
    options = ["--prompt", 1.0, "-o", out]
    start = tmp_path / "start.safetensors"

    def refused(*arguments):
        error = error_of(capsys, "sample", *arguments, *options)
        assert not out.exists()
        return error

    assert "no such file" in refused(trained, "--start", tmp_path / "absent.safetensors")
    save_file({"weight": torch.zeros(2, 2)}, start)
    assert "missing fc1.weight" in refused(trained, "--start", start)
    state = get_task("digits_loss").constructor().state_dict()
    save_file(state | {"fc1.weight": torch.zeros(10, 63)}, start)
    assert "'fc1.weight': expected (10, 64), got (10, 63)" in refused(trained, "--start", start)
    save_file(state | {"fc1.weight": torch.full((10, 64), torch.nan)}, start)
    assert "NaN" in refused(trained, "--start", start)
    truncate(start)
    assert "not a readable safetensors file" in refused(trained, "--start", start)
    assert "absent" in refused(tmp_path / "absent")
    assert "--start-metric must be a finite number, got nan" in refused(trained, "--start-metric", "nan")
    assert "is not a" in refused(start_of_a_checkpoint(tmp_path, state))


def start_of_a_checkpoint(tmp_path, state):
    from zoo_common.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "weights.safetensors", state)
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("damage", [truncate, flip_bit])
def test_a_damaged_model_is_named(capsys, trained, tmp_path, damage):
    copy = tmp_path / "model.safetensors"
    copy.write_bytes((trained / "model.safetensors").read_bytes())
    damage(copy)
    error = error_of(capsys, "sample", copy, "--prompt", 1.0, "-o", tmp_path / "out.safetensors")
    assert "model.safetensors" in error


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's upload
def test_a_model_on_a_hub_samples_like_the_one_here(capsys, hub, trained, tmp_path):
    commit = load_pretrained(trained).push("somebody/model", private=True)
    assert load_pretrained("somebody/model", revision=commit).config == load_pretrained(trained).config
    capsys.readouterr()
    for model, out in ((trained, "a"), ("somebody/model", "b"), (f"somebody/model@{commit}", "c")):
        assert call(capsys, "sample", model, "--prompt", 1.0, "-o", tmp_path / out)[0] == 0
    for out in ("b", "c"):
        assert_same_tensors(tmp_path / out, tmp_path / "a")
    error = error_of(capsys, "sample", "somebody/model@v9", "--prompt", 1.0, "-o", tmp_path / "out.safetensors")
    assert "somebody/model has no revision 'v9'" in error


def test_a_missing_output_folder_is_named_before_the_work(capsys, trained, tmp_path):
    error = error_of(capsys, "sample", trained, "--prompt", 1.0, "-o", tmp_path / "no" / "out.safetensors")
    assert "does not exist" in error


@pytest.mark.parametrize("command", ["train", "sample", "eval", "generate"])
def test_a_missing_gpu_is_named(capsys, monkeypatch, trained, digits_zoo, tmp_path, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = {
        "train": ["digits_loss", f"dataset.path={digits_zoo}", f"out_dir={tmp_path}"],
        "sample": [trained, "--prompt", 1.0, "-o", tmp_path / "out.safetensors"],
        "eval": [trained],
        "generate": ["digits", tmp_path / "zoo", "--runs", 2],
    }[command]
    assert "cuda" in error_of(capsys, command, *arguments, "--device", "cuda")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["sample", "model", "--prompts", "1"], ["sample", "model"], ["dance"]])
def test_options_that_do_not_parse_have_status_2(capsys, arguments):
    assert call(capsys, *arguments)[0] == 2


def test_any_task_is_measured_through_its_test_function():
    def test_fn(offset, net):
        return offset + net.weight.sum().item(), "more"

    task = Task("t", lambda: nn.Linear(2, 1), lambda: (10.0,), test_fn, False, 1.0, 1.0, "return", (2,))
    values = batched_metric(task, torch.device("cpu"))(torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0]]))
    assert values.tolist() == [13.0, 17.0]


def test_batched_and_single_metrics_agree(trained):
    task = get_task("digits_loss")
    nets = [task.constructor() for _ in range(3)]
    vectors = load_pretrained(trained).info.layout.stack(nets).detach()
    batched = batched_metric(task, torch.device("cpu"))(vectors)
    singles = torch.tensor([task.test_fn(*task.data_fn(), net) for net in nets])
    torch.testing.assert_close(batched, singles, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("train a --resume k.x=1 --seed 3 y=2 --json", "train a k.x=1 y=2 --resume --seed 3 --json"),
        ("train a k=1 --data-dir x=y", "train a k=1 --data-dir x=y"),
        ("train a --data-dir=x=y k=1", "train a k=1 --data-dir=x=y"),
        ("train --resume a k=1", "train --resume a k=1"),
        ("train", "train"),
        ("sample a --json k=1", "sample a --json k=1"),
    ],
)
def test_settings_may_follow_options(given, parsed):
    assert overrides_first(given.split()) == parsed.split()
