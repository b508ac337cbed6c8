"""Model files in the published format, written here by torch.save as the original writes them."""

import json
import os
from functools import partial

import pytest
import torch
from gpt_diffusion import GptModel, load_config, load_pretrained, released, train
from gpt_diffusion.cli import main
from gpt_diffusion.distributed import Processes
from gpt_diffusion.optim import averaged_copy, make_optimizer, param_groups
from gpt_diffusion.released import read_released
from gpt_diffusion.training import Training, _prepare_run
from support.golden import fill
from zoo_common.tasks import get_task

SMALL = ["transformer.n_embd=16", "transformer.n_layer=2", "transformer.n_head=2", "sampling.sampler=ddim"]
SMALL += ["sampling.steps=3"]
NAMES = ["mnist_loss", "mnist_error", "cifar10_loss", "cifar10_error", "cartpole"]

ALONE = Processes(0, 1, torch.device("cpu"))


def expected_of(config):
    with torch.device("meta"):
        return released._expected(config)


def filled(config):
    """A model with weights that are not those of the start."""
    model = expected_of(config).to_empty(device="cpu")
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(fill(key, tensor.shape, 0.02))
    return model.train()


def write(path, config, *, steps=2, old=True, **changes):
    """A file as the original writes it after some optimizer steps; returns model, average and optimizer."""
    model = filled(config)
    average = averaged_copy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.5)
    optimizer = make_optimizer(model, lr=1e-3)
    for i in range(steps):
        for name, parameter in model.named_parameters():
            parameter.grad = fill(f"{i}/{name}", parameter.shape, 0.01)
        optimizer.step()
    state = optimizer.state_dict()
    if old:  # torch below 1.12 counts in integers and knows fewer options
        state["state"] = {i: entry | {"step": int(entry["step"])} for i, entry in state["state"].items()}
        kept = ("params", "lr", "betas", "eps", "weight_decay", "amsgrad")
        state["param_groups"] = [{key: group[key] for key in kept} for group in state["param_groups"]]
    content = {"G": model.state_dict(), "optim": state, "G_ema": average.state_dict()} | changes
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return model, average, optimizer


@pytest.mark.golden("state_dict_layouts.json", cases="models")
def test_presets_have_the_released_layouts(golden):
    shapes = dict(entry[:-1].split(" [") for entry in golden.case["state_dict"])
    sizes = {"transformer.n_embd": shapes["decoder.ln_f.weight"], "transformer.n_head": "1"}
    sizes["transformer.n_layer"] = str(sum(key.endswith("ln1.weight") for key in shapes))
    for name in golden.case["configs"].split(", "):
        model = expected_of(load_config(name, [f"{key}={value}" for key, value in sizes.items()]))
        assert [f"{k} {list(v.shape)}" for k, v in model.state_dict().items()] == golden.case["state_dict"]
        assert sum(p.numel() for p in model.parameters()) == golden.case["n_parameters"]
        names = {id(p): key for key, p in model.named_parameters()}
        for group, expected in zip(param_groups(model, 0.1), golden.case["optimizer_groups"], strict=True):
            found = [names[id(p)] for p in group["params"]]
            assert (len(found), group["weight_decay"]) == (expected["n_tensors"], expected["weight_decay"])
            assert found[: len(expected["first"])] == expected["first"]
            assert found[-len(expected["last"]) :] == expected["last"]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_all_layouts_load_and_sample(name, tmp_path):
    config = load_config(name, SMALL)
    model, average, _ = write(tmp_path / "other.pt", config)
    for weights, source in (("raw", model), ("ema", average), (None, average)):
        pretrained = load_pretrained(tmp_path / "other.pt", config=config, weights=weights)
        for key, tensor in source.state_dict().items():
            assert torch.equal(pretrained.model.state_dict()[key], tensor)
    starts = pretrained.info.layout.stack([get_task(name).constructor()]).detach()
    sampled = pretrained.sample(starts, prompt=1.0, start_metric=torch.tensor([2.0]))
    assert sampled.shape == starts.shape and not torch.equal(sampled, starts)


