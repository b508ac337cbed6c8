import ast
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from ghn import Graph, from_pretrained
from ghn.cli import main
from ghn.config import TrainConfig, read_config
from ghn.images import augmented, load_images
from ghn.model import GHN, GHN3
from ghn.training import STATE, Training, forecast, judge, train
from support.golden import assert_close, fill
from support.hypernetworks import stored_architecture
from support.reliability import assert_same_files, flip_bit
from torch import nn

_spec = importlib.util.spec_from_file_location("plain", Path(__file__).parents[1] / "benchmarks" / "plain.py")
plain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)

TINY = TrainConfig(
    num_nets=3, hid=8, layers=1, heads=2, max_shape=(4, 4, 3, 3), epochs=1, meta_batch=2, batch_size=200, warmup_epochs=1,
    log_every=1, save_every=2, device="cpu",
)  # fmt: skip


@pytest.mark.golden("deepnets_training.json")
@pytest.mark.parametrize("kind", ["ghn1", "ghn2", "mlp", "ghn3"])
def test_a_meta_training_step_is_the_published_one(golden, kind):
    case = golden.document[f"{kind}_step"]
    ghn, keys = _filled(_published(case["config"])), "ghn3" if kind == "ghn3" else "ghn2"
    nets, graphs = [], []
    for i in case["nets"]:
        drawn = stored_architecture(golden.path.parent, "train", i, C=case["net_C"], fc_dim=case["net_fc_dim"])
        graphs.append(Graph(drawn.build(keys=keys), dialect=ghn.dialect))
        nets.append(drawn.build_light(keys=keys))
    if kind == "ghn3":  # the published code decodes a batch from padded rows, so that the order of the nodes matters
        rows = json.loads((Path(__file__).parent / "golden/deepnets_sample/train_rows.json").read_text())
        graphs = [_reordered(graph, rows[str(i)]) for i, graph in zip(case["nets"], graphs, strict=True)]
        ghn.embeddings = functools.partial(plain.embeddings, ghn, keep_padding=True)
    # Where the input of a ReLU is zero but for rounding, float32 alone decides which gradient was published: some of
    # the roundings must give it.
    weights, best = ghn.state_dict(), []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        rounded = {key: w * (1 + 1e-7 * (seed > 0) * _noise(w, generator)) for key, w in weights.items()}
        ghn.load_state_dict(rounded)
        means = judge(nets, graphs, ghn, fill("images", (8, 3, 32, 32)), torch.arange(8))
        penalty = case.get("predparam_wd", 0) * means.norm
        assert_close(means.loss + penalty, case["loss"], what="loss")
        assert_close(penalty * len(nets), case.get("loss_predwd_sum_over_nets", 0.0), what="penalty")
        assert_close(means.accuracy, case["top1"] / 100, what="accuracy")
        ghn.zero_grad()
        (means.loss + penalty).backward()
        norm = nn.utils.clip_grad_norm_(ghn.parameters(), 5.0)
        best.append((abs(norm / case["grad_norm_before_clip"] - 1).item(), *_differences(ghn, case)))
        if max(best[-1]) <= 1e-4:
            return
    raise AssertionError(f"largest differences of gradients: {best}")


def _noise(like, generator):
    return torch.randn(like.shape, generator=generator)


def _differences(ghn, case):
    """How far gradients are from the published ones: their norms and their first elements, relative to the norms or 0.1."""
    for name, (_, norm, first) in case["grads_after_clip"].items():
        grad = ghn.get_parameter(name).grad
        found = torch.stack([grad.norm(), *grad.flatten()[: len(first)]])
        yield (found - torch.tensor([norm, *first])).abs().max().item() / (norm + 0.1)


@pytest.mark.golden("deepnets_training.json")
def test_learning_rates_are_the_published_ones(golden):
    for name, expected in golden.document["lr_per_epoch"].items():
        kind, epochs, lr, options = name.split("|")
        found = ast.literal_eval(options or "{}")
        config = TrainConfig(
            scheduler=kind.partition("-steps")[0].partition("-init")[0],
            epochs=int(epochs.removeprefix("epochs=")),
            lr=float(lr.removeprefix("lr=")),
            warmup_epochs=int(_after(kind, "-steps", "5")),
            warmup_lr=float(_after(kind, "-init_lr", "1e-5")),
            lr_steps=tuple(found.get("milestones", [found.get("step_size", 1)])),
            gamma=found.get("gamma", 0.1),
        )
        rates = [config.learning_rate(epoch) for epoch in range(len(expected))]
        assert_close(torch.tensor(rates, dtype=torch.float64), expected, "float32", name)


