"""Predicting properties of networks from features, without self-deception.

Ridge regressions are fitted on training runs, their strength is chosen on validation runs only, and they are judged on
test runs, with intervals from resampling whole runs: checkpoints of one run are not independent.

Shapes: ``n`` checkpoints with ``d`` features, ``r`` regularisations, ``s`` resamples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sane.progress import track

STRONG = (1e6, 1e5, 1e4)
"""Further strengths for many features of few runs; the targets are centered, so that the strongest predict the mean."""
REGULARISATIONS = tuple(value * 10.0**power for power in range(3, -6, -1) for value in (1.0, 0.3))[:-1]
"""Strengths of the ridge to choose from, falling from 1000 to 1e-5."""


class Ridge(NamedTuple):
    """A linear predictor."""

    weights: Tensor
    """(d + 1,) float64, the last one for the constant."""
    regularisation: float

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions (n,) for features (n, d)."""
        return _with_ones(x) @ self.weights


class LinearClassifier(NamedTuple):
    """A ridge regression for each class; the largest one wins."""

    weights: Tensor
    """(d + 1, c) float64, the last row for the constants."""
    regularisation: float

    def __call__(self, x: Tensor) -> Tensor:
        """Predicted classes (n,) for features (n, d), as float64 numbers 0 .. c - 1."""
        return (_with_ones(x) @ self.weights).argmax(1).double()


def ridge_path(x: Tensor, y: Tensor, strengths: Sequence[float] = REGULARISATIONS) -> Tensor:
    """Weights (r, d + 1) of ridge regressions with all strengths, from one decomposition.

    Solves (X'X + r I) b = X'y in float64, where X has a column of ones that is regularised too, as published.

    Args:
        x: Features (n, d).
        y: Targets (n,), without NaN.
        strengths: The values of r.
    """
    x, y = _with_ones(x), y.double()
    r = torch.tensor(strengths, dtype=torch.float64)[:, None]
    if x.shape[1] <= x.shape[0]:
        values, vectors = torch.linalg.eigh(x.T @ x)
        return (vectors.T @ (x.T @ y) / (values.clamp_min(0) + r)) @ vectors.T
    values, vectors = torch.linalg.eigh(x @ x.T)
    return (vectors.T @ y / (values.clamp_min(0) + r)) @ vectors.T @ x


def fit_ridge(
    x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, strengths: Sequence[float] = REGULARISATIONS
) -> Ridge:
    """The ridge regression of the best R2 on validation data; NaN targets are dropped on both sides."""
    x, y = _known(x, y)
    x_val, y_val = _known(x_val, y_val)
    path = ridge_path(x, y, strengths)
    scores = r_squared(_with_ones(x_val) @ path.T, y_val[:, None])
    best = int(torch.where(scores.isnan(), -torch.inf, scores).argmax())
    return Ridge(path[best], float(strengths[best]))


def fit_classifier(
    x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, strengths: Sequence[float] = REGULARISATIONS
) -> LinearClassifier:
    """The linear classifier of the best accuracy on validation data, by least squares on the classes as 0 and 1.

    The published one (50 epochs of Adam on the cross entropy) is the same kind of predictor, but hardly learns.

    Args:
        x: Features (n, d).
        y: Classes (n,), float64 numbers 0 .. c - 1, NaN where unknown.
        x_val: Those of the validation data.
        y_val: Their classes.
        strengths: Of the ridge.
    """
    x, y = _known(x, y)
    x_val, y_val = _known(x_val, y_val)
    indicators = torch.nn.functional.one_hot(y.long()).double()
    paths = torch.stack([ridge_path(x, column, strengths) for column in indicators.T], dim=2)  # (r, d + 1, c)
    scores = torch.stack([accuracy((_with_ones(x_val) @ weights).argmax(1), y_val) for weights in paths])
    best = int(scores.argmax())
    return LinearClassifier(paths[best], float(strengths[best]))


