"""Hypernetworks in files: published formats, the hub, our own files, and files that are wrong."""

import json

import joblib
import pytest
import torch
from ghn import GHN, GHN1, GHN2, GHN3, from_pretrained, get_metadata, norm_check, push, save_pretrained
from ghn import pretrained as module
from ghn.cli import main
from safetensors.torch import load_file
from support.hypernetworks import filled, torchvision_model
from support.reliability import truncate

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's upload

NORMS = {"weight_norm": True, "ve": True, "layernorm": True}
TINY = {"max_shape": (8, 8, 11, 11), "num_classes": 10, "hid": 16}
MAKERS = {
    "ghn3": lambda: GHN3(**TINY, heads=4, layers=2, **NORMS),
    "ghn3 of low rank": lambda: GHN3(**TINY, heads=4, layers=1, rank=2, **NORMS),
    "ghn2 of GHN-3": lambda: GHN3(**TINY, is_ghn2=True, **NORMS),
    "ghn2": lambda: GHN(**TINY, **NORMS),
    "ghn1": lambda: GHN(**TINY),
    "mlp": lambda: GHN(**TINY, hypernet="mlp", **NORMS),
    "mlp decoder": lambda: GHN(**TINY, decoder="mlp", **NORMS),
}

# kind: number of weights, some of the shapes of the specification
PUBLISHED = {
    ("ghn1", "cifar10"): 1_620_668,
    ("ghn2", "cifar10"): 1_620_764,
    ("mlp", "cifar10"): 1_614_396,
    ("ghn1", "imagenet"): 2_319_624,
    ("ghn2", "imagenet"): 2_319_720,
}
SIZES = {"tm8": (64, 3, 8, 6_906_632), "sm8": (128, 5, 16, 35_810_368), "lm8": (256, 12, 16, 214_668_960)}
SIZES["xlm16"] = (384, 24, 16, 654_365_184)


def same(ghn, other):
    assert type(ghn) is type(other) and ghn.config == other.config
    assert ghn.state_dict().keys() == other.state_dict().keys()
    return all(torch.equal(value, other.state_dict()[name]) for name, value in ghn.state_dict().items())


@pytest.mark.parametrize(("kind", "data"), PUBLISHED)
def test_older_hypernetworks_have_the_published_sizes(kind, data):
    shape, classes = ((64, 64, 11, 11), 10) if data == "cifar10" else ((64, 64, 16, 16), 1000)
    options = {} if kind == "ghn1" else NORMS
    with torch.device("meta"):
        ghn = GHN(shape, classes, "mlp" if kind == "mlp" else "gatedgnn", **options)
    assert sum(parameter.numel() for parameter in ghn.parameters()) == PUBLISHED[kind, data]
    assert ghn.state_dict()["decoder.conv.2.weight"].shape == (4096, 256, 1, 1)


@pytest.mark.parametrize("size", SIZES)
def test_newer_hypernetworks_have_the_published_sizes(size):
    hid, layers, heads, count = SIZES[size]
    with torch.device("meta"):
        ghn = GHN3((hid, hid, 16, 16), 1000, hid, heads=heads, layers=layers, **NORMS)
    assert sum(parameter.numel() for parameter in ghn.parameters()) == count
    assert len(ghn.state_dict()) == 60 + 11 * (layers - 3)
    assert ghn.state_dict()["gnn.0.attn.proj_e.2.weight"].shape == (heads, hid)


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_saved_is_loaded(kind, tmp_path):
    ghn = filled(MAKERS[kind]())
    path = save_pretrained(ghn, tmp_path / "new" / "folder")
    for name in (path, path.parent):
        loaded = from_pretrained(name)
        assert same(loaded, ghn) and not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert load_file(path).keys() == ghn.state_dict().keys()


@pytest.mark.parametrize("top", [False, True])
def test_joblib_files_of_the_newer_code_are_loaded(top, tmp_path):
    """A bare state dict; on the hub the tables of the graph stand outside of the first layer."""
    ghn = filled(MAKERS["ghn3"]())
    tables = ("centrality_embed_in", "centrality_embed_out", "input_dist_embed")
    state = {
        key.removeprefix("gnn.0.") if top and key.removeprefix("gnn.0.").startswith(tables) else key: value
        for key, value in ghn.state_dict().items()
    }
    assert ("centrality_embed_in.weight" in state) == top
    joblib.dump(state, tmp_path / "ghn3.pt")
    assert same(from_pretrained(tmp_path / "ghn3.pt"), ghn)


def test_the_older_layout_in_the_newer_code_becomes_linear(tmp_path):
    older, ghn = filled(MAKERS["ghn2"]()), filled(MAKERS["ghn2 of GHN-3"]())
    joblib.dump(dict(older.state_dict()), tmp_path / "ghn2.pt")
    loaded = from_pretrained(tmp_path / "ghn2.pt")
    assert loaded.state_dict()["decoder.conv.2.weight"].shape == (64, 128) and same(loaded, ghn)


