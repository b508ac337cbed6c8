"""Prediction: splits by run, honest intervals, words where there is no number."""

import numpy as np
import pytest
import torch
from sane.features import (
    SPECTRAL,
    available_baselines,
    by_layer,
    layer_axes,
    spectral_features,
    tensor_statistics,
)
from sane.networks import build_network
from sane.prediction import (
    Labelled,
    PropertyPredictor,
    fit_ridge,
    kendall_tau,
    r_squared,
    resample_runs,
    ridge_path,
)
from support.autoencoders import filled_state
from zoo_common import ChannelTokenizer, ParameterLayout


def group(name, runs, per_run=4, seed=0, noise=0.1, d=5):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(runs * per_run, d, generator=rng)
    y = x @ torch.arange(1.0, d + 1) + noise * torch.randn(len(x), generator=rng)
    ids = np.repeat([f"{name}{i}" for i in range(runs)], per_run)
    return Labelled({"good": x, "noise": torch.randn(x.shape, generator=rng)}, {"acc": y.double().numpy()}, ids)


def test_good_features_are_told_from_noise_with_an_interval_of_the_difference():
    predictor = PropertyPredictor(group("a", 20), group("b", 10, seed=1))
    good, noise = predictor.judge(group("c", 10, seed=2))
    assert good.r2 > 0.99 and good.low <= good.r2 <= good.high and good.kendall > 0.9
    assert noise.r2 < 0.3 and noise.difference == pytest.approx(good.r2 - noise.r2)
    assert 0 < noise.difference_low <= noise.difference <= noise.difference_high
    assert good.difference is None and good.runs == 10


def test_intervals_resample_runs_not_checkpoints():
    """Checkpoints that are copies of each other must not make the interval narrower."""
    train, validation = group("a", 20, noise=3), group("b", 10, seed=1, noise=3)
    one = group("c", 12, per_run=1, seed=2, noise=3)
    many = Labelled(*({k: np.repeat(v, 50, 0) if isinstance(v, np.ndarray) else v.repeat_interleave(50, 0) for k, v in part.items()} for part in one[:2]), np.repeat(one.runs, 50))  # fmt: skip
    predictor = PropertyPredictor(train, validation)
    widths = [s.high - s.low for s in (predictor.judge(test)[0] for test in (one, many))]
    assert widths[0] == pytest.approx(widths[1], rel=1e-6)
    weights = resample_runs(many.runs, 10, 0)
    assert all(len(weights[:, many.runs == run].unique(dim=1)[0]) == 1 for run in set(many.runs))


def test_weighted_r2_is_that_of_repeated_rows():
    prediction, target = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    counts = torch.tensor([2, 0, 1, 3, 1, 1])
    repeated = r_squared(prediction.repeat_interleave(counts), target.repeat_interleave(counts))
    torch.testing.assert_close(r_squared(prediction, target, counts[None].double())[0], repeated)


@pytest.mark.parametrize(("n", "d"), [(30, 5), (8, 40)])
def test_one_decomposition_solves_all_strengths(n, d):
    x, y = torch.randn(n, d, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    ones = torch.cat([x, torch.ones(n, 1, dtype=torch.float64)], 1)
    for strength, weights in zip((10.0, 1e-3), ridge_path(x, y, (10.0, 1e-3)), strict=True):
        solved = torch.linalg.solve(ones.T @ ones + strength * torch.eye(d + 1, dtype=torch.float64), ones.T @ y)
        torch.testing.assert_close(weights, solved, rtol=1e-6, atol=1e-8)


def test_the_strength_is_chosen_on_validation_only():
    train, validation = group("a", 5, noise=5, d=15), group("b", 20, seed=1, noise=5, d=15)
    x, y = train.features["good"], torch.from_numpy(train.properties["acc"])
    x_val, y_val = validation.features["good"], torch.from_numpy(validation.properties["acc"])
    fit = fit_ridge(x, y, x_val, y_val)
    on_train = fit_ridge(x, y, x, y)
    assert fit.regularisation > on_train.regularisation == 1e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: np.full_like(y, np.nan), "acc is known for 0 training checkpoints"),
        (lambda y: np.full_like(y, 0.5), "acc is 0.5 for all training checkpoints: nothing to predict"),
    ],
)
def test_targets_without_information_are_told_in_words(change, words):
    train = group("a", 5)
    train = train._replace(properties={"acc": change(train.properties["acc"])})
    predictor = PropertyPredictor(train, group("b", 5, seed=1))
    score = predictor.judge(group("c", 5, seed=2))[0]
    assert np.isnan(score.r2) and words in score.note
    with pytest.raises(ValueError, match="acc is"):
        predictor.predict("good", "acc", train.features["good"])