def test_the_frequencies_of_a_file_are_kept_bit_by_bit(tmp_path):
    config = load_config("mnist_loss", SMALL)
    _, average, _ = write(tmp_path / "mine.pt", config)
    loaded = load_pretrained(tmp_path / "mine.pt", config=config).model
    assert torch.equal(loaded.scalar_embedder.frequencies, average.scalar_embedder.frequencies)
    fresh = GptModel([4], num_frequencies=128, max_freq_log2=14, n_head=1, n_embd=8, chunk_size=4, n_layer=1)
    assert not torch.equal(loaded.scalar_embedder.frequencies, fresh.scalar_embedder.frequencies)


def test_the_configuration_follows_from_name_or_shapes(tmp_path, monkeypatch):
    presets = dict(released.PRESETS)
    for name in NAMES:
        small = {"n_embd": 16, "n_layer": 1, "n_head": 2}
        for ending in ("", "_test"):
            tree = presets[name + ending]
            presets[name + ending] = tree | {"transformer": tree["transformer"] | small}
    monkeypatch.setattr("gpt_diffusion.config.PRESETS", presets)
    monkeypatch.setattr(released, "PRESETS", presets)
    for name in NAMES:
        write(tmp_path / f"{name}.pt", load_config(name))
        assert read_released(tmp_path / f"{name}.pt").config == load_config(name)
    os.rename(tmp_path / "cifar10_error.pt", tmp_path / "cifar_error.pt")
    assert read_released(tmp_path / "cifar_error.pt").config.exp_name == "cifar10_error"
    os.rename(tmp_path / "cartpole.pt", tmp_path / "0250.pt")
    content = read_released(tmp_path / "0250.pt")  # the only one with these shapes
    assert (content.config.exp_name, content.epoch) == ("cartpole", 250)
    os.rename(tmp_path / "mnist_error.pt", tmp_path / "best.pt")
    with pytest.raises(ValueError, match=r"best.pt: .* the model fits mnist_loss and mnist_error: give it"):
        read_released(tmp_path / "best.pt")
    assert read_released(tmp_path / "best.pt", "mnist_error").epoch == 0


def broken(state, **changes):
    """A state dict with other entries; None removes one."""
    return {key: value for key, value in (state | changes).items() if value is not None}


def test_every_misfit_is_named_in_one_message(tmp_path):
    config = load_config("mnist_loss", SMALL)
    state = filled(config).state_dict()
    changed = {"decoder.ln_f.bias": None, "decoder.pos_emb": torch.zeros(1, 3, 16), "decoder.more": torch.zeros(2)}
    changed["decoder.ln_in.bias"] = torch.zeros(16, dtype=torch.float64)
    write(tmp_path / "a.pt", config, G_ema=broken(state, **changed))
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path / "a.pt", config=config)
    for part in (
        "a.pt: G_ema is not a model of the configuration 'mnist_loss'",
        "missing: decoder.ln_f.bias",
        "unexpected: decoder.more",
        "'decoder.pos_emb': expected float32 [1, 26, 16], got float32 [1, 3, 16]",
        "'decoder.ln_in.bias': expected float32 [16], got float64 [16]",
    ):
        assert part in str(error.value)


class Bomb:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return partial(os.system, self.command), ()