@pytest.mark.parametrize("kind", ["ghn2", "ghn1", "mlp", "mlp decoder", "ghn3"])
def test_torch_files_with_a_configuration_are_loaded(kind, tmp_path):
    ghn = filled(MAKERS[kind]())
    names = ("max_shape", "num_classes", "weight_norm", "ve", "layernorm", "hid")
    config = {name: ghn.config[name] for name in (*names, *(("heads",) if kind == "ghn3" else ("hypernet", "decoder")))}
    content = {"state_dict": ghn.state_dict(), "config": config, "epoch": 3, "optimzer": {"state": {}}}
    torch.save(content, tmp_path / "ghn.pt")
    assert same(from_pretrained(tmp_path / "ghn.pt"), ghn)
    torch.save({**content, "state_dict": {f"module.{k}": v for k, v in ghn.state_dict().items()}}, tmp_path / "ddp.pt")
    assert same(from_pretrained(tmp_path / "ddp.pt"), ghn)


def test_published_names_come_from_the_hub_and_then_from_the_cache(hub, tmp_path):
    ghn = filled(MAKERS["ghn3"]())
    joblib.dump(dict(ghn.state_dict()), tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    first = hub.commit(module.REPOSITORY, "main", {"ghn3tm8.pt": content, "other/small.pt": content})
    hub.commit(module.REPOSITORY, "main", {"ghn3tm8.pt": b"another"})
    for name, revision in (("ghn3tm8.pt", first), ("ghn3tm8", first), ("other/small.pt", None)):
        assert same(from_pretrained(name, revision=revision), ghn)
    before = len(hub.requests)
    assert same(from_pretrained("ghn3tm8.pt", revision=first, offline=True), ghn)
    assert len(hub.requests) == before
    with pytest.raises(ValueError, match="is damaged, or no torch or joblib file"):
        from_pretrained("ghn3tm8.pt")


def test_own_files_go_to_the_hub_and_back(hub):
    ghn = filled(MAKERS["ghn2"]())
    commit = push(ghn, "me/ghn")
    assert same(from_pretrained("me/ghn"), ghn) and same(from_pretrained(f"me/ghn@{commit}", offline=True), ghn)


def test_the_older_files_are_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "ADDRESS", tmp_path.as_uri())
    for kind, load in (("ghn1", GHN1), ("ghn2", GHN2)):
        ghn = filled(MAKERS[kind]())
        config = {name: value for name, value in ghn.config.items() if name in ("max_shape", "num_classes", "hid")}
        config |= dict.fromkeys(NORMS, kind == "ghn2")
        torch.save({"state_dict": ghn.state_dict(), "config": config}, tmp_path / f"{kind}_cifar10.pt")
        with pytest.raises(FileNotFoundError, match=rf"{kind}_cifar10\.pt is not there: repeat this with a connection"):
            load("cifar10", offline=True)
        assert same(load("cifar10"), ghn)
        (tmp_path / f"{kind}_cifar10.pt").unlink()
        assert same(load("cifar10"), ghn)
    with pytest.raises(ConnectionError, match=r"ghn2_imagenet\.pt cannot be fetched .*: copy it to"):
        GHN2()
    with pytest.raises(ValueError, match="hypernetworks for imagenet and cifar10, not for 'mnist'"):
        GHN2("mnist")


class Attack:
    """Runs code where files are unpickled naively."""

    def __reduce__(self):
        return (print, ("executed",))


def _broken(ghn, kind):
    state = dict(ghn.state_dict())
    if kind == "nan":
        state["decoder.conv.2.weight"][3, 3] = torch.nan
    if kind == "missing":
        del state["embed.weight"]
    if kind == "shape":
        state["gnn.0.ln1.weight"] = torch.ones(7)
    if kind == "unexpected":
        state["gnn.7.more"] = torch.ones(7)
    return {"attack": Attack(), "other": {"weights": [1, 2]}}.get(kind, state)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("nan", r"has weights that are not finite: decoder\.conv\.2\.weight; fetch it again"),
        ("missing", r"is no hypernetwork: it lacks embed\.weight"),
        ("shape", r"does not fit its configuration: gnn\.0\.ln1\.weight: expected \(16,\), got \(7,\)"),
        ("unexpected", r"does not fit its configuration: unexpected gnn\.7\.more"),
        ("attack", r"asks for .*builtin.*\.print.*nothing was run"),
        ("other", "holds no state dict of a hypernetwork"),
    ],
)
@pytest.mark.parametrize("write", [joblib.dump, torch.save], ids=["joblib", "torch"])
def test_files_that_are_wrong_are_named(kind, match, write, tmp_path, capsys):
    path = tmp_path / "ghn.pt"
    write(_broken(filled(MAKERS["ghn3"]()), kind), path)
    with pytest.raises(ValueError, match=rf"ghn\.pt:? {match}"):
        from_pretrained(path)
    assert "executed" not in capsys.readouterr().out


