"""Published formats in tests: conversions without a progress bar, small trials, what LMDB environments hold."""

import json

import lmdb
import numpy as np
import torch
from torch import nn
from zoo_common import convert
from zoo_common.formats import lmdb_runs


def close_environments():
    """No environment stays open: LMDB opens none twice."""
    while lmdb_runs._open:
        lmdb_runs._open.popitem()[1].close()


def dump(folder):
    """Every record of an LMDB environment."""
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return dict(transaction.cursor())


def run_record(folder, name):
    document = json.loads((folder / "runs.json").read_text())
    return document.get(name, document)


def quietly(source, target, **options):
    return convert(source, target, progress=False, **options)


def assert_same_runs(actual, expected):
    """Two zoos hold the same runs."""
    assert sorted(actual.run_ids) == sorted(expected.run_ids) and actual.layout == expected.layout
    for run_id in expected.run_ids:
        assert torch.equal(actual.params[run_id], expected.params[run_id])
        assert actual.steps[run_id].tolist() == expected.steps[run_id].tolist()
        for name, column in expected.metrics.items():
            np.testing.assert_array_equal(actual.metrics[name][run_id], column[run_id])
        assert actual.runs[actual.index(run_id)].config == expected.runs[expected.index(run_id)].config
        for i in range(len(expected.params[run_id])):
            a, b = actual.weights(run_id, i), expected.weights(run_id, i)
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def make_net(seed=0, width=3):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
    net[1].num_batches_tracked += seed
    return net


def write_trial(folder, seed, epochs=(0, 1, 2), first=0, last=3, width=3):
    """A trial as Ray Tune writes it; ``first`` is the epoch of the first line of ``result.json``."""
    folder.mkdir(parents=True)
    params = {"model::type": "MLP", "seed": seed, "optim::lr": 1e-3}
    (folder / "params.json").write_text(json.dumps(params))
    lines = [
        {"training_iteration": e, "test_acc": 0.1 * e + 0.01 * seed, "done": e == last, "trial_id": f"da_{seed}",
         "config": params}
        for e in range(first, last + 1)
    ]  # fmt: skip
    (folder / "result.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for epoch in epochs:
        (folder / f"checkpoint_{epoch:06d}").mkdir()
        torch.save(make_net(10 * seed + epoch, width).state_dict(), folder / f"checkpoint_{epoch:06d}" / "checkpoints")


def original_reader(root, epochs, keys=("test_acc",)):
    """Section 4.1 of the specification, as the published code reads trial folders."""
    found = {}
    trials = sorted(path for path in root.iterdir() if path.is_dir())
    for offset in (0, 1):
        for trial in trials:
            lines = [json.loads(line) for line in (trial / "result.json").read_text().splitlines()]
            if len(lines) <= max(epochs) - offset:
                break
            for epoch in epochs:
                file = trial / f"checkpoint_{epoch}" / "checkpoints"
                file = file if file.exists() else trial / f"checkpoint_{epoch:06d}" / "checkpoints"
                found[trial.name, epoch] = (torch.load(file, weights_only=True), lines[epoch - offset])
        if all(found[trials[0].name, epoch][1]["training_iteration"] == epoch for epoch in epochs):
            return found
    raise AssertionError("neither offset fits")
