"""Windows: the same numbers as cutting whole checkpoints, drawn from the seed and the step alone."""

import numpy as np
import pytest
import torch
from sane.augmentation import Erase, add_noise
from sane.preparation import PrepareConfig, prepare
from sane.windows import ViewConfig, WindowDataset
from support.autoencoders import zoo_of_networks

CNN = {"model::type": "CNN", "model::channels_in": 1, "model::o_dim": 10}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(zoo_of_networks(tmp_path_factory.mktemp("zoos") / "cnn", CNN), PrepareConfig(token_size=40))


def windows(prepared, **options):
    views = ViewConfig(**{"noise": (0.0, 0.0), **options})
    return WindowDataset(prepared, "train", window=16, views=views, supersample=2)


def test_an_epoch_shows_every_checkpoint_equally_often(prepared):
    data = windows(prepared)
    tokens = prepared.tokens(prepared.vectors("train", slice(None)))
    count = torch.zeros(len(tokens), dtype=torch.int64)
    size = 3
    for step in range(data.batches_per_epoch(size)):
        batch = data.batch(size, step)
        assert torch.equal(batch.clean[:size], batch.clean[size:])
        for window, mask, positions in zip(batch.clean[:size], batch.mask, batch.positions, strict=True):
            rows = positions[:, 0].long()
            assert torch.equal(rows, rows[0] + torch.arange(16))
            count += (tokens[:, rows] == window).all((1, 2))
            assert torch.equal(mask, prepared.tokenizer.mask[rows])
            assert not window[~mask].any()
    assert set(count.tolist()) == {2}


def test_a_batch_is_a_function_of_seed_and_step(prepared):
    a, b = (windows(prepared, views="mixed", noise=(0.1, 0.1), erase=True) for _ in range(2))
    a.batch(4, 0)
    first, again, other = a.batch(4, 3), b.batch(4, 3), b.batch(4, 4)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first.views, other.views)


def test_a_process_cuts_its_own_windows_of_a_batch(prepared, monkeypatch):
    data = windows(prepared, views="mixed", noise=(0.1, 0.1), erase=True)
    whole, chosen, cut = data.batch(6, 1), np.array([1, 4]), []
    vectors = prepared.vectors
    monkeypatch.setattr(type(prepared), "vectors", lambda _, split, rows: cut.extend(rows) or vectors(split, rows))
    part = data.batch(6, 1, chosen)
    assert len(cut) == 2
    for a, b in ((part.views, whole.views), (part.clean, whole.clean)):
        assert torch.equal(a[[1, 4, 7, 10]], b[[1, 4, 7, 10]])
        assert not a[[0, 2, 3, 5]].any()
    assert torch.equal(part.mask, whole.mask)


@pytest.mark.parametrize(("views", "changed"), [("canonical", 0), ("mixed", 1), ("permuted", 2)])
def test_permuted_views_hold_the_same_checkpoint_in_another_order(prepared, views, changed):
    data = WindowDataset(
        prepared, "train", window=prepared.tokenizer.shape[0], views=ViewConfig(views=views, noise=(0.0, 0.0))
    )
    batch = data.batch(3, 0)
    first, second = batch.clean.chunk(2)
    canonical = prepared.tokens(prepared.vectors("train", slice(None)))
    same = [[bool((canonical == x).all((1, 2)).any()) for x in part] for part in (first, second)]
    assert [all(row) for row in same] == [changed < 2, changed < 1]
    torch.testing.assert_close(first.flatten(1).sort(1)[0], second.flatten(1).sort(1)[0])


RESNET = {"model::type": "Resnet18", "model::channels_in": 3, "model::o_dim": 10}


@pytest.mark.parametrize("views", ["canonical", "permuted"])
@pytest.mark.parametrize("network", [CNN, pytest.param(RESNET, marks=pytest.mark.slow)], ids=["CNN", "Resnet18"])
def test_windows_by_rows_are_those_of_whole_checkpoints(tmp_path, network, views):
    big = network is RESNET
    zoo = zoo_of_networks(tmp_path / "zoo", network, runs=2 if big else 6, checkpoints=2)
    options = {"split": "published", "fractions": (1.0, 0.0, 0.0), "align": "last" if not big else "none"}
    prepared = prepare(zoo, PrepareConfig(token_size=40 if not big else 288, **options))
    data = WindowDataset(
        prepared, "train", window=25, views=ViewConfig(views=views, noise=(0.1, 0.1)), supersample=3 if big else 8
    )
    assert data.by_rows == big
    found = {}
    for by_rows in (False, True):
        data.by_rows = by_rows
        found[by_rows] = [data.batch(len(data) // 3, step) for step in range(3)]
    for whole, rows in zip(found[False], found[True], strict=True):
        for a, b in zip(whole, rows, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_samples_have_starts_of_their_own_unless_they_are_shared(prepared):
    starts = {
        shared: windows(prepared, shared=shared).batch(8, 0).positions[:, 0, 0].unique() for shared in (False, True)
    }
    assert len(starts[False]) > 1 and len(starts[True]) == 1


def test_a_shared_permutation_is_that_of_the_whole_batch(prepared, monkeypatch):
    data = windows(prepared, views="mixed", shared=True)
    whole = data.batch(6, 0)
    monkeypatch.setattr("sane.windows._TOGETHER", 2 * prepared.tokenizer.layout.size)  # cut in parts of two
    assert torch.equal(data.batch(6, 0).clean, whole.clean)


def test_noise_is_multiplicative_and_keeps_padding(prepared):
    tokens = torch.ones(4, 50, 60)
    tokens[:, :, 50:] = 0
    noisy = add_noise(tokens, 0.1, torch.Generator().manual_seed(0))
    assert not noisy[:, :, 50:].any()
    assert abs(noisy[:, :, :50].std() - 0.1) < 0.003 and abs(noisy[:, :, :50].mean() - 1) < 0.003


def test_erased_rectangles_follow_the_published_rule():
    tokens = torch.ones(4000, 30, 40)
    erased = Erase()(tokens, torch.Generator().manual_seed(0)) == 0
    touched = erased.any((1, 2))
    assert abs(touched.float().mean() - 0.5) < 0.03
    share = erased[touched].float().mean((1, 2))
    assert 0.01 < share.min() and share.max() < 0.36 and abs(share.mean() - 0.17) < 0.02
    rows, columns = erased[touched].any(2).sum(1), erased[touched].any(1).sum(1)
    assert torch.equal(rows * columns, erased[touched].sum((1, 2)))  # rectangles
    together = Erase(p=1.0)(tokens[:5], torch.Generator().manual_seed(1), shared=True)
    assert (together == together[0]).all() and not together.all()


def test_bad_sizes_are_named(prepared):
    with pytest.raises(ValueError, match=r"window \(1000\) must be from 1 to the \d+ tokens"):
        WindowDataset(prepared, "train", window=1000)
    with pytest.raises(ValueError, match=r"batch \(1000\) must be from 1 to the \d+ windows"):
        windows(prepared).batch(1000, 0)