def accuracy(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Share of right classes; with ``weights`` (s, n) of the checkpoints the result is (s,)."""
    right = (prediction == target).double()
    return right.mean() if weights is None else weights.double() @ right / weights.sum(1)


def r_squared(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 - mean squared error / variance of the targets; NaN if these are all alike.

    Args:
        prediction: (n, ...).
        target: (n, ...), broadcast against the predictions.
        weights: (s, n) weights of the checkpoints, for resampling; the result is then (s, ...).
    """
    prediction, target = prediction.double(), target.double()
    w = torch.ones(1, len(target), dtype=torch.float64) if weights is None else weights.double()
    w = w / w.sum(1, keepdim=True)

    def mean(values: Tensor) -> Tensor:
        return torch.einsum("sn,n...->s...", w, values)

    center = target.mean(0)  # keeps the difference of squares accurate
    shifted = target - center
    variance = mean(shifted.square()) - mean(shifted).square()
    scale = shifted.square().amax(0) if len(target) else torch.zeros(())
    result = 1 - mean((target - prediction).square()) / torch.where(variance > 1e-12 * scale, variance, torch.nan)
    return result[0] if weights is None else result


def kendall_tau(prediction: Tensor, target: Tensor) -> float:
    """Rank correlation tau-b; NaN if one side is constant."""
    from scipy.stats import kendalltau

    if len(prediction) < 2 or prediction.unique().numel() < 2 or target.unique().numel() < 2:
        return float("nan")
    return float(kendalltau(prediction.numpy(), target.numpy()).statistic)


def resample_runs(runs: np.ndarray, resamples: int, seed: int) -> Tensor:
    """Weights (s, n) of the checkpoints when whole runs (n,) are drawn with replacement."""
    names, index = np.unique(runs, return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return torch.from_numpy(draws[:, index]).double()


@dataclass(frozen=True)
class Score:
    """How well one set of features predicts one property."""

    features: str
    property: str
    r2: float
    """On the test runs."""
    low: float
    high: float
    """95 % interval of ``r2`` by resampling the test runs."""
    kendall: float
    r2_train: float
    r2_validation: float
    regularisation: float
    runs: int
    """Test runs."""
    note: str = ""
    """What was dropped, or why there is no number."""
    difference: float | None = None
    """R2 of the first features minus that of these, on the same resamples."""
    difference_low: float | None = None
    difference_high: float | None = None
    measure: Literal["R2", "accuracy"] = "R2"
    """What ``r2`` and the numbers after it are: for properties that are text, the accuracy of a linear classifier."""
    elsewhere: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Other zoo -> (R2, Kendall's tau) of the same predictor there: out of distribution."""


class Labelled(NamedTuple):
    """Features and properties of one group of checkpoints."""

    features: Mapping[str, Tensor]
    """Name -> (n, d)."""
    properties: Mapping[str, np.ndarray]
    """Name -> (n,), of numbers, or of text (classes; empty where unknown)."""
    runs: np.ndarray
    """Run of each checkpoint, (n,)."""


class PropertyPredictor:
    """Ridge regressions from every set of features to every property; linear classifiers for those that are text.

    Args:
        train: Fits the weights.
        validation: Chooses the strength of the ridge.
        least_runs: Runs that each group must have.

    Raises:
        ValueError: A group has too few runs, or a run is in both groups.
    """

    def __init__(self, train: Labelled, validation: Labelled, *, least_runs: int = 2) -> None:
        """See the class."""
        for name, group in (("training", train), ("validation", validation)):
            check_runs(name, group, least_runs)
        if shared := set(train.runs.tolist()) & set(validation.runs.tolist()):
            raise ValueError(f"run {min(shared)} is in the training and in the validation group: split by run")
        self.train, self.validation = train, validation
        self.scales = {name: _scale(x) for name, x in train.features.items()}
        self.classes = {
            name: sorted({*y.tolist()} - {""}) for name, y in train.properties.items() if y.dtype.kind == "U"
        }
        """Property that is text -> its values in the training group."""
        self.centers = {
            name: 0.0 if name in self.classes or not np.isfinite(y).any() else float(np.nanmean(y))
            for name, y in train.properties.items()
        }
        self.fits: dict[tuple[str, str], Ridge | LinearClassifier | str] = {}
        for features, name in track(product(train.features, train.properties), "fit"):
            self.fits[features, name] = self._fit(features, name)

    def _fit(self, features: str, name: str) -> Ridge | LinearClassifier | str:
        groups = [(group.features[features], self._target(name, group)) for group in (self.train, self.validation)]
        for (_, values), group in zip(groups, ("training", "validation"), strict=True):
            known = values[values.isfinite()]
            if len(known) < 2:
                return f"{name} is known for {len(known)} {group} checkpoints: nothing to fit"
            if (known == known[0]).all():
                value = self.classes[name][int(known[0])] if name in self.classes else f"{known[0]:g}"
                return f"{name} is {value} for all {group} checkpoints: nothing to predict"
        (x, y_train), (x_val, y_val) = ((self._scaled(features, a), b - self.centers[name]) for a, b in groups)
        fit = fit_classifier if name in self.classes else fit_ridge
        return fit(x, y_train, x_val, y_val, (*STRONG, *REGULARISATIONS))

    def _target(self, name: str, group: Labelled) -> Tensor:
        """Values of a property (n,), NaN where unknown; of text, the number of the class (-1: not in training)."""
        values = group.properties[name]
        if (values.dtype.kind == "U") != (name in self.classes):
            raise ValueError(f"{name} is text in one group or zoo and a number in another: it cannot be compared")
        if name not in self.classes:
            return torch.from_numpy(values).double()
        numbers = {"": math.nan} | {text: float(k) for k, text in enumerate(self.classes[name])}
        return torch.tensor([numbers.get(text, -1.0) for text in values.tolist()], dtype=torch.float64)

    def _scaled(self, features: str, x: Tensor) -> Tensor:
        center, scale = self.scales[features]
        return (x.double() - center) / scale

    def predict(self, features: str, name: str, x: Tensor) -> Tensor:
        """Predictions (n,) of a property from features (n, d); of text, indices into :attr:`classes`.

        Raises:
            KeyError: There is no such predictor.
            ValueError: The property could not be learned; the message says why.
        """
        fit = self.fits[features, name]
        if isinstance(fit, str):
            raise ValueError(fit)
        return fit(self._scaled(features, x)) + self.centers[name]

    def judge(
        self,
        test: Labelled,
        *,
        elsewhere: Mapping[str, Labelled] | None = None,
        resamples: int = 1000,
        seed: int = 0,
        least_runs: int = 2,
    ) -> list[Score]:
        """Scores on test runs; the first features are compared with all others.

        Args:
            test: Runs that took no part in fitting.
            elsewhere: Other zoos, on which the same predictors are judged too.
            resamples: Draws of the test runs for the intervals.
            seed: Draws them.
            least_runs: Runs that the test group must have.

        Raises:
            ValueError: Too few test runs, or one that took part in fitting.
        """
        check_runs("test", test, least_runs)
        if shared := set(test.runs.tolist()) & {*self.train.runs.tolist(), *self.validation.runs.tolist()}:
            raise ValueError(f"test run {min(shared)} took part in fitting: split by run")
        weights = resample_runs(test.runs, resamples, seed)
        scores: list[Score] = []
        for name in test.properties:
            first: tuple[float, Tensor] | None = None
            for features in test.features:
                score, drawn = self._score(features, name, test, weights, elsewhere or {})
                if first is None:
                    first = (score.r2, drawn)
                elif len(drawn) and len(first[1]):
                    gap = _interval(first[1] - drawn)
                    score = _with_difference(score, first[0] - score.r2, gap)
                scores.append(score)
        return scores

    def _score(
        self, features: str, name: str, test: Labelled, weights: Tensor, elsewhere: Mapping[str, Labelled]
    ) -> tuple[Score, Tensor]:
        """Score of one predictor, and its R2 on every resample (s,)."""
        fit, nan = self.fits[features, name], float("nan")
        target = self._target(name, test)
        measure: Literal["R2", "accuracy"] = "accuracy" if name in self.classes else "R2"
        quality = accuracy if name in self.classes else r_squared
        known = target.isfinite()
        runs = len(np.unique(test.runs[known.numpy()]))
        notes = [f"{int((~known).sum())} of {len(known)} test checkpoints have no {name}"] if not known.all() else []
        if name in self.classes and (unknown := {*test.properties[name].tolist()} - {*self.classes[name], ""}):
            notes.append(f"{', '.join(sorted(unknown))} is no {name} of a training run: counted as wrong")
        if isinstance(fit, str) or not known.any() or target[known].unique().numel() < 2:
            reason = (
                fit if isinstance(fit, str) else f"{name} is the same for all test checkpoints: no score has a meaning"
            )
            note = "; ".join([reason, *notes])
            return Score(features, name, nan, nan, nan, nan, nan, nan, nan, runs, note, measure=measure), torch.zeros(0)
        predicted = self.predict(features, name, test.features[features])
        drawn = quality(predicted[known], target[known], weights[:, known])
        low, high = _interval(drawn)
        others = {zoo: self._elsewhere(features, name, group) for zoo, group in elsewhere.items()}
        for zoo, group in elsewhere.items():
            there = self._target(name, group)
            if unknown_there := int((~there.isfinite()).sum()):
                notes.append(f"{unknown_there} of {len(there)} checkpoints of {zoo} have no {name}")
            if name not in self.classes and there[there.isfinite()].unique().numel() < 2:
                notes.append(f"{name} is the same for all checkpoints of {zoo} that have it: no score has a meaning")
        train, validation = (
            float(quality(*self._pairs(features, name, group))) for group in (self.train, self.validation)
        )
        value = float(quality(predicted[known], target[known]))
        tau = nan if name in self.classes else kendall_tau(predicted[known], target[known])
        note = "; ".join(notes)
        score = Score(
            features,
            name,
            value,
            low,
            high,
            tau,
            train,
            validation,
            fit.regularisation,
            runs,
            note,
            measure=measure,
            elsewhere=others,
        )
        return score, drawn

    def _elsewhere(self, features: str, name: str, group: Labelled) -> tuple[float, float]:
        predicted, target = self._pairs(features, name, group)
        if name in self.classes:
            return float(accuracy(predicted, target)), math.nan
        return float(r_squared(predicted, target)), kendall_tau(predicted, target)

    def _pairs(self, features: str, name: str, group: Labelled) -> tuple[Tensor, Tensor]:
        """Predictions and targets where the property is known."""
        x, y = _known(group.features[features], self._target(name, group))
        return self.predict(features, name, x), y


def check_runs(name: str, group: Labelled, least: int) -> None:
    """Reject a group of too few runs."""
    count = len(np.unique(group.runs))
    if count < least:
        raise ValueError(
            f"the {name} split has {count} runs, at least {least} are needed: use a larger zoo or other fractions"
        )


def _with_difference(score: Score, value: float, interval: tuple[float, float]) -> Score:
    return replace(score, difference=value, difference_low=interval[0], difference_high=interval[1])


def _interval(drawn: Tensor) -> tuple[float, float]:
    finite = drawn[drawn.isfinite()]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = torch.quantile(finite, torch.tensor([0.025, 0.975], dtype=finite.dtype)).tolist()
    return low, high


def _scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every feature on the training runs, so that one ridge fits all kinds."""
    scale = x.double().std(0, correction=0)
    return x.double().mean(0), torch.where(scale > 0, scale, 1.0)


def _known(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    known = y.isfinite()
    return x[known], y[known]


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
