"""Properties of checkpoints that can be predicted: metrics of the zoo, the epoch, and what follows from them."""

import numpy as np
from zoo_common.zoo import Zoo

DEFAULTS = ("test_acc", "epoch", "ggap")
"""What is predicted if nothing else is asked for."""
_EPOCH = ("epoch", "training_iteration", "step")


def read_property(zoo: Zoo, name: str, runs: np.ndarray, checkpoints: np.ndarray) -> np.ndarray:
    """Values of a property for (run, checkpoint) pairs, (n,) float64, NaN where a run has none; or text, then empty.

    Args:
        zoo: The zoo.
        name: A metric; ``epoch`` (also ``training_iteration``, ``step``: the number that the zoo keeps with each
            checkpoint); ``test_acc``, ``train_acc`` or ``val_acc`` (fractions, also from an error in percent); ``ggap``
            (train_acc - test_acc); or ``config:KEY`` for a number or a text of the runs' configurations.
        runs: (n,) indices.
        checkpoints: (n,) indices within the runs.

    Raises:
        KeyError: The zoo has no such property; the message lists what it has.
    """
    if name in _EPOCH:
        return zoo.steps.gather(runs, checkpoints).astype(np.float64)
    if name.startswith("config:"):
        return _from_config(zoo, name.removeprefix("config:"), runs)
    if name == "ggap":
        train, test = (read_property(zoo, f"{part}_acc", runs, checkpoints) for part in ("train", "test"))
        return train - test
    if name in zoo.metrics:
        return np.asarray(zoo.metrics[name].gather(runs, checkpoints), np.float64)
    part, _, kind = name.rpartition("_")
    if kind in ("acc", "accuracy"):
        for other in (f"{part}_acc", f"{part}_accuracy"):
            if other in zoo.metrics:
                return np.asarray(zoo.metrics[other].gather(runs, checkpoints), np.float64)
        for other in (f"{part}_error", f"{part}_err"):
            if other in zoo.metrics:
                return 1 - np.asarray(zoo.metrics[other].gather(runs, checkpoints), np.float64) / 100
    raise KeyError(
        f"property {name!r} is not in the zoo; it has epoch, {', '.join(zoo.metrics) or 'no metrics'} "
        "and config:KEY for keys of the runs' configurations"
    )


def _from_config(zoo: Zoo, key: str, runs: np.ndarray) -> np.ndarray:
    values = [run.config.get(key) for run in zoo.runs]
    if any(isinstance(value, str) for value in values):  # in all splits alike
        return np.array(["" if value is None else str(value) for value in values], dtype=np.str_)[runs]
    numbers = np.array([float(v) if isinstance(v, int | float) else np.nan for v in values])
    if not np.isfinite(numbers[runs]).any():
        keys = sorted({k for run in zoo.runs for k, v in run.config.items() if isinstance(v, int | float | str)})
        raise KeyError(
            f"no run has a number or text {key!r} in its configuration; there are {', '.join(keys) or 'none'}"
        )
    return numbers[runs]
