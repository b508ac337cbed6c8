"""Training from the command line: every option does what it says, and wrong ones are told in one line."""

import json

import pytest
import torch
from pilimit import FinMLP, InfMLP, load_net
from pilimit.atoms import AtomsParameter
from pilimit.building import open_net
from pilimit.cli import main
from pilimit.config import OBSOLETE, PRESETS, TrainConfig, expand_presets, milestones
from pilimit.data import augment, choose_data
from pilimit.evaluation import evaluate, plain_loss
from pilimit.forecast import bytes_of
from pilimit.training import Training, train
from support.elsewhere import elsewhere
from torch.nn import functional as F

SMALL = ("--train-subset-size", "64", "--test-subset-size", "50", "--r", "8", "--batch-size", "16", "--lr", "0.5")
TINY = {"train_subset_size": 64, "test_subset_size": 50, "r": 8, "batch_size": 16, "lr": 0.5, "quiet": True}


def make(**options):
    config = TrainConfig("digits", **TINY | options)
    return Training(config, choose_data(config))


def weights(run):
    return run.net.state_dict()


def stepped(steps=2, **options):
    run = make(**options)
    for _ in range(steps):
        run.advance()
    return run


def errors(capsys, *arguments):
    status = main(list(arguments))
    err = capsys.readouterr().err
    assert status == 1 and err.count("\n") == 1 and err.startswith("pilimit: "), err
    return err