def test_missing_and_constant_test_targets():
    predictor = PropertyPredictor(group("a", 5), group("b", 5, seed=1))
    test = group("c", 5, seed=2)
    values = test.properties["acc"].copy()
    values[:3] = np.nan
    score = predictor.judge(test._replace(properties={"acc": values}))[0]
    assert score.r2 > 0.9 and score.note == "3 of 20 test checkpoints have no acc"
    score = predictor.judge(test._replace(properties={"acc": np.ones(20)}))[0]
    assert np.isnan(score.r2) and "same for all test checkpoints: no score has a meaning" in score.note


def test_text_is_classified():
    def labelled(name, runs, seed):
        one = group(name, runs, seed=seed)
        values = np.array(["small", "large"])[(one.features["good"][:, 0] > 0).int().numpy()]
        values[0] = ""
        return one._replace(properties={"size": values})

    predictor = PropertyPredictor(labelled("a", 20, 0), labelled("b", 10, 1))
    test = labelled("c", 10, 2)
    good, noise = predictor.judge(test)
    assert good.measure == "accuracy" and good.low <= good.r2 <= good.high and good.r2 > 0.85
    assert noise.r2 < 0.7 and noise.difference_low > 0 and np.isnan(good.kendall)
    assert good.note == "1 of 40 test checkpoints have no size"
    assert np.isnan(predictor.judge(test, elsewhere={"zoo": test})[0].elsewhere["zoo"][1])  # classes have no ranks
    predicted = predictor.predict("good", "size", test.features["good"])[1:]
    right = np.array([predictor.classes["size"][int(k)] for k in predicted]) == test.properties["size"][1:]
    assert right.mean() == pytest.approx(good.r2)
    values = test.properties["size"].copy()
    values[1] = "tiny"
    score = predictor.judge(test._replace(properties={"size": values}))[0]
    assert "tiny is no size of a training run: counted as wrong" in score.note
    same = [labelled(name, 5, 0)._replace(properties={"size": np.full(20, "small")}) for name in "ab"]
    assert PropertyPredictor(*same).judge(test)[0].measure == "accuracy"


def test_targets_far_from_zero_are_no_harder():
    """The published ridge shrinks the constant too; centered targets make the strongest ridge predict the mean."""
    groups = [group(name, runs, seed=seed) for name, runs, seed in (("a", 20, 0), ("b", 10, 1), ("c", 10, 2))]
    far = [g._replace(properties={"acc": g.properties["acc"] + 1e3}) for g in groups]
    near, moved = (PropertyPredictor(*part[:2]).judge(part[2]) for part in (groups, far))
    for a, b in zip(near, moved, strict=True):
        assert b.r2 == pytest.approx(a.r2, abs=1e-6)


def test_other_zoos_are_judged_by_the_same_predictor():
    predictor = PropertyPredictor(group("a", 20), group("b", 10, seed=1))
    other = group("d", 10, seed=5)
    shifted = other._replace(properties={"acc": other.properties["acc"] + 100})
    score = predictor.judge(group("c", 10, seed=2), elsewhere={"same": other, "shifted": shifted})[0]
    assert score.elsewhere["same"][0] > 0.9
    assert score.elsewhere["shifted"][0] < -1 and score.elsewhere["shifted"][1] > 0.9


def test_other_zoos_without_information_are_told_in_words():
    predictor = PropertyPredictor(group("a", 20), group("b", 10, seed=1))
    other = group("d", 10, seed=5)
    values = np.where(np.arange(40) < 3, np.nan, 0.5)
    score = predictor.judge(group("c", 10, seed=2), elsewhere={"zoo": other._replace(properties={"acc": values})})[0]
    assert np.isnan(score.elsewhere["zoo"][0]) and "3 of 40 checkpoints of zoo have no acc" in score.note
    assert "acc is the same for all checkpoints of zoo that have it: no score has a meaning" in score.note
    text = other._replace(properties={"acc": np.full(40, "high")})
    with pytest.raises(ValueError, match="acc is text in one group or zoo and a number in another"):
        predictor.judge(group("c", 10, seed=2), elsewhere={"zoo": text})


