"""The training loop: it learns, it resumes exactly, it names what does not fit."""

import json
import shutil
import signal

import pytest
import torch
from gpt_diffusion import load_pretrained, train
from gpt_diffusion import training as training_module
from gpt_diffusion.cli import main
from gpt_diffusion.distributed import Processes
from gpt_diffusion.training import forecast
from support.elsewhere import elsewhere
from support.reliability import flip_bit, truncate
from torch import nn
from zoo_common.layout import ParameterLayout
from zoo_common.zoo import Run, Zoo

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_the_loss_falls(tiny_config):
    config = tiny_config("train.max_steps=60", "train.mb_size=32", "train.log_freq=10")
    report = train(config, quiet=True)
    losses = [line["loss"] for line in log_of(report.folder)]
    assert report.finished
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["transformer.tokens=layers", "transformer.split_policy=layer_by_layer", "transformer.num_frequencies=8"],
        ["train.precision=bf16"],
    ],
    ids=["units", "layers", "bf16"],
)
@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_training_resumes_to_the_same_result(tiny_config, monkeypatch, overrides):
    whole = train(tiny_config("exp_name=whole", *overrides), quiet=True)
    config = tiny_config("exp_name=broken", *overrides)
    advance = training_module.Training.advance

    def interrupted_step(self):
        if self.step == 6:
            signal.raise_signal(signal.SIGINT)
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(training_module.Training, "advance", interrupted_step)
        stopped = train(config, quiet=True)
    assert (stopped.step, stopped.finished, stopped.interrupted) == (7, False, True)
    assert not (stopped.folder / "model.safetensors").exists()
    resumed = train(config, resume=True, quiet=True)
    assert log_of(resumed.folder) == log_of(whole.folder)
    a, b = (load_pretrained(report.folder).model.state_dict() for report in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_lines_after_the_last_saved_state_are_written_again(tiny_config):
    config = tiny_config()
    folder = train(config, quiet=True).folder
    expected = log_of(folder)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 99, "loss": 0}) + "\n" + '{"step": 100, "lo')
    train(config, resume=True, quiet=True)
    assert log_of(folder) == expected


def test_the_time_limit_stops_and_resume_finishes(tiny_config):
    stopped = train(tiny_config(), limit_seconds=0.0, quiet=True)
    assert stopped.step == 1
    assert train(tiny_config(), resume=True, quiet=True).finished


def test_the_behaviour_term_is_part_of_the_loss(tiny_config):
    plain, with_term = (
        train(tiny_config(f"exp_name=w{weight}", f"train.behaviour_weight={weight}"), quiet=True).folder
        for weight in (0, 1)
    )
    assert all(line["loss"] == line["mse"] for line in log_of(plain))
    assert all(line["loss"] > line["mse"] for line in log_of(with_term))


def test_an_existing_run_is_not_overwritten(tiny_config):
    train(tiny_config(), quiet=True)
    with pytest.raises(FileExistsError, match="already holds a run; use --resume"):
        train(tiny_config(), quiet=True)
    with pytest.raises(ValueError, match=r"differs .*: train.base_lr \(0.003 there, 0.5 given\)"):
        train(tiny_config("train.base_lr=0.5"), resume=True, quiet=True)


def test_states_are_saved_every_so_many_epochs_and_amp_is_bf16(tiny_config, monkeypatch):
    saved = []
    monkeypatch.setattr(training_module.Training, "save", lambda run, path: saved.append(run.step))
    epochs = [
        "train.checkpoint_steps=null",
        "train.checkpoint_freq=2",
        "dataset.target_epoch_size=48",
        "train.mb_size=12",
    ]
    config = tiny_config(*epochs, "train.max_steps=14", "amp=true")
    run = training_module._prepare_run(config, None, ALONE)
    assert run.bf16 and not training_module._prepare_run(tiny_config(), None, ALONE).bf16
    train(config, quiet=True)
    assert saved == [*range(2 * run.per_epoch, 14, 2 * run.per_epoch), 14]
    assert 1 < len(saved)


def test_nothing_to_resume_is_named(tiny_config):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(tiny_config("exp_name=never"), resume=True, quiet=True)


@pytest.mark.parametrize("damage", [truncate, flip_bit])
def test_a_damaged_state_is_named_and_the_restored_one_goes_on(tiny_config, damage):
    folder = train(tiny_config(), limit_seconds=0.0, quiet=True).folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    damage(folder / "state.safetensors")
    with pytest.raises(ValueError, match=r"state\.safetensors.*restore it"):
        train(tiny_config(), resume=True, quiet=True)
    (folder / "state.safetensors").write_bytes(before[folder / "state.safetensors"])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert train(tiny_config(), resume=True, quiet=True).finished


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (truncate, "zoo.json"),
        (truncate, "shards/runs-s0-0000000-0000039.safetensors"),
        (flip_bit, "shards/runs-s0-0000000-0000039.safetensors"),
    ],
)
def test_a_damaged_zoo_is_named_before_anything_is_written(tiny_config, digits_zoo, tmp_path, damage, file):
    zoo = shutil.copytree(digits_zoo, tmp_path / "copy")
    damage(zoo / file)
    config = tiny_config(f"dataset.path={zoo}")
    with pytest.raises(ValueError, match=f"{file}.* damaged"):
        train(config, quiet=True)
    assert not config.folder.exists()