def test_wrong_names_folders_and_settings_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no file ghn4\.pt, .* there are digits, ghn3xlm16\.pt, .*ghn2_cifar10\.pt"
    ):
        from_pretrained("ghn4.pt", offline=True)
    with pytest.raises(FileNotFoundError, match=r"is a folder without ghn\.safetensors: give a file"):
        from_pretrained(tmp_path)
    path = save_pretrained(filled(MAKERS["ghn3"]()), tmp_path)
    with pytest.raises(ValueError, match=r"embed\.weight: expected \(15, 32\), got \(15, 16\)"):
        from_pretrained(path, hid=32)
    with pytest.raises(ValueError, match=r"the configuration does not fit: .*'speed'"):
        from_pretrained(path, speed=3)
    truncate(path)
    with pytest.raises(ValueError, match="is truncated or damaged"):
        from_pretrained(path)


def test_norms_of_predicted_models_are_checked():
    assert get_metadata("ghn3tm8.pt", "resnet50", "accuracy") == 10.442
    assert len(get_metadata()) == 74 and get_metadata("ghn2.pt", "resnet50")["accuracy"] == 1.08
    model = torchvision_model("squeezenet1_1")
    found = norm_check(model, "squeezenet1_1")
    assert not found.passed and found.published == 71.417
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(found.published / found.norm)
    assert norm_check(model, "squeezenet1_1").passed
    for arguments, match in ((("ghn9.pt",), "ghn9"), (("ghn2.pt", "net"), "'net'"), (("ghn2.pt", "vgg11", "x"), "'x'")):
        with pytest.raises(KeyError, match=match):
            get_metadata(*arguments)


@pytest.fixture
def saved(tmp_path):
    """A tiny hypernetwork for 10 classes in a folder."""
    return save_pretrained(filled(MAKERS["ghn3"]()), tmp_path / "ghn").parent


@pytest.mark.parametrize("adjust", [False, True])
def test_the_command_writes_what_the_library_predicts(saved, adjust, tmp_path, capsys):
    out = tmp_path / "net.safetensors"
    arguments = ["predict", "squeezenet1_1" if not adjust else "resnet18", "-o", str(out), "--weights", str(saved)]
    assert main([*arguments, *(["--adjust", "cifar"] if adjust else []), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    from ghn import adjust_net

    model = torchvision_model("squeezenet1_1" if not adjust else "resnet18", 10)
    model = from_pretrained(saved)(adjust_net(model) if adjust else model)
    written = load_file(out)
    assert written.keys() == model.state_dict().keys()
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(written[name], value, rtol=0, atol=1e-6, msg=name)
    assert main(arguments) == 0
    assert "numbers predicted" in capsys.readouterr().out


def test_the_command_names_what_is_wrong_in_one_line(saved, tmp_path, capsys):
    out, taken, folder = tmp_path / "x.safetensors", tmp_path / "taken", tmp_path / "folder.safetensors"
    taken.touch()
    folder.mkdir()
    for arguments, parts in (
        (["resnet18", "-o", out, "--weights", "ghn5.pt"], ["no file ghn5.pt", "ghn3tm8.pt"]),
        (["resnet18", "-o", out, "--weights", tmp_path], ["is a folder without ghn.safetensors"]),
        (["resnet18", "-o", out, "--weights", saved, "--num-classes", "7"], ["fc.weight has 7 outputs"]),
        (["resnet18", "-o", out, "--weights", saved, "--num-classes", "0"], ["num_classes must be at least 1, got 0"]),
        (["resnet18", "-o", out, "--weights", saved, "--seed", "-1"], ["seed must be from 0 to 2**63 - 1, got -1"]),
        (["resnet18", "-o", out, "--weights", saved, "--input", "-2", "3"], ["sizes that are not negative, got -2 3"]),
        (["resnet18", "-o", tmp_path / "no" / "x.safetensors", "--weights", saved], ["there is no folder"]),
        (["resnet18", "-o", tmp_path / "x.txt", "--weights", saved], ["x.txt: give a file *.safetensors"]),
        (["resnet18", "-o", saved / "ghn.safetensors" / "x.safetensors", "--weights", saved], ["there is no folder"]),
        (
            ["resnet18", "-o", taken, "--weights", saved],
            [str(taken), "exists and is no folder: give a file *.safetens"],
        ),
        (["resnet18", "-o", folder, "--weights", saved], ["folder.safetensors, which is a folder"]),
        (["resnet81", "-o", out, "--weights", saved], ["resnet81"]),
    ):
        assert main(["predict", *map(str, arguments)]) == 1
        captured = capsys.readouterr()
        assert not captured.out and captured.err.startswith("ghn: ") and captured.err.count("\n") == 1
        assert all(part in captured.err for part in parts), captured.err
    assert not out.exists()
