"""Pretraining: what is written, exact resume, parts of a batch, precision, and errors."""

import dataclasses
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from sane.cli import main
from sane.config import PRESETS, Config, config_to_yaml, load_config
from sane.distributed import Processes
from sane.preparation import PrepareConfig, open_prepared, prepare
from sane.pretraining import Pretraining, forecast, pretrain
from support.autoencoders import SIZES, TRAINING
from support.elsewhere import elsewhere
from support.reliability import assert_same_tensors

ALONE = Processes(0, 1, torch.device("cpu"))


def config(workshop, tmp_path, *overrides):
    common = [f"prepared={workshop}/prepared.safetensors", f"out_dir={tmp_path}", *SIZES, *TRAINING]
    return load_config("small", [*common, *overrides])


def test_a_run_writes_settings_log_state_and_model(workshop):
    folder = workshop / "results" / "small"
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml", "curves.png", "metrics.jsonl", "model.safetensors", "state.safetensors",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if "loss_validation" in line]
    assert [line["epoch"] for line in judged] == [0, 1, 2]
    assert {"r2/test_acc_test", "r2/epoch_test", "r2/ggap_test"} <= judged[0].keys()
    assert judged[-1]["reconstruction_validation"] < judged[0]["reconstruction_validation"]
    trained = [line for line in lines if "lr" in line]
    assert trained[-1]["step"] == trained[-1]["epoch"] * (trained[-1]["step"] // 2)


def test_stopped_and_resumed_equals_uninterrupted(workshop, tmp_path):
    whole, cut = (config(workshop, tmp_path / name, "training.views=permuted") for name in ("a", "b"))
    pretrain(whole, quiet=True)
    first = pretrain(cut, limit_seconds=0, quiet=True)
    assert first.step == 1 and not first.finished
    with (cut.folder / "metrics.jsonl").open("a") as log:
        log.write("\0\0\n")  # as a crash of the machine leaves it
    assert pretrain(cut, resume=True, quiet=True).finished
    assert_same_tensors(*(c.folder / "model.safetensors" for c in (cut, whole)))


def test_a_training_that_stops_before_the_first_line_of_its_log_says_so(workshop, tmp_path, capsys):
    settings = [f"prepared={workshop}/prepared.safetensors", f"out_dir={tmp_path}", *SIZES, *TRAINING]
    assert (
        main(["pretrain", "small", *settings, "training.test_every=0", "training.log_every=99", "--limit-seconds", "0"])
        == 0
    )
    out = capsys.readouterr().out
    assert "step: 1\n" in out and "nan" not in out and not (tmp_path / "small" / "metrics.jsonl").exists()


def test_a_training_begins_with_the_weights_of_another(workshop, tmp_path):
    begun = config(workshop, tmp_path, f"start={workshop}/results/small", "name=begun")
    pretrain(begun, limit_seconds=0, quiet=True)
    first, ended = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (begun.folder, workshop / "results" / "small")
    )
    assert first[0]["step"] == 0 and first[0]["loss_validation"] == pytest.approx(ended[-1]["loss_validation"])
    wider = config(workshop, tmp_path, f"start={workshop}/results/small", "model.d_model=32", "name=wider")
    with pytest.raises(ValueError, match=r"tokenizer.weight is .* there, .* here; use its token size and model"):
        pretrain(wider, quiet=True)
    assert not wider.folder.exists()
    assert pretrain(dataclasses.replace(begun, start="moved"), resume=True, quiet=True).finished