def test_what_a_killed_start_left_behind_does_not_count_as_a_run(tiny_config):
    config = tiny_config()
    config.folder.mkdir()
    (config.folder / ".0123-config.yaml").touch()
    assert train(config, quiet=True).finished


def test_a_zoo_of_another_layout_is_named_and_nothing_is_left(tiny_config, tmp_path):
    net = nn.Linear(3, 2)
    zoo = Zoo.create(tmp_path / "other", layout=ParameterLayout.from_module(net), split=(1, 0, 0))
    zoo.append([Run(id="a", params=torch.zeros(2, 8), steps=torch.arange(2).numpy(), metrics={"val_loss": [1.0, 0.5]})])
    config = tiny_config(f"dataset.path={zoo.path}")
    with pytest.raises(ValueError, match=r"zoo holds weight \(2, 3\), bias \(2,\), task 'digits_loss' has fc1.weight"):
        train(config, quiet=True)
    assert not config.folder.exists()


def test_an_unknown_metric_is_named(tiny_config):
    with pytest.raises(ValueError, match="no metric 'speed'; the zoo has val_loss"):
        train(tiny_config("dataset.train_metric=speed"), quiet=True)


def test_a_diverging_training_stops_with_the_remedy(tiny_config):
    with pytest.raises(ValueError, match=r"training loss is (nan|inf) at step .*lower train.base_lr"):
        train(tiny_config("train.base_lr=1e30", "train.warmup_epochs=0"), quiet=True)


def test_a_diverging_training_does_not_overwrite_the_last_good_state(tiny_config, monkeypatch):
    """The loss becomes NaN between two log lines, right before a state would be saved."""
    config = tiny_config("train.log_freq=100", "train.checkpoint_steps=4", "train.max_steps=20")
    plain = training_module.Training.loss

    def broken_from_step_6(self, pairs, t, noise, generator):
        loss, mse = plain(self, pairs, t, noise, generator)
        return (loss * torch.nan if self.step >= 6 else loss), mse

    with monkeypatch.context() as patch:
        patch.setattr(training_module.Training, "loss", broken_from_step_6)
        with pytest.raises(ValueError, match="training loss is nan at step 8"):
            train(config, quiet=True)
    resumed = train(config, resume=True, quiet=True, limit_seconds=0.0)
    assert resumed.step == 5


def test_runs_without_a_finite_metric_are_left_out_and_counted(tiny_config, digits_zoo, tmp_path, caplog):
    zoo = Zoo.open(digits_zoo)
    path = tmp_path / "holes"
    holes = Zoo.create(path, layout=zoo.layout, task=zoo.task, split=(1, 0, 0))
    for r in range(8):
        loss = zoo.metrics["val_loss"][r].copy()
        loss[-1] = float("nan") if r < 3 else loss[-1]
        holes.append([Run(id=f"r{r}", params=zoo.params[r], steps=zoo.steps[r], metrics={"val_loss": loss})])
    config = tiny_config(f"dataset.path={path}", "train.max_steps=2")
    assert train(config, quiet=True).finished
    assert "3 of 8 training runs are left out" in caplog.text
    assert "3 without a finite val_loss" in caplog.text


def test_the_forecast_writes_nothing(tiny_config):
    config = tiny_config()
    result = forecast(config, timed_steps=1)
    assert result.steps == 12
    assert result.seconds > 0
    assert not config.folder.exists()


def test_a_missing_gpu_is_named(tiny_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda': no CUDA device is available"):
        train(tiny_config("device=cuda"), quiet=True)


def test_nothing_stays_on_the_cpu_when_a_model_is_trained_and_used_elsewhere(tiny_config, tmp_path, capsys):
    settings = ["train.behaviour_weight=0.5", "vis.freq=4", "transformer.tokens=units"]
    here, there = (tiny_config(f"exp_name={name}", *settings) for name in ("here", "there"))
    commands = (
        ["sample", "--prompt", "0.5", "-o", str(tmp_path / "net.safetensors"), "--num", "2"],
        ["novelty", "--num", "2"],
    )
    train(here, quiet=True)
    with elsewhere("gpt_diffusion.training.choose_device", "gpt_diffusion.commands.choose_device"):
        train(there, quiet=True)
        for command, *options in commands:
            assert main([command, str(there.folder), *options, "--json"]) == 0, capsys.readouterr().err
    assert log_of(here.folder)[-1]["loss"] == pytest.approx(log_of(there.folder)[-1]["loss"], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_on_a_gpu_learns_what_the_cpu_learns(tiny_config, precision):
    """Same batches and initialisation; the noise comes from another generator, so only the level agrees."""
    settings = ["train.max_steps=100", "train.mb_size=64", "train.log_freq=20"]
    losses = []
    for device in ("cpu", "cuda"):
        config = tiny_config(f"exp_name={device}", f"device={device}", f"train.precision={precision}", *settings)
        losses.append(log_of(train(config, quiet=True).folder)[-1]["loss"])
    assert abs(losses[1] / losses[0] - 1) < 0.2