@pytest.mark.parametrize("width", [None, 32])
def test_a_run_writes_what_eval_reads(tmp_path, capsys, width):
    run, extra = str(tmp_path / "run"), [] if width is None else ["--width", str(width)]
    arguments = ["train", "digits", "--save-dir", run, "--epochs", "2", "--save-model", "--json", *SMALL, *extra]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["step"] == report["steps"] == 8 and not report["interrupted"]
    assert report["atoms"] == ([136, 136] if width is None else [])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["test_acc"] == report["test_acc"] and lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert main(["eval", run, "digits", "--test-subset-size", "50", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated == {"test_loss": report["test_loss"], "test_acc": report["test_acc"], "images": 50, "width": width}
    assert (tmp_path / "run" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    epochs = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert epochs == ["epoch0.th", "epoch1.th", "epoch2.th"]
    if width is None:
        published = load_net(tmp_path / "run" / "checkpoints" / "epoch2.th")
        x = torch.randn(3, 64)
        torch.testing.assert_close(published(x), open_net(tmp_path / "run")(x))
    assert "is not empty; use --resume" in errors(capsys, *arguments)
    arguments[arguments.index("--epochs") + 1] = "3"
    assert "--epochs (2 there)" in errors(capsys, *arguments, "--resume")


def test_a_finished_run_that_is_resumed_does_nothing_more(tmp_path, capsys):
    arguments = ["train", "digits", "--save-dir", str(tmp_path / "run"), "--epochs", "1", "--json", *SMALL]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again | {"seconds": 0} == first | {"seconds": 0}


@pytest.mark.parametrize("width", [None, 32])
@pytest.mark.parametrize("bounded", [{}, {"max_atoms": 60, "momentum": 0.9}])
def test_a_run_stopped_anywhere_goes_on_exactly(tmp_path, width, bounded):
    options = {"width": width, "epochs": 2, "data_augment": True} | (bounded if width is None else {"momentum": 0.9})
    whole = stepped(8, **options)
    for stop in (1, 4, 7):
        run = make(**options, save_dir=tmp_path / str(stop))
        (tmp_path / str(stop)).mkdir()
        for _ in range(stop):
            run.advance()
        run.save()
        resumed = make(**options, save_dir=tmp_path / str(stop))
        resumed.load(tmp_path / str(stop))
        for _ in range(8 - stop):
            resumed.advance()
        assert resumed.step == 8
        for (name, a), b in zip(weights(whole).items(), weights(resumed).values(), strict=True):
            assert torch.equal(a, b), (stop, name)


# every option of the published table that has an effect, with the value that shows it
CHANGES = {
    "r": 9, "depth": 3, "seed": 2, "batch_size": 8, "lr": 0.4, "momentum": 0.5, "wd": 0.1, "gclip": 0.01,
    "gclip_per_param": True, "first_layer_lr_mult": 0.5, "last_layer_lr_mult": 0.5, "bias_lr_mult": 0.1,
    "first_layer_alpha": 0.5, "last_layer_alpha": 0.5, "bias_alpha": 0.5, "last_bias_alpha": 0.5,
    "layernorm": True, "loss": "mse", "data_augment": True, "train_subset_size": 60, "accum_steps": 2,
    "dtype": "float64",
}  # fmt: skip


def probe(run):
    x = torch.linspace(-1, 1, 640).view(10, 64).to(run.dtype)
    with torch.no_grad():
        return run.net(x).double()


@pytest.mark.parametrize("width", [None, 32])
@pytest.mark.parametrize(("name", "value"), CHANGES.items())
def test_every_option_changes_the_training(width, name, value):
    plain, changed = probe(stepped(3, width=width)), probe(stepped(3, width=width, **{name: value}))
    assert not torch.equal(plain, changed)


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({"wd": 0.1}, {"no_apply_lr_mult_to_wd": True}),
        ({"momentum": 0.5}, {"dampening": 0.5}),
        ({"last_layer_alpha": 0.5}, {"last_layer_grad_no_alpha": True}),
        ({}, {"scheduler": "cosine", "epochs": 1}),
        ({"width": 32}, {"no_Gproj": True}),
        ({"width": 32}, {"gaussian_init": True}),
        ({"width": 32}, {"tie_omegas": True}),
        ({}, {"scheduler": "multistep", "lr_drop_milestones": "0.25", "lr_drop_ratio": 0.1}),
        ({}, {"gclip_drop_milestones": "0.25", "gclip_drop_ratio": 0.1}),
    ],
    ids=str,
)
def test_options_that_need_others_change_the_training(base, change):
    assert not torch.equal(probe(stepped(4, **base)), probe(stepped(4, **base, **change)))


def test_schedules_drop_at_the_published_steps():
    config = {"scheduler": "multistep", "lr_drop_milestones": "0.5,1", "lr_drop_ratio": 0.5, "epochs": 2}
    infinite, finite = make(**config), make(**config, width=32)
    assert [infinite.lr_factor(t) for t in range(6)] == [1, 1, 1, 0.5, 0.5, 0.25]  # published: a step late
    assert [finite.lr_factor(t) for t in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert [infinite.gclip_factor(t) for t in range(6)] == [infinite.lr_factor(t) for t in range(6)]
    own = make(**config, gclip_drop_milestones="1", gclip_drop_ratio=0.1)
    assert [own.gclip_factor(t) for t in range(6)] == [1, 1, 1, 1, 1, 0.1]
    cosine = make(scheduler="cosine", epochs=2, width=32)
    assert cosine.lr_factor(0) == 1 and cosine.lr_factor(cosine.steps) == pytest.approx(0)
    assert milestones("30, 0.5", 4) == [120, 2]


def test_accumulated_batches_are_one_large_batch():
    whole, parts = stepped(2, batch_size=16, dtype="float64"), stepped(2, batch_size=4, accum_steps=4, dtype="float64")
    torch.testing.assert_close(probe(whole), probe(parts), rtol=1e-10, atol=1e-12)
    assert whole.atoms() == parts.atoms()


def test_atoms_are_bounded_and_what_that_changes_is_told():
    run, lines = make(max_atoms=60, keep_atoms=30, epochs=4), []
    for _ in range(run.steps):
        lines.append(run.advance())
        assert max(run.atoms()) <= 60
    told = [line for line in lines if line is not None]
    assert len(told) >= 7
    for line in told:
        done = line["compression"]
        assert [layer["after"] for layer in done["layers"]] == [30, 30]
        assert all(0 < layer["error"] < layer["norm"] for layer in done["layers"])
        assert 0 < done["output_change"] < 0.2 and done["last_layer_bound"] > 0
    assert torch.isfinite(probe(run)).all()


def test_host_memory_gives_the_same_training():
    torch.testing.assert_close(probe(stepped(4)), probe(stepped(4, cuda_batch_size=7)), rtol=1e-4, atol=1e-5)


def test_distillation_moves_towards_the_teacher(tmp_path):
    teacher = stepped(30, save_dir=tmp_path, width=32)
    teacher.save()
    torch.save(stepped(30).net.state_dict(), tmp_path / "teacher.th")
    run = make(teacher_path=tmp_path / "teacher.th", teacher_alpha=0.0, teacher_temp=2.0)
    x, y = run.batch(torch.arange(16), torch.Generator())
    output = run.net(x)
    with torch.no_grad():
        target = run.teacher(x)
    p, q = F.softmax(target / 2, 1), F.softmax(output / 2, 1)
    assert run.loss(output, x, y).item() == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-4)
    for _ in range(20):
        run.advance()
    assert run.loss(run.net(x), x, y) < 0.7 * run.loss(output, x, y)


def test_starting_from_a_net_and_testing_only(tmp_path, capsys):
    net = InfMLP(64, 10, 8, depth=2, generator=torch.Generator().manual_seed(5))
    torch.save(net.state_dict(), tmp_path / "net.th")
    run = make(model_path=tmp_path / "net.th")
    assert torch.equal(run.net.layers[0].A, net.layers[0].A)
    wide = make(model_path=tmp_path / "net.th", width=2048)
    assert isinstance(wide.net, FinMLP) and (probe(wide) - probe(run)).norm() < 0.3 * probe(run).norm()
    train(TrainConfig("digits", **TINY | {"save_dir": tmp_path / "run", "epochs": 1}))
    begun = make(model_path=tmp_path / "run")
    assert torch.equal(begun.net.layers[0].A, open_net(tmp_path / "run").layers[0].A)
    arguments = ["train", "digits", "--test", "--model-path", str(tmp_path / "net.th"), "--json"]
    assert main(arguments) == 0
    data = choose_data(TrainConfig("digits"))
    loss, accuracy = evaluate(net, data.test.images.flatten(1), data.test.labels, TrainConfig("digits"))
    found = json.loads(capsys.readouterr().out)
    assert (found["test_loss"], found["test_acc"]) == (loss, accuracy)


def test_augmentation_flips_and_shifts():
    x = torch.arange(2 * 64.0).view(2, 1, 8, 8)
    background = torch.tensor([-1.0])
    shifted = augment(x.expand(2, 1, 8, 8), background, torch.Generator().manual_seed(0))
    assert shifted.shape == x.shape
    many = augment(x[:1].expand(2000, 1, 8, 8), background, torch.Generator().manual_seed(0))
    padded = F.pad(torch.cat([x[:1], x[:1].flip(3)]), (4, 4, 4, 4), value=-1.0)
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1).reshape(-1, 64)
    places = (many.view(-1, 1, 64) == windows).all(2)
    assert (places.sum(1) >= 1).all() and places.any(0).all()