def test_other_files_are_refused_without_running_code(tmp_path):
    config = load_config("mnist_loss", SMALL)
    load = partial(load_pretrained, tmp_path / "a.pt", config=config)
    write(tmp_path / "a.pt", config, note=Bomb(f"touch {tmp_path / 'ran'}"))
    with pytest.raises(ValueError, match=r"a\.pt: "):
        load()
    assert not (tmp_path / "ran").exists()
    torch.save({"model": {}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"no model in the published format .* but a dictionary of 'model'"):
        load()
    write(tmp_path / "a.pt", config, G_ema=None)
    with pytest.raises(ValueError, match="holds no moving average"):
        load(weights="ema")
    assert load().model.training is False  # raw weights, where there are no others
    optimizer = {"state": {}, "param_groups": [{"params": [0]}, {"params": [1]}]}
    write(tmp_path / "a.pt", config, optim=optimizer)
    with pytest.raises(ValueError, match=r"optim is not .* expected groups of \[.*\] parameters, got \[1, 1\]"):
        load()
    with pytest.raises(ValueError, match="weights must be ema or raw, got 'best'"):
        load(weights="best")
    write(tmp_path / "a.pt", config)
    with pytest.raises(ValueError, match="static"):
        load_pretrained(tmp_path / "a.pt", config=load_config("mnist_loss", [*SMALL, "sampling.thresholding=static"]))


def test_training_goes_on_from_a_released_file(tiny_config, tmp_path):
    settings = [
        "transformer.tokens=layers",
        "dataset.pairs=spacing",
        "train.behaviour_weight=0",
        "train.max_steps=null",
    ]
    settings += ["train.num_ep=3", "train.checkpoint_freq=1", f"resume_path={tmp_path / '0001.best.pt'}"]
    config = tiny_config(*settings)
    model, average, optimizer = write(tmp_path / "0001.best.pt", config, steps=5)
    run: Training = _prepare_run(config, None, ALONE)
    run.begin_from(read_released(tmp_path / "0001.best.pt", config))
    assert run.step == run.per_epoch > 0
    for own, other in ((run.model, model), (run.average, average)):
        assert all(
            torch.equal(a, b) for a, b in zip(own.state_dict().values(), other.state_dict().values(), strict=True)
        )
    names = {id(p): name for name, p in model.named_parameters()}
    theirs = {names[id(p)]: entry for p, entry in optimizer.state.items()}
    for name, parameter in run.model.named_parameters():
        assert torch.equal(run.optimizer.state[parameter]["exp_avg_sq"], theirs[name]["exp_avg_sq"])
        assert run.optimizer.state[parameter]["step"] == 5
    report = train(config, quiet=True)
    assert (report.step, report.finished) == (3 * run.per_epoch, True)
    with pytest.raises(ValueError, match=r"resume_path: trained for 1 epochs already; raise train.num_ep"):
        train(tiny_config(*settings, "train.num_ep=1", "exp_name=short"), quiet=True)


def test_test_only_judges_the_model_of_resume_path(digits_zoo, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["transformer.tokens=layers", "transformer.n_embd=8", "transformer.n_layer=1", "transformer.n_head=2"]
    settings += [f"dataset.path={digits_zoo}", "sampling.steps=2", "vis.num_nets_per_gpu=2", "vis.dvo_steps=3"]
    settings += ["dataset.openai_coeff=4", f"out_dir={tmp_path / 'results'}"]
    write(tmp_path / "0007.pt", load_config("digits_loss", settings))
    settings += ["test_only=true", f"resume_path={tmp_path / '0007.pt'}"]
    assert main(["train", "digits_loss", *settings, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores.keys() >= {"training_set", "test_set"}
    assert not (tmp_path / "results").exists()
    files = sorted(path.name for path in (tmp_path / "figure_files" / "digits_loss").iterdir())
    assert files[0] == "dvo_test_set_test_set.pt" and len(files) == 4


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_released_files_on_the_command_line(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mnist_loss.pt", load_config("mnist_loss", SMALL))
    options = ["-o", "x.safetensors", "--prompt", "0.1"] if command == "sample" else []
    assert main([command, "mnist_loss.pt", *options]) == 1  # the preset is larger than this file
    err = capsys.readouterr().err
    assert "mnist_loss.pt: G is not a model of the configuration 'mnist_loss'" in err and err.count("\n") == 1
    assert main([command, "none.pt", *options]) == 1
    assert "there is no file or folder none.pt" in capsys.readouterr().err
