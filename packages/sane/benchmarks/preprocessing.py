"""Tokenizing and preprocessing a zoo of CNN3, against one checkpoint and one layer at a time.

    uv run packages/sane/benchmarks/preprocessing.py [--runs 100] [--checkpoints 10]

``plain`` follows the published vectorisation: a ``torch.save`` file for every checkpoint, loaded, checked for NaN and large
values; each run aligned by weight matching of its last checkpoint with state dicts permuted tensor by tensor; statistics
and normalisation key by key. ``tokens``: tokens, mask and positions of each checkpoint, in memory, the least that anyone
would do. ``samples``: what the published training reads, 3 windows of each checkpoint in 11 versions (canonical and 10
permuted ones, each tokenized whole), one file for each window; timed on a part of the checkpoints.

Ours is what ``sane preprocess`` does on a zoo of the same checkpoints, which is all that training needs, and then all tokens
read once; also with the conversion of the files to a zoo, which is done once. Both sides visit the groups in one order,
and the tokens are compared. CPU seconds of one thread, imports not counted.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import torch
from sane.networks import build_network
from sane.preparation import PrepareConfig, Prepared, prepare
from sane.windows import WindowDataset
from scipy.optimize import linear_sum_assignment
from timing import seconds
from torch import Tensor
from zoo_common import ParameterLayout, Run, Zoo
from zoo_common.tokens import ChannelTokenizer

State = dict[str, Tensor]
CNN3 = {"model::type": "CNN3", "model::channels_in": 3, "model::o_dim": 10}
WINDOW = 64
LAYERS = ("0", "4", "8", "13", "16")
"""Of CNN3: three convolutions and two dense layers, each permuted like its successor's input."""