def test_losses_are_the_published_ones():
    output, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    assert torch.equal(plain_loss(output, labels, "xent"), F.cross_entropy(output, labels))
    target = torch.full((4, 10), -0.1)
    target[torch.arange(4), labels] = 0.9
    torch.testing.assert_close(plain_loss(output, labels, "mse"), F.mse_loss(output, target))


def test_forecast_counts_atoms_and_refuses_what_will_not_fit(capsys):
    net = make().net
    per_block = bytes_of(net, 1) / 1e9
    told = errors(capsys, "train", "digits", "--epochs", "20", "--r", "8", "--max-memory", str(1.5 * per_block))
    assert (
        "atoms will exceed --max-memory" in told
        and "at step 262 of 320: raise it, or bound them with --max-atoms 16328" in told
    )
    run = make(epochs=3, quiet=True)
    from pilimit.forecast import forecast

    seen = forecast(run.net, run.config, 0, run.steps, run.appended)
    assert seen.atoms == 8 + 3 * 64 and seen.gb == pytest.approx(per_block)
    assert seen.seconds_at_end > 0 and seen.total_seconds > 0
    bounded = make(max_atoms=60)
    assert forecast(bounded.net, bounded.config, 0, bounded.steps, bounded.appended).atoms == 60


def test_presets_are_the_published_options_and_can_be_overridden(capsys):
    base = ["train", "digits", "--epochs", "1", "--train-subset-size", "16", "--quiet", "--json"]
    for name, flags in PRESETS.items():
        arguments = expand_presets([*base, "--preset", name])
        assert arguments[1 : 1 + len(flags.split())] == flags.split()
        assert main([*base, "--preset", name, "--r", "20", *([] if name == "infinite" else ["--width", "40"])]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["steps"] == (2 if name == "infinite" else 1) and report["test_acc"] is not None
    assert "--preset best: there are infinite, finite, mu-net" in errors(capsys, "train", "digits", "--preset=best")


@pytest.mark.parametrize("flag", OBSOLETE)
def test_obsolete_options_are_named(capsys, flag):
    assert f"{flag} is obsolete: " in errors(capsys, "train", "digits", flag)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--r", "0"], "--r must be at least 1, got 0"),
        (["--depth", "0"], "--depth must be at least 1"),
        (["--lr", "-1"], "--lr must be at least 0"),
        (["--lr", "inf"], "--lr must be at least 0 and finite, got inf"),
        (["--momentum", "1.5"], "--momentum must be at least 0 and below 1, got 1.5"),
        (["--bias-alpha", "nan"], "--bias-alpha must be finite, got nan"),
        (["--last-bias-alpha", "inf"], "--last-bias-alpha must be finite, got inf"),
        (["--bias-lr-mult", "-1"], "--bias-lr-mult must be at least 0"),
        (["--lr-drop-ratio", "nan"], "--lr-drop-ratio must be at least 0 and finite, got nan"),
        (["--teacher-alpha", "3"], "--teacher-alpha must be between 0 and 1"),
        (["--limit-seconds", "-1"], "--limit-seconds must be at least 0"),
        (["--max-memory", "0"], "--max-memory must be positive"),
        (["--keep-atoms", "10"], "--keep-atoms needs --max-atoms"),
        (["--cuda"], "no CUDA device"),
        (["--gaussian-init"], "is for finite nets: give --width"),
        (["--width", "8", "--max-atoms", "100"], "a finite net has no atoms"),
        (["--max-atoms", "40"], "leaves no room for one step of 64 samples beside the 10 atoms"),
        (["--max-atoms", "400", "--keep-atoms", "400"], "must be below --max-atoms"),
        (["--resume"], "need --save-dir"),
        (["--test"], "--test needs --model-path"),
        (["--scheduler", "multistep"], "needs --lr-drop-milestones"),
        (["--lr-drop-milestones", "a"], "must be epochs separated by commas, got 'a'"),
        (["--train-subset-size", "100000"], "there are 1000 images"),
        (["--model-path", "absent.th"], "absent.th"),
        (["--resume", "--save-dir", "absent"], "nothing to resume in absent"),
    ],
    ids=str,
)
def test_wrong_options_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # "--cuda" asks for what is not there
    assert message in errors(capsys, "train", "digits", *arguments)