def test_callbacks_and_weights_and_biases_take_part_in_the_log(workshop, tmp_path, monkeypatch):
    calls = []

    def init(**options):
        calls.append(options)
        return SimpleNamespace(
            log=lambda line, step: calls.append({**line, "step": step}), finish=lambda: calls.append("end")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    tiny = config(workshop, tmp_path, "wandb=mine", "name=tiny")
    count = lambda model, epoch: {
        "parameters": float(sum(p.numel() for p in model.autoencoder.parameters())),
        "at": epoch,
    }
    pretrain(tiny, limit_seconds=0, callbacks=[count], quiet=True)
    pretrain(tiny, callbacks=[count], resume=True, quiet=True)
    lines = [json.loads(line) for line in (tiny.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["at"] for line in lines if "parameters" in line] == [0, 1, 2]
    starts = [call for call in calls if call != "end" and "project" in call]
    assert [call["project"] for call in starts] == ["mine", "mine"] and starts[0]["id"] == starts[1]["id"]
    assert calls[-1] == "end" and [c for c in calls if c != "end" and "step" in c] == lines
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(ImportError, match="wandb=mine needs Weights & Biases: pip install"):
        pretrain(dataclasses.replace(tiny, name="other"), quiet=True)
    assert not (tmp_path / "other").exists()


def test_dropout_is_a_function_of_the_seed(workshop, tmp_path):
    whole, cut = (config(workshop, tmp_path / name, "model.dropout=0.3") for name in ("a", "b"))
    torch.manual_seed(1)
    pretrain(whole, quiet=True)
    before = torch.get_rng_state()
    pretrain(cut, limit_seconds=0, quiet=True)
    torch.manual_seed(2)
    assert pretrain(cut, resume=True, quiet=True).finished
    assert_same_tensors(*(c.folder / "model.safetensors" for c in (cut, whole)))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is as it was


def test_a_training_goes_on_in_another_place_but_not_with_another_preparation(workshop, tmp_path):
    zoo = open_prepared(workshop / "prepared.safetensors").zoo
    one = config(workshop, tmp_path / "a", f"prepared={tmp_path}/a.safetensors")
    shutil.copy(workshop / "prepared.safetensors", tmp_path / "a.safetensors")
    pretrain(one, limit_seconds=0, quiet=True)
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    moved = config(workshop, tmp_path / "b", f"prepared={tmp_path}/b.safetensors", f"zoo={workshop}/zoo")
    assert pretrain(moved, resume=True, limit_seconds=0, quiet=True).step == 2
    prepare(zoo, PrepareConfig(token_size=40, normalization="minmax")).save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors is not the preparation that .* was trained on: prepare the"):
        pretrain(moved, resume=True, quiet=True)


def test_judgements_embed_long_sequences_by_windows(workshop, tmp_path, monkeypatch):
    one = config(workshop, tmp_path)
    run = Pretraining(one, open_prepared(one.prepared), ALONE)
    found = []
    for longest, together in ((4096, 2**24), (50, 2 * 2464)):
        monkeypatch.setattr("sane.pretraining._LONG", longest)
        monkeypatch.setattr("sane.pretraining._TOGETHER", together)
        torch.manual_seed(0)
        found.append(run.downstream())
    assert found[0].keys() == found[1].keys() and found[0] != found[1]


def gradients(run):
    run.advance()
    return torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("setting", ["reduction=mean", "reduction=sum", "mask_normalize=true"])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(workshop, tmp_path, setting):
    found = []
    for accumulate in (1, 4):
        settings = [f"training.accumulate={accumulate}", f"training.{setting}", "training.gamma=0"]
        one = config(workshop, tmp_path, *settings, "optim.clipping=none", "optim.optimizer=sgd")
        torch.manual_seed(0)
        found.append(gradients(Pretraining(one, open_prepared(one.prepared), ALONE)))
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


DISTRIBUTED = """
import sys, torch
from sane.config import load_config
from sane.preparation import PrepareConfig, open_prepared, prepare
from sane.distributed import joined
from sane.pretraining import Pretraining
with joined(torch.device("cpu")) as processes:
    config = load_config("small", sys.argv[2:])
    torch.manual_seed(0)
    run = Pretraining(config, open_prepared(config.prepared), processes)
    run.advance(); run.advance()
    if processes.first:
        torch.save([p.detach() for p in run.model.parameters()], sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["training.gamma=0.5", "training.z_var_penalty=0.1"],
        ["training.gamma=0.5", "training.accumulate=2", "training.views=mixed", "training.erase=true"],
        ["training.gamma=1"],
    ],
)
def test_two_processes_take_the_steps_of_one(workshop, tmp_path, settings):
    (tmp_path / "program.py").write_text(DISTRIBUTED)
    common = [f"prepared={workshop}/prepared.safetensors", *SIZES, *TRAINING, *settings]
    common += ["optim.optimizer=sgd", "optim.lr=0.1"]
    for name, start in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        command = [sys.executable, *start, str(tmp_path / "program.py"), str(tmp_path / f"{name}.pt"), *common]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
    for a, b in zip(torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nothing_stays_on_the_cpu_when_an_autoencoder_is_trained_and_used_elsewhere(workshop, tmp_path, capsys):
    here, there = (config(workshop, tmp_path / name, "training.target=clean") for name in ("here", "there"))
    pretrain(here, quiet=True)
    with elsewhere("sane.pretraining.choose_device", "sane.commands.choose_device"):
        pretrain(there, quiet=True)
        model, embeddings = str(there.folder), str(tmp_path / "embeddings.safetensors")
        assert main(["embed", model, f"{workshop}/zoo", "-o", embeddings]) == 0, capsys.readouterr().err
        for command in ("predict", "diagnose"):
            assert main([command, model, f"{workshop}/prepared.safetensors"]) == 0, capsys.readouterr().err
    models = [load_file(c.folder / "model.safetensors") for c in (here, there)]
    torch.testing.assert_close(*models)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_cuda_lowers_the_loss(workshop, tmp_path, precision):
    one = config(workshop, tmp_path, "device=cuda", f"training.precision={precision}", "training.epochs=20")
    pretrain(one, quiet=True)
    lines = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["reconstruction"] for line in lines if "lr" in line]
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["training.precision=bf16"], "precision=bf16 needs CUDA; use fp32"),
        (["model.window=1000"], r"window \(1000\) must be from 1 to the 78 tokens"),
        (["training.batch=5000"], r"batch \(5000\) must be from 1 to the \d+ windows"),
        (["model.max_positions=[10, 5, 20]"], "the autoencoder knows positions up to .* ignore_bn differs"),
        (
            ["optim.lr=1e30", "optim.clipping=none", "training.epochs=4"],
            "the training loss is nan at step .*; lower optim.lr",
        ),
        (["prepared=absent"], "absent"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_half_written(workshop, tmp_path, overrides, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        pretrain(config(workshop, tmp_path, *overrides), quiet=True)
    assert not list(tmp_path.rglob("model.safetensors"))


def test_a_folder_belongs_to_one_configuration(workshop, tmp_path):
    one = config(workshop, tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing to resume in"):
        pretrain(one, resume=True, quiet=True)
    pretrain(one, limit_seconds=0, quiet=True)
    with pytest.raises(FileExistsError, match="already holds a run; use --resume"):
        pretrain(one, quiet=True)
    with pytest.raises(ValueError, match=r"training.gamma \(0.05 there, 0.5 given\)"):
        pretrain(config(workshop, tmp_path, "training.gamma=0.5"), resume=True, quiet=True)


def test_a_forecast_writes_nothing(workshop, tmp_path):
    found = forecast(config(workshop, tmp_path), timed_steps=1)
    assert found.steps > 0 and found.parameters > 0 and found.seconds > found.judging_seconds > 0
    assert forecast(config(workshop, tmp_path, "training.test_every=0"), timed_steps=1).judging_seconds == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_file(name, tmp_path):
    one = load_config(name)
    (tmp_path / "one.yaml").write_text(config_to_yaml(one))
    assert load_config(tmp_path / "one.yaml") == one


def test_published_sizes():
    cnn, resnet = load_config("cnn"), load_config("resnet18")
    assert dataclasses.astuple(cnn.model) == (64, 1024, 8, 8, 128, 0.0, (100, 10, 40))
    assert dataclasses.astuple(resnet.model) == (256, 2048, 16, 8, 128, 0.0, (55000, 100, 550))


@pytest.mark.parametrize(
    ("name", "overrides", "match"),
    [
        ("smal", [], "'smal' is neither a file nor built in; did you mean 'small'"),
        ("small", ["training.gama=1"], "unknown configuration key 'training.gama'; did you mean 'training.gamma'"),
        ("small", ["training.epochs"], "must have the form key=value"),
        ("small", ["training.epochs=many"], "training.epochs: expected int, got 'many'"),
        ("small", ["training.views=both"], "training.views: expected one of canonical, mixed, permuted"),
        ("small", ["training.noise=[0.1]"], "training.noise must be two numbers"),
        ("small", ["training.noise=0.1,0.2"], r"training.noise: write several values as \[0.1,0.2\]"),
        ("small", ["name=["], "'\\[' is no YAML value: close its brackets"),
        ("small", ["training.batch=30", "training.accumulate=16"], r"accumulate \(16\) must divide the batch \(30\)"),
        ("small", ["training.epochs=0"], "training.epochs must be at least 1"),
        ("small", ["optim.lr=0"], "lr and clip must be positive"),
        ("small", ["optim.lr=1e40"], "numbers of float32, got 1e.40"),
        ("small", ["name=a/b"], "plain folder name"),
        ("small", ["name=.."], "plain folder name"),
        ("small", ["training=3"], "training: expected a group of keys, got 3"),
        ("small", ["lr=3"], "unknown configuration key 'lr'; did you mean 'optim.lr'"),
        ("small", ["epoch=3"], "unknown configuration key 'epoch'; did you mean 'training.epochs'"),
        ("small", ["seed=-1"], r"seed must be from 0 to below 2\*\*63, got -1"),
    ],
)
def test_bad_settings_are_named(name, overrides, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        load_config(name, overrides)


def test_the_default_configuration_is_the_small_one():
    assert load_config("small") == Config(name="small")
