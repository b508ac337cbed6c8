"""Verdicts: planted copies are flagged, unseen runs are not."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from gpt_diffusion import generate, novelty_report
from gpt_diffusion.cli import main
from gpt_diffusion.trust import _jaccard, _limit
from safetensors.torch import save_file
from support.reliability import truncate
from zoo_common.index import split_of
from zoo_common.layout import ParameterLayout
from zoo_common.symmetry import Symmetry
from zoo_common.tasks import get_task
from zoo_common.zoo import Run, Zoo

TASK = get_task("digits_loss")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """150 digits runs that learn something; a third is unseen."""
    path = tmp_path_factory.mktemp("trust") / "zoo"
    options = {"runs": 150, "steps": 150, "save_count": 12, "split": (0.6, 0.2, 0.2)}
    generate("digits", path, strategy="stacked", progress=False, **options)
    return Zoo.open(path)


@pytest.fixture(scope="module")
def symmetry():
    return TASK.symmetry()


def rescaled(vectors, generator):
    """What enters each hidden unit times a positive factor, what leaves it divided by it."""
    vectors = vectors.clone()
    views = ParameterLayout.from_module(TASK.constructor()).unflatten(vectors)
    factor = torch.exp(torch.randn(len(vectors), 10, generator=generator))
    views["fc1.weight"] *= factor[..., None]
    views["fc1.bias"] *= factor
    views["fc2.weight"] /= factor[:, None]
    return vectors


def noisy(vectors, level, generator):
    """Noise of ``level`` times the norm of each network."""
    noise = torch.randn(vectors.shape, generator=generator)
    return vectors + level * vectors.norm(dim=1, keepdim=True) * noise / noise.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("checkpoint", [0, 3, 7, -1])
def test_planted_copies_are_flagged(zoo, symmetry, checkpoint):
    """Exact, permuted, rescaled, both, and noisy; of initialisations, intermediate and last checkpoints."""
    generator = torch.Generator().manual_seed(checkpoint)
    runs = zoo.split("train")[:12]
    copies = zoo.params.gather(runs, np.full_like(runs, checkpoint))
    copies[2:4] = symmetry.permute(copies[2:4], generator)
    copies[4:6] = rescaled(copies[4:6], generator)
    copies[6:8] = rescaled(symmetry.permute(copies[6:8], generator), generator)
    copies[8:] = symmetry.balance(copies[8:])
    for row, level in enumerate((0.02, 0.1, 0.3, 0.5), start=8):
        copies[row : row + 1] = noisy(symmetry.permute(copies[row : row + 1], generator), level, generator)
    report = novelty_report(copies, zoo, TASK)
    assert [sample.run for sample in report.samples] == [zoo.run_ids[run] for run in runs]
    assert [sample.verdict for sample in report.samples[:9]] == ["copy"] * 9
    assert all(sample.verdict in ("copy", "near copy") for sample in report.samples)
    steps = [zoo.steps[int(run), checkpoint] for run in runs[:8]]
    assert [sample.step for sample in report.samples[:8]] == steps
    assert all(sample.error_overlap == pytest.approx(1) for sample in report.samples[:8])
    assert report.counts["new"] == 0
    assert f"copy of {zoo.run_ids[runs[0]]} at step {steps[0]}" in report.text()


def test_steps_between_two_stored_checkpoints_are_flagged(zoo, symmetry):
    runs = zoo.split("train")[:8]
    between = (zoo.params.gather(runs, np.full_like(runs, 8)) + zoo.params.gather(runs, np.full_like(runs, 9))) / 2
    report = novelty_report(symmetry.permute(between, torch.Generator().manual_seed(0)), zoo, TASK)
    assert [sample.run for sample in report.samples] == [zoo.run_ids[run] for run in runs]
    assert report.counts["new"] == 0


@pytest.mark.parametrize("checkpoint", [0, 5, 8, -1])
def test_runs_that_the_training_has_not_seen_are_new(zoo, tmp_path, checkpoint):
    """Runs of another seed: they are neither learned from nor calibrated with."""
    options = {"runs": 50, "steps": 150, "save_count": 12, "seed": 1}
    generate("digits", tmp_path / "others", strategy="stacked", progress=False, **options)
    others = Zoo.open(tmp_path / "others")
    report = novelty_report(others.params.gather(range(50), [checkpoint] * 50), zoo, TASK)
    assert report.counts == {"copy": 0, "near copy": 0, "new": 50}
    assert report.verdict == "all 50 new: no network repeats a training checkpoint"
    assert 0.9 < report.summary()["median_distance_to_unseen"] < 1.1
    assert 0.8 < report.diversity.ratio < 1.25


def test_identical_samples_have_no_diversity(zoo, symmetry):
    one = zoo.params.gather(zoo.split("test")[:1], [-1]).expand(4, -1)
    report = novelty_report(symmetry.permute(one.contiguous()), zoo, TASK)
    assert report.diversity.samples < 1e-3 and report.diversity.ratio < 1e-3


def test_baselines_and_overlaps_are_those_of_a_plain_loop(zoo, symmetry):
    runs = zoo.split("test")[:2]
    networks = zoo.params.gather(runs, [-1, -1])
    report = novelty_report(networks, zoo, TASK)
    images, labels = TASK.data_fn()

    def wrong(vector):
        network = TASK.constructor()
        zoo.layout.load_into(network, vector)
        with torch.no_grad():
            return set((network(images).argmax(1) != labels).nonzero()[:, 0].tolist())

    for vector, sample in zip(networks, report.samples, strict=True):
        run = zoo.index(sample.run)
        checkpoint = zoo.steps[run].tolist().index(sample.step)
        ours, theirs = wrong(vector), wrong(zoo.params[run, checkpoint])
        assert sample.error_overlap == pytest.approx(len(ours & theirs) / len(ours | theirs))
        network = TASK.constructor()
        zoo.layout.load_into(network, vector)
        assert sample.metric == pytest.approx(TASK.test_fn(images, labels, network), rel=1e-5)
        assert 0 <= sample.unrelated_error_overlap <= 1
    assert report.baselines["checkpoint_plus_noise"] > report.baselines["samples"]
    assert set(report.baselines) == {"samples", "nearest_checkpoint", "checkpoint_plus_noise", "average_of_checkpoints"}
    json.dumps(report.to_json(), allow_nan=False)


def test_jaccard_of_sets():
    a, b = (
        torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool(),
        torch.tensor([[0, 1, 1], [0, 0, 0], [0, 1, 0]]).bool(),
    )
    assert _jaccard(a, b).tolist() == pytest.approx([1 / 3, 1, 0])


def test_the_limit_keeps_its_rate_of_false_alarms():
    """Simulated: shortfalls below 1 with an exponential tail."""
    generator = np.random.default_rng(0)
    for count in (5, 20, 60):
        draws = generator.exponential(0.02, size=(20_000, count + 1))
        lowest, other = 1 - draws[:, :-1].max(1), 1 - draws[:, -1]
        k = (1 - _limit(1.0, 0.99, count)) / 0.01
        assert 0.003 < np.mean(other <= 1 - k * (1 - lowest)) < 0.007  # 0.005 and 4 standard errors
    assert _limit(0.8, 0.99, 60) == 0.8


def other_zoo(path, ids, *, size=64, metrics=("val_loss",), split=(1.0, 0.0, 0.0)):
    """A zoo of random networks."""
    network = torch.nn.Sequential(torch.nn.Linear(size, 10))
    layout = zoo_layout() if size == 64 else ParameterLayout.from_module(network)
    zoo = Zoo.create(path, layout=layout, task="digits", split=split)
    values = {name: np.ones(2) for name in metrics}
    zoo.append([Run(id=i, params=torch.randn(2, layout.size), steps=np.arange(2), metrics=values) for i in ids])
    return zoo


def zoo_layout():
    return ParameterLayout.from_module(TASK.constructor())


def test_one_training_run_is_no_reason_for_alarm(tmp_path, zoo):
    fractions = (0.2, 0.4, 0.4)
    ids = [f"run{i}" for i in range(100)]
    train = next(i for i in ids if split_of(i, fractions) == "train")
    unseen = [i for i in ids if split_of(i, fractions) != "train"][:9]
    single = Zoo.create(tmp_path / "zoo", layout=zoo.layout, task="digits", split=fractions)
    single.append([dataclasses.replace(zoo.run(k), id=name) for k, name in enumerate([train, *unseen])])
    assert len(single.split("train")) == 1
    report = novelty_report(zoo.params.gather([20, 21, 22], [-1, -1, -1]), single, TASK)
    assert report.calibration.contrast_below is None
    assert all(sample.contrast is None and sample.verdict == "new" for sample in report.samples)
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"split": (0.0, 0.5, 0.5)}, "no training runs"),
        ({"split": (1.0, 0.0, 0.0)}, "no test or validation runs"),
        ({"split": (0.5, 0.25, 0.25), "metrics": ("accuracy",)}, "no metric 'val_loss'; the zoo has accuracy"),
        ({"split": (0.5, 0.25, 0.25), "size": 63}, "networks of 640 weights, got"),
    ],
)
def test_zoos_that_cannot_answer_are_named(tmp_path, options, match):
    poor = other_zoo(tmp_path / "zoo", [f"run{i}" for i in range(30)], **options)
    with pytest.raises(ValueError, match=match):
        novelty_report(torch.randn(2, 760), poor, TASK)


def test_non_finite_networks_are_refused(zoo):
    with pytest.raises(ValueError, match="NaN or infinite"):
        novelty_report(torch.full((1, 760), torch.nan), zoo, TASK)
    with pytest.raises(ValueError, match=r"beyond 1e\+15"):
        novelty_report(torch.full((1, 760), 1e30), zoo, TASK)


def test_networks_of_enormous_weights_are_judged(zoo):
    report = novelty_report(torch.full((1, 760), 1e14), zoo, TASK)
    assert report.counts["new"] == 1


def call(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_networks_in_a_file_are_judged(capsys, zoo, tmp_path):
    path, out = tmp_path / "nets.safetensors", tmp_path / "report.json"
    runs = zoo.split("train")[:3]
    stacked = zoo.layout.unflatten(zoo.params.gather(runs, [-1, 2, 0]))
    save_file({name: weight.contiguous() for name, weight in stacked.items()}, path)
    status, text, _ = call(capsys, "novelty", path, "--zoo", zoo.path, "-o", out)
    assert status == 0 and "of 3 networks: 3 copies" in text
    assert len(text.splitlines()) <= 24
    status, text, err = call(capsys, "novelty", path, "--zoo", zoo.path, "--json")
    assert (status, err) == (0, "")
    assert json.loads(text) == json.loads(out.read_text())
    save_file(zoo.weights(int(runs[0]), 1), path)
    status, text, _ = call(capsys, "novelty", path, "--zoo", zoo.path)
    assert status == 0 and f"copy of {zoo.run_ids[runs[0]]} at step {zoo.steps[int(runs[0]), 1]}" in text


def test_unreadable_networks_are_named(capsys, zoo, tmp_path):
    def refused(*arguments):
        status, out, err = call(capsys, "novelty", *arguments)
        assert (status, out, len(err.splitlines())) == (1, "", 1), err
        return err

    path = tmp_path / "nets.safetensors"
    save_file(zoo.weights(0, 0), path)
    assert "--zoo" in refused(path)
    assert "there is no zoo" in refused(path, "--zoo", tmp_path / "absent")
    assert "not a model" in refused(path, "--zoo", zoo.path, "--samples", path)
    save_file({"weight": torch.zeros(2)}, path)
    assert "missing fc1.weight" in refused(path, "--zoo", zoo.path)
    save_file({name: torch.full_like(w, torch.inf) for name, w in zoo.weights(0, 0).items()}, path)
    assert "NaN or infinite" in refused(path, "--zoo", zoo.path)
    truncate(path)
    assert "not a readable safetensors file" in refused(path, "--zoo", zoo.path)
    assert "absent" in refused(tmp_path / "absent", "--zoo", zoo.path)
    assert "does not exist" in refused(path, "--zoo", zoo.path, "-o", tmp_path / "no" / "report.json")


def test_convolutional_networks_too(tmp_path):
    """Two groups of units with weights between them: planted copies among random networks."""
    task = get_task("cifar10_loss")
    symmetry = Symmetry.from_module(task.constructor(), torch.zeros(2, 3, 8, 8))
    from gpt_diffusion.novelty import nearest_checkpoints

    networks = [task.constructor() for _ in range(40)]
    layout = ParameterLayout.from_module(networks[0])
    params = layout.stack(networks).detach()
    zoo = Zoo.create(tmp_path / "zoo", layout=layout)
    zoo.append([Run(id=f"run{i}", params=params[i : i + 1], steps=np.arange(1), metrics={}) for i in range(40)])
    generator = torch.Generator().manual_seed(0)
    copies = symmetry.permute(noisy(params[3:6], 0.3, generator), generator)
    found = nearest_checkpoints(copies, zoo, np.arange(40), symmetry)
    assert found.run.tolist() == [3, 4, 5]
    assert (found.distance / found.other_distance).max() < 0.8