def test_data_and_nets_that_do_not_fit_are_one_line(capsys, tmp_path):
    assert "MNIST" in errors(capsys, "train", "mnist")
    torch.save(InfMLP(5, 10, 4).state_dict(), tmp_path / "net.th")
    told = errors(capsys, "train", "digits", "--model-path", str(tmp_path / "net.th"))
    assert "maps 5 to 10 values, the data 64 to 10" in told
    torch.save(InfMLP(64, 10, 4, depth=3).state_dict(), tmp_path / "deep.th")
    told = errors(capsys, "train", "digits", "--model-path", str(tmp_path / "deep.th"))
    assert "has depth 3, not 2: give --depth 3" in told


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{}", "config.json is no configuration of a run"),
        ("config.json", "{", "config.json is damaged"),
        ("metrics.jsonl", "{bad\n", "metrics.jsonl has a line that is no JSON object with a step"),
    ],
)
def test_damaged_files_of_a_run_are_named(tmp_path, capsys, file, content, message):
    arguments = ["train", "digits", *SMALL, "--epochs", "1", "--save-dir", str(tmp_path), "--quiet"]
    assert main(arguments) == 0
    (tmp_path / file).write_text(content)
    assert message in errors(capsys, *arguments, "--resume")


def test_want_of_memory_is_one_line(capsys, monkeypatch):
    def fail(config, note):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("pilimit.commands.train", fail)
    assert "memory ran out: take a smaller r" in errors(capsys, "train", "digits")

    def fail_otherwise(config, note):
        raise RuntimeError("a bug")

    monkeypatch.setattr("pilimit.commands.train", fail_otherwise)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", "digits"])