def test_a_run_writes_a_hypernetwork_that_loads(tmp_path):
    report = train(TINY, tmp_path / "run", quiet=True)
    assert report.finished and report.step == 5 and report.skipped == 0 and math.isfinite(report.loss)
    ghn = from_pretrained(tmp_path / "run")
    assert ghn.config == TINY.ghn_config()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert read_config(tmp_path / "run/config.yaml") == TINY


def test_stopped_and_resumed_equals_uninterrupted(tmp_path):
    train(TINY, tmp_path / "whole", quiet=True)
    parts = [train(TINY, tmp_path / "parts", resume=i > 0, limit_seconds=0, quiet=True) for i in range(5)]
    assert [part.step for part in parts] == [1, 2, 3, 4, 5]
    assert_same_files(tmp_path / "parts", tmp_path / "whole", except_for=[STATE])


@pytest.mark.parametrize("hypernet", ["ghn3", "ghn2"])
def test_one_meta_batch_is_learned(hypernet):
    """The loss on the same networks falls, so gradients reach the hypernetwork through them."""
    config = dataclasses.replace(TINY, hypernet=hypernet, num_nets=2, epochs=4, lr=0.01, batch_size=100)
    run = Training(config)
    losses = []
    for _ in range(30):
        run.advance()
        losses.append(run.sums[0].item())
        run.sums.zero_()
    assert sum(losses[-8:]) < sum(losses[:8]) - 0.4


def test_updates_that_are_not_finite_are_left_out_and_counted(monkeypatch):
    run = Training(TINY)
    before = {name: value.clone() for name, value in run.ghn.state_dict().items()}
    monkeypatch.setattr("ghn.training.judge", lambda *given: judge(*given)._replace(loss=_nan(given[2])))
    run.advance()
    assert (run.step, run.skipped) == (1, 1)
    assert all(torch.equal(value, before[name]) for name, value in run.ghn.state_dict().items())
    run.skipped = 10
    with pytest.raises(ValueError, match=r"not finite in 11 updates.*lower lr \(0.006\)"):
        run.advance()


