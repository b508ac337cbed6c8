import dataclasses
import json
from pathlib import Path

import ghn
import pytest
import torch
from ghn import compare, from_pretrained, load_images
from ghn.cli import main
from ghn.config import TrainConfig
from ghn.evaluation import difference
from ghn.model import build
from scipy.stats import ttest_1samp
from zoo_common.checkpoint import load_checkpoint
from zoo_common.datasets import Part, Splits

BUNDLED = Path(ghn.__file__).parent / "weights" / "digits.safetensors"


@pytest.fixture(scope="module")
def few():
    """A tenth of the digits."""
    return Splits(*(Part(part.images[:100], part.labels[:100]) for part in load_images("digits")))


class Unchanged(torch.nn.Module):
    """A hypernetwork that leaves networks as they are."""

    dialect, device, num_classes = "ghn3", torch.device("cpu"), 10

    def forward(self, net, graph, **options):
        return net


def test_both_networks_are_trained_in_the_same_way(few):
    """Where prediction changes nothing, all differences are exactly zero."""
    found = compare(Unchanged(), few, num_nets=3, quiet=True)
    assert all(one.random == one.predicted for one in found.networks)
    assert all(one.random_trained == one.predicted_trained for one in found.networks)
    assert any(one.random != one.random_trained for one in found.networks)
    assert found.trained == difference([0, 0, 0])


def test_the_interval_is_that_of_student():
    values = [0.1, 0.4, -0.2, 0.3, 0.25]
    found, expected = difference(values), ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_one_network_gives_no_interval(few):
    with pytest.raises(ValueError, match="at least 2 networks, got 1"):
        compare(Unchanged(), few, num_nets=1)


def test_the_bundled_hypernetwork_is_small_and_comes_with_its_recipe():
    assert BUNDLED.stat().st_size <= 2_000_000
    metadata = load_checkpoint(BUNDLED).metadata
    assert metadata["training"] == json.loads(json.dumps(dataclasses.asdict(TrainConfig())))
    assert from_pretrained("digits").config == metadata["ghn"] == TrainConfig().ghn_config()


def test_bundled_predictions_recognise_digits(few):
    found = compare(from_pretrained("digits"), few, num_nets=4, epochs=0, quiet=True)
    assert found.means()["predicted"] > found.means()["random"] + 0.3


@pytest.mark.slow
def test_bundled_predictions_are_ahead_of_random_weights_on_unseen_networks():
    """At once and after an epoch of SGD, each with its own learning rate."""
    digits = load_images("digits")
    found = compare(from_pretrained("digits"), digits, num_nets=20, lrs=(0.01, 0.1, 0.3), seed=1, quiet=True)
    assert found.untrained.low > 0.4
    assert found.trained.low > 0


def test_each_initialisation_is_trained_with_the_rate_that_is_best_for_it(few):
    """Learning rates that cannot train are not chosen, and one alone is taken for both."""
    found = compare(Unchanged(), few, num_nets=2, lrs=(1e-9, 0.1), quiet=True)
    assert found.random_lr == found.predicted_lr == 0.1
    alone = compare(Unchanged(), few, num_nets=2, lrs=(0.1,), quiet=True)
    assert alone.networks == found.networks
    with pytest.raises(ValueError, match="must be positive"):
        compare(Unchanged(), few, lrs=())
    with pytest.raises(ValueError, match="epochs must be at least 0, got -1"):
        compare(Unchanged(), few, epochs=-1)


def test_ghn2_is_judged_too(few):
    config = dataclasses.replace(TrainConfig(), hypernet="ghn2", hid=8, max_shape=(4, 4, 3, 3)).ghn_config()
    found = compare(build(config).eval(), few, num_nets=2, epochs=0, quiet=True)
    assert all(0 <= one.predicted <= 1 for one in found.networks)


def test_the_command_prints_a_table_or_json_and_draws(tmp_path, capsys):
    options = ["eval", "--num-nets", "2", "--epochs", "0", "--device", "cpu"]
    assert main([*options, "--png", str(tmp_path / "eval.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[-1].startswith("predicted - random, as initialised") and "95 % int" in lines[-1]
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["networks"]) == 2 and found["untrained"]["low"] <= found["untrained"]["mean"]


def test_weights_that_do_not_exist_are_one_line(capsys):
    assert main(["eval", "--weights", "digitz"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no file digitz" in line and "there are digits," in line


@pytest.mark.parametrize("name", ["absent/eval.png", "eval.xyz", "."])
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, name):
    for command in (["eval"], ["graph", "resnet18"]):
        assert main([*command, "--png", str(tmp_path / name)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"ghn: --png {tmp_path / name}: ")


def test_hypernetworks_for_other_classes_are_refused(few):
    config = dataclasses.replace(TrainConfig(), hid=8, max_shape=(4, 4, 3, 3)).ghn_config()
    with pytest.raises(ValueError, match="this hypernetwork predicts 7"):
        compare(build({**config, "num_classes": 7}), few, num_nets=2)