def test_a_folder_of_something_else_is_named(tmp_path, capsys):
    assert "is no folder of a run or of atoms" in errors(capsys, "eval", str(tmp_path), "digits")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_state(tmp_path, capsys):
    arguments = ["train", "digits", *SMALL, "--epochs", "3", "--gclip", "0", "--save-dir", str(tmp_path / "run")]
    arguments[arguments.index("--lr") + 1] = "1e30"
    err = errors(capsys, *arguments, "--quiet")
    assert "the training loss is" in err and "lower --lr" in err
    assert not (tmp_path / "run" / "net").exists()


def test_interrupts_and_limits_save(tmp_path):
    config = TrainConfig("digits", **TINY, save_dir=tmp_path / "run", limit_seconds=0.0)
    report = train(config)
    assert report.step == 1 and not report.interrupted and report.test_acc is not None
    assert open_net(tmp_path / "run").infinite_layers()[0].weight.numel() == 0
    assert len(open_net(tmp_path / "run").layers[1].atoms) == 8 + 16


@pytest.fixture
def atoms_elsewhere(monkeypatch):
    """Only the atoms of a parameter go elsewhere: the empty tensor that stands for them cannot be a subclass twice."""

    def make(cls, atoms, requires_grad=True, output_layer=False, lr_mult=1.0):
        parameter = torch.nn.Parameter.__new__(cls, torch.empty(0), requires_grad)
        parameter.atoms, parameter.output_layer, parameter.lr_mult = atoms, output_layer, lr_mult
        return parameter

    def zeros(parameter, *shape, **options):
        return torch.zeros(*shape, device=parameter.atoms.device, **options)

    monkeypatch.setattr(AtomsParameter, "__new__", make)
    monkeypatch.setattr(AtomsParameter, "device", property(lambda parameter: parameter.atoms.device), raising=False)
    monkeypatch.setattr(AtomsParameter, "to", lambda *_, **__: torch.empty(0), raising=False)
    monkeypatch.setattr(AtomsParameter, "new_zeros", zeros, raising=False)


@pytest.mark.parametrize("options", [{}, {"max_atoms": 60, "keep_atoms": 30, "momentum": 0.9}, {"width": 32}])
def test_nothing_stays_on_the_cpu_when_a_net_is_trained_elsewhere(options, atoms_elsewhere):
    x = choose_data(TrainConfig("digits", **TINY)).test.images.flatten(1)
    expected = stepped(6, **options).net(x)
    with elsewhere("pilimit.training.choose_device") as device:
        found = stepped(6, **options).net(x.to(device))
        assert found.device == device
        torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.gpu
def test_atoms_in_host_memory_are_streamed_to_the_gpu():
    here, there = (InfMLP(6, 3, 5, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) for _ in range(2))
    there.load_state_dict(here.state_dict())
    for layer in there.infinite_layers():
        layer.atoms.stay_in_host_memory(2)
    x = torch.randn(4, 6, device="cuda")
    here(x).sum().backward()
    there(x).sum().backward()
    torch.testing.assert_close(here(x), there(x))
    torch.testing.assert_close(here.layers[0].A.grad, there.layers[0].A.grad)
    assert all(block.A.device.type == "cpu" for layer in there.infinite_layers() for block in layer.atoms.blocks)