def test_bf16_and_a_forecast():
    found = forecast(dataclasses.replace(TINY, precision="bf16"), timed_steps=1)
    assert found.steps == 5 and found.seconds > 0 and found.state_bytes == 16 * found.parameters


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(TINY, tmp_path / "run", resume=True, quiet=True)
    train(TINY, tmp_path / "run", limit_seconds=0, quiet=True)
    with pytest.raises(FileExistsError, match="already holds a run; use --resume"):
        train(TINY, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"lr \(0.006 there, 0.1 given\)"):
        train(dataclasses.replace(TINY, lr=0.1), tmp_path / "run", resume=True, quiet=True)
    flip_bit(tmp_path / "run" / STATE)
    with pytest.raises(ValueError, match=STATE):
        train(TINY, tmp_path / "run", resume=True, quiet=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "0"], "lr must be positive, got 0.0"),
        (["--lr", "nan"], "lr must be positive, got nan"),
        (["--grad-clip", "-1"], "grad_clip must not be negative, got -1.0"),
        (["--hid", "33"], "hid must be a multiple of 4, and rank not negative, got 33 and 0"),
        (["--layers", "0"], "layers must be at least 1, got 0"),
        (["--seed", "-1"], "seed must be from 0 to 2**63 - 1, got -1"),
        (["--limit-seconds", "nan"], "limit_seconds must not be negative, got nan"),
        (["--lr-steps", "0"], "lr_steps must be numbers from 1, and at least one, got (0,)"),
        (["--meta-batch", "0"], "meta_batch must be at least 1, got 0"),
        (["--num-nets", "2"], "num_nets (2) must not be smaller than meta_batch (4)"),
        (["--batch-size", "2000"], "batch_size is 2000, there are 1000 training images"),
        (["--data", "cifar10"], "CIFAR-10: no data folder given"),
        (["--data", "cifar10", "--data-dir", "absent"], "there is no folder"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, capsys, arguments, message):
    assert main(["train", "--out", str(tmp_path / "run"), *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_run_in_the_place_of_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "run").touch()
    assert main(["train", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == f"ghn: {tmp_path / 'run'} is a file: give another folder as --out\n"


def test_data_that_are_missing_are_fetched_if_wanted(tmp_path, monkeypatch):
    def fetch(root, download):
        raise RuntimeError(f"no network for {root.name}, {download}")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fetch)
    with pytest.raises(FileNotFoundError, match=f"no network for {tmp_path.name}, True"):
        load_images("cifar10", tmp_path, download=True)


def test_the_command_prints_a_forecast_and_a_report(tmp_path, capsys):
    options = ["--num-nets", "3", "--hid", "8", "--heads", "2", "--layers", "1", "--max-shape", "4", "4", "3", "3"]
    options += ["--meta-batch", "2", "--batch-size", "500", "--epochs", "1", "--json", "--device", "cpu"]
    assert main(["train", "--out", str(tmp_path / "run"), *options, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    assert not (tmp_path / "run").exists()
    assert main(["train", "--out", str(tmp_path / "run"), *options]) == 0
    assert json.loads(capsys.readouterr().out)["finished"]


def test_digits_are_enlarged_and_repeated():
    images = load_images("digits").train.images
    assert images.shape == (1000, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    assert images.mean().abs() < 0.01


def test_augmented_images_are_shifted_or_mirrored_ones():
    images = torch.arange(1, 33).expand(256, 2, 32, 32).float()  # the value of a pixel is its column, from 1
    found = augmented(images, torch.Generator().manual_seed(0))
    seen = set()
    for row in found[:, 0, 16].tolist():
        steps = {b - a for a, b in itertools.pairwise(row) if a and b}
        assert len(steps) == 1 and row.count(0) <= 4
        seen.add((steps.pop(), row.index(16)))
    assert len(seen) == 18


def _after(text, marker, default):
    return text.partition(marker)[2].partition("-init")[0] or default if marker in text else default


def _nan(ghn):
    return torch.nan * sum(parameter.sum() for parameter in ghn.parameters())


def _published(config):
    """The hypernetwork of a golden's configuration; those of GHN-3 name a ``hypernet`` that is not used."""
    config = dict(config)
    if "heads" not in config:
        return GHN(**config)
    names = ("max_shape", "num_classes", "hid", "heads", "layers", "is_ghn2", "weight_norm", "ve", "layernorm")
    return GHN3(**{name: config[name] for name in names})


def _reordered(graph, rows):
    """The same graph with node ``rows[i]`` at position i."""
    flow = graph.edges[graph.edges[:, 2] == 1][:, :2]
    edges = torch.argsort(torch.tensor(rows))[flow]
    columns = ([values[i] for i in rows] for values in (graph.node_types, graph.node_params, graph.node_shapes))
    return Graph.from_nodes(*columns, edges.tolist(), n_cells=graph.n_cells)


def _filled(ghn):
    """Weights by the recipe of the golden training steps."""
    for name, value in ghn.state_dict().items():
        if value.ndim > 1:
            values = fill(name, tuple(value.shape), (value.shape[-1] if "embed" in name else value[0].numel()) ** -0.5)
        else:
            is_scale = name.endswith("weight") and isinstance(ghn.get_submodule(name.rpartition(".")[0]), nn.LayerNorm)
            values = fill(name, tuple(value.shape), 0.1) + float(is_scale)
        value.copy_(values)
    return ghn.train()


def test_a_short_training_does_not_consist_of_warming_up():
    assert TrainConfig(epochs=1).learning_rate(0) == TrainConfig().lr
    assert TrainConfig(epochs=2, warmup_epochs=5).learning_rate(1) == TrainConfig().lr
    assert TrainConfig(epochs=10, warmup_epochs=5).learning_rate(0) == TrainConfig().warmup_lr