def plain_tokens(state: State, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (k, i), mask (k, i) and positions (k, 3) of one checkpoint."""
    tokens, masks, positions = [], [], []
    for name in state:
        if "weight" not in name:
            continue
        rows = state[name].reshape(state[name].shape[0], -1)
        bias = state.get(name.replace("weight", "bias"))
        if bias is not None:
            rows = torch.cat([rows, bias[:, None]], dim=1)
        pieces = -(-rows.shape[1] // size)
        padded, mask = torch.zeros(len(rows), pieces * size), torch.zeros(len(rows), pieces * size, dtype=torch.bool)
        padded[:, : rows.shape[1]], mask[:, : rows.shape[1]] = rows, True
        tokens.append(padded.reshape(-1, size))
        masks.append(mask.reshape(-1, size))
        channel = torch.arange(len(rows)).repeat_interleave(pieces)
        positions.append(torch.stack([torch.full_like(channel, len(positions)), channel], dim=1))
    joined = torch.cat(positions)
    index = torch.arange(len(joined))[:, None]
    return torch.cat(tokens), torch.cat(masks), torch.cat([index, joined], dim=1).short()


def places() -> list[list[tuple[str, int]]]:
    """(tensor, axis) of every group of CNN3, as its published permutation specification lists them."""
    return [
        [(f"module_list.{a}.weight", 0), (f"module_list.{a}.bias", 0), (f"module_list.{b}.weight", 1)]
        for a, b in itertools.pairwise(LAYERS)
    ]


def permuted(tensor: Tensor, axis: int, order: Tensor) -> Tensor:
    """One axis in another order; blocks, if it is a multiple."""
    block = tensor.shape[axis] // len(order)
    index = torch.arange(tensor.shape[axis]).view(len(order), block)[order].flatten()
    return tensor.index_select(axis, index)


def plain_permutations(reference: State, state: State) -> list[Tensor]:
    """Weight matching of one checkpoint, every term anew at every visit."""
    groups = places()
    orders = [torch.arange(reference[group[0][0]].shape[0]) for group in groups]
    for _ in range(100):
        progress = False
        for g, group in enumerate(groups):
            size = len(orders[g])
            total = torch.zeros(size, size)
            for name, axis in group:
                b = state[name]
                for other, members in enumerate(groups):
                    for where in (k for n, k in members if n == name and k != axis):
                        b = permuted(b, where, orders[other])
                rows_a, rows_b = (torch.moveaxis(x, axis, 0).reshape(size, -1) for x in (reference[name], b))
                total += rows_a @ rows_b.T
            found = torch.from_numpy(linear_sum_assignment(total.numpy(), maximize=True)[1])
            gain = total[torch.arange(size), found].sum() - total[torch.arange(size), orders[g]].sum()
            progress |= bool(gain > 1e-12)
            orders[g] = found
        if not progress:
            break
    return orders


def plain_apply(state: State, orders: list[Tensor]) -> State:
    """One checkpoint with its units in another order."""
    state = dict(state)
    for group, order in zip(places(), orders, strict=True):
        for name, axis in group:
            state[name] = permuted(state[name], axis, order)
    return state


def plain_preprocess(runs: list[list[Path]]) -> list[State]:
    """All checkpoints, aligned with the first run's last one and standardised."""
    loaded: list[list[State]] = []
    for files in runs:
        states = [torch.load(file, weights_only=True) for file in files]
        loaded.append([s for s in states if all(bool(x.isfinite().all()) and x.abs().max() < 100 for x in s.values())])
    reference = loaded[0][-1]
    for states in loaded:
        orders = plain_permutations(reference, states[-1])
        states[:] = [plain_apply(state, orders) for state in states]
    weights = [name for name in reference if "weight" in name]
    for name in weights:
        bias = name.replace("weight", "bias")
        rows = [torch.cat([s[name].flatten(), s[bias]]) for states in loaded for s in states]
        mean = torch.stack([row.mean() for row in rows]).mean()
        scale = torch.stack([row.std().square() for row in rows]).mean().sqrt()
        for state in (s for states in loaded for s in states):
            state[name], state[bias] = (state[name] - mean) / scale, (state[bias] - mean) / scale
    return [state for states in loaded for state in states]


def plain_samples(states: list[State], size: int, folder: Path) -> None:
    """The published training samples: three windows of each checkpoint, in 11 versions, a file for each."""
    for number, state in enumerate(states):
        for k in range(3):
            versions = [state]
            for _ in range(10):
                orders = [torch.randperm(state[group[0][0]].shape[0]) for group in places()]
                versions.append(plain_apply(state, orders))
            found = [plain_tokens(version, size) for version in versions]
            start = int(torch.randint(len(found[0][0]) - WINDOW + 1, ()))
            part = slice(start, start + WINDOW)
            sample = {
                "w": torch.stack([tokens[part] for tokens, _, _ in found]),
                "m": found[0][1][part].clone(),
                "p": found[0][2][part].clone(),
            }
            torch.save(sample, folder / f"sample_{number}_{k}.pt")


def make_files(folder: Path, runs: int, checkpoints: int) -> list[list[Path]]:
    """Random runs of CNN3, one file for each checkpoint."""
    found = []
    for run in range(runs):
        start = build_network(CNN3).state_dict()
        direction = {name: 0.1 * x.std() * torch.randn_like(x) for name, x in start.items()}
        (folder / f"run{run:04d}").mkdir(parents=True)
        files = [folder / f"run{run:04d}" / f"{k:04d}.pt" for k in range(checkpoints)]
        for k, file in enumerate(files):
            torch.save({name: x + k * direction[name] for name, x in start.items()}, file)
        found.append(files)
    return found


def make_zoo(path: Path, runs: list[list[Path]]) -> Zoo:
    """A zoo of the files, all runs for training."""
    layout = ParameterLayout.from_module(build_network(CNN3))
    zoo = Zoo.create(path, layout=layout, split=(1, 0, 0))
    read = [layout.stack([torch.load(file, weights_only=True) for file in files]) for files in runs]
    zoo.append([Run(f[0].parent.name, p, range(len(f)), {}, CNN3) for f, p in zip(runs, read, strict=True)])
    return zoo


def ready(zoo: Zoo, file: Path) -> Prepared:
    """Prepare a zoo, and draw the first batch."""
    prepared = prepare(zoo, PrepareConfig())
    prepared.save(file)
    WindowDataset(prepared, "train", window=WINDOW).batch(32, 0)
    return prepared


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--checkpoints", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    states = [build_network(CNN3).state_dict() for _ in range(64)]
    tokenizer = ChannelTokenizer.from_module(build_network(CNN3))
    assert torch.equal(tokenizer.tokenize(tokenizer.layout.stack(states))[-1], plain_tokens(states[-1], 289)[0])
    slow = seconds(lambda: [plain_tokens(state, tokenizer.token_size) for state in states], 20)
    fast = seconds(lambda: tokenizer.tokenize(tokenizer.layout.stack(states)), 20)
    print(
        f"tokens of 64 state dicts: {1e3 * slow:.1f} ms plain, {1e3 * fast:.1f} ms ours, {slow / fast:.1f}x (target 1.5x)"
    )

    count = options.runs * options.checkpoints
    with tempfile.TemporaryDirectory() as folder:
        runs = make_files(Path(folder) / "files", options.runs, options.checkpoints)
        expected: list[State] = []
        loading = seconds(lambda: expected.extend(plain_preprocess(runs)))
        tokens: list[Tensor] = []
        cutting = seconds(lambda: tokens.extend(plain_tokens(state, tokenizer.token_size)[0] for state in expected))
        part = expected[: min(count, 50)]
        sampling = seconds(lambda: plain_samples(part, tokenizer.token_size, Path(folder))) * count / len(part)
        prepare(make_zoo(Path(folder) / "first", runs[:2]), PrepareConfig())  # imports
        zoos: list[Zoo] = []
        converting = seconds(lambda: zoos.append(make_zoo(Path(folder) / "zoo", runs)))
        found: list[Prepared] = []
        preparing = seconds(lambda: found.append(ready(zoos[0], Path(folder) / "prepared.safetensors")))
        prepared = found[0]
        reading = seconds(lambda: [prepared.tokens(vectors) for _, vectors in prepared.blocks("train")])
        same = compare(prepared, tokens, options.checkpoints)
        size = (Path(folder) / "prepared.safetensors").stat().st_size
        extra = size / sum(file.stat().st_size for file in (Path(folder) / "zoo").rglob("*.safetensors"))
    rows = {
        "ready to train, against samples": (loading + sampling, preparing),
        "ready to train, against tokens": (loading + cutting, preparing),
        "all tokens": (loading + cutting, preparing + reading),
        "all tokens, with the conversion to a zoo": (loading + cutting, preparing + reading + converting),
    }
    for name, (slow, fast) in rows.items():
        print(f"{name}: {count / slow:.0f} models/s plain, {count / fast:.0f} ours, {slow / fast:.1f}x (target 20x)")
    print(f"tokens of {same} of {options.runs} runs are the same; disk +{100 * extra:.1f} %")


def compare(prepared: Prepared, tokens: list[Tensor], checkpoints: int) -> int:
    """Number of runs whose tokens agree (another permutation is as good where two are equally near)."""
    ours = prepared.tokens(prepared.vectors("train", slice(None))).unflatten(0, (-1, checkpoints))
    names = [prepared.zoo.run_ids[run] for run in prepared.samples["train"].runs[::checkpoints]]
    theirs = torch.stack(tokens).unflatten(0, (-1, checkpoints))[[int(name.removeprefix("run")) for name in names]]
    return int(((ours - theirs).abs().amax((1, 2, 3)) < 1e-4).sum())


if __name__ == "__main__":
    main()