def test_groups_that_are_too_small_or_overlap_are_refused():
    with pytest.raises(ValueError, match="the validation split has 1 runs, at least 2 are needed"):
        PropertyPredictor(group("a", 5), group("b", 1))
    with pytest.raises(ValueError, match="run a0 is in the training and in the validation group: split by run"):
        PropertyPredictor(group("a", 5), group("a", 5))
    with pytest.raises(ValueError, match="test run b0 took part in fitting"):
        PropertyPredictor(group("a", 5), group("b", 5)).judge(group("b", 3))


def test_kendall_tau_of_constants_is_nan():
    assert np.isnan(kendall_tau(torch.zeros(4), torch.arange(4.0)))
    assert kendall_tau(torch.arange(4.0), torch.arange(4.0)) == 1


def test_tensor_statistics_keep_biases_apart_from_weights():
    layout = ParameterLayout.from_state_dict({"a.weight": torch.zeros(3, 2), "a.bias": torch.zeros(3)})
    vectors = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    found = tensor_statistics(vectors, layout)
    weights, bias = vectors.double().numpy()[:, :6], vectors.double().numpy()[:, 6:]
    for k, x in enumerate((weights, bias)):
        expected = np.stack([x.mean(1), np.log(x.std(1)), np.log(np.abs(x).mean(1))], 1)
        np.testing.assert_allclose(found[:, 3 * k : 3 * k + 3], expected, rtol=1e-12)
    assert tensor_statistics(torch.zeros(1, 9), layout).isfinite().all()


def test_summaries_along_principal_axes_do_not_depend_on_how_latents_are_turned():
    rng = torch.Generator().manual_seed(0)
    layout = ParameterLayout.from_state_dict({"a.weight": torch.zeros(6, 2), "b.weight": torch.zeros(1, 6)})
    tokenizer = ChannelTokenizer.from_layout(layout, 6)
    latents = torch.randn(20, 7, 3, generator=rng).double() * torch.tensor([3.0, 2.0, 1.0])
    turn = torch.linalg.qr(torch.randn(3, 3, generator=rng).double())[0]

    def summary(z, axes):
        means, spreads = by_layer(z, tokenizer, axes)[:, :6].chunk(2, dim=1)
        return torch.cat([means.abs(), spreads], 1)  # axes have no sign

    axes, turned_axes = (layer_axes(z.split(8), tokenizer) for z in (latents, latents @ turn))
    torch.testing.assert_close(summary(latents, axes), summary(latents @ turn, turned_axes), rtol=1e-9, atol=1e-9)
    assert (summary(latents, None) - summary(latents @ turn, None)).abs().max() > 0.1
    first = latents[:, :6] - latents[:, :6].mean(1, keepdim=True)
    spread = torch.from_numpy(np.linalg.eigvalsh(np.einsum("nki,nkj->ij", first, first)))
    along = (first @ axes[0]).square().sum((0, 1))
    torch.testing.assert_close(along, spread)
    assert torch.equal(axes[1].abs(), torch.eye(3).double())  # a layer of one token has no spread: any axes do
    assert by_layer(latents, tokenizer, axes).isfinite().all()


def test_spectra_are_those_of_weightwatcher():
    """Its version 0.7.7 gave these means; the first layer has matrices of one row, 25 of them."""
    config = {"model::type": "CNN", "model::channels_in": 1, "model::o_dim": 10}
    state = filled_state(build_network(config).state_dict(), "ww/c/")
    layout = ParameterLayout.from_state_dict(state)
    found = spectral_features(layout.flatten(state)[None], ChannelTokenizer.from_layout(layout), summary=True)[0]
    values = (0.3382443105, 5.9760472369, -4.0639169735, -3.7032546, -0.6272524628, 12.8272753635)
    assert dict(zip(SPECTRAL, found.tolist(), strict=True)) == pytest.approx(dict(zip(SPECTRAL, values, strict=True)))


def test_seven_eigenvalues_are_no_spectrum():
    layout = ParameterLayout.from_state_dict({"a.weight": torch.ones(9, 7), "b.weight": torch.ones(7, 1, 1, 1)})
    tokenizer = ChannelTokenizer.from_layout(layout)
    with pytest.raises(ValueError, match="no layer has 8 eigenvalues"):
        spectral_features(torch.ones(1, layout.size), tokenizer)
    assert available_baselines(("weights", "spectra"), tokenizer) == ("weights",)
    larger = ChannelTokenizer.from_layout(ParameterLayout.from_state_dict({"a.weight": torch.ones(8, 8)}))
    assert available_baselines(("weights", "spectra"), larger) == ("weights", "spectra")
