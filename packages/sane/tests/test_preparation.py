"""Preparing a zoo: published splits, statistics and properties; alignment that keeps functions; small files."""

import re

import numpy as np
import pytest
import torch
from sane.networks import build_network
from sane.preparation import PrepareConfig, Prepared, network_of, open_prepared, prepare
from sane.properties import read_property
from sane.windows import WindowDataset
from support.autoencoders import filled_state, zoo_of_networks
from support.golden import assert_close, fill
from zoo_common import ParameterLayout, Run, Zoo

CNN = {"model::type": "CNN", "model::channels_in": 1, "model::o_dim": 10, "model::init_type": "kaiming_uniform"}


def published_zoo(path, stored):
    """The synthetic zoo of the golden's recipe: its stored epochs, all trials."""
    recipe, epochs = stored["recipe"], stored["dataset_info_train"]["epoch_list"]
    kind, channels = re.search(r"(\w+) \((\d+) input channels", recipe).groups()
    config = {"model::type": kind, "model::channels_in": int(channels), "model::o_dim": 10}
    count, names = re.search(r"zoo: (\d+) trials, directory names '([^']*)'", recipe).groups()
    (tag,) = re.findall(r"t='(\S+?/m<i>/e<e>/)'", recipe)
    noise_tag, scale = re.search(r"fill\('([^']*<i>/<e>)',\(1,\),([\d.]+)\)", recipe).groups()
    lines = {name: re.search(rf"{name}=([\d.]+)\+a\+([\d.]+)\*e", recipe) for name in ("train_acc", "test_acc")}
    network = build_network(config)
    layout, e = ParameterLayout.from_module(network), np.array(epochs)

    def of(name, i, epoch):
        """A name with its places <i>, <i:03d>, <i+1>, <e> filled in."""
        return re.sub(
            r"<([ie])(?:\+(\d+))?(:\w+)?>",
            lambda found: format((i if found[1] == "i" else epoch) + int(found[2] or 0), (found[3] or ":")[1:]),
            name,
        )

    runs = []
    for i in range(int(count)):
        states = [filled_state(network.state_dict(), of(tag, i, epoch)) for epoch in epochs]
        buffers = {spec.name: torch.stack([state[spec.name] for state in states]) for spec in layout.buffers}
        noise = np.array([fill(of(noise_tag, i, epoch), (1,), float(scale))[0].item() for epoch in epochs])
        metrics = {name: float(line[1]) + noise + float(line[2]) * e for name, line in lines.items()}
        runs.append(Run(of(names, i, 0), layout.stack(states), epochs, metrics, config, buffers))
    zoo = Zoo.create(path, layout=layout)
    zoo.append(runs)
    return zoo


def published_config(stored):
    info, size = stored["dataset_info_train"], int(re.search(r"tokensize (\d+)", stored["recipe"])[1])
    fractions = info["ds_split"] if len(info["ds_split"]) == 3 else [info["ds_split"][0], 0.0, info["ds_split"][1]]
    return PrepareConfig(
        token_size=size or "legacy-auto",
        ignore_bn="ignore_bn," in stored["recipe"],
        normalization={True: "standardize", False: "none"}.get(info["standardize"], info["standardize"]),
        align="last" if info["map_to_canonical"] else "none",
        split="published",
        fractions=tuple(fractions),
        max_runs=info["max_samples"],
        max_abs=info["weight_threshold"],
        steps=tuple(info["epoch_list"]),
        legacy_double_bn=True,
    )


SPLITS = {"train": "train", "val": "validation", "test": "test"}


@pytest.mark.golden("pipeline.json")
def test_splits_statistics_and_properties_are_the_published_ones(golden, tmp_path):
    stored = golden.case
    zoo = published_zoo(tmp_path / "zoo", stored)
    info = stored["dataset_info_train"]
    prepared = prepare(zoo, published_config(stored))
    order = []
    for name, ids in stored["splits"].items():
        runs = [zoo.run_ids[run] for run in prepared.samples[SPLITS[name]].runs]
        assert list(dict.fromkeys(runs)) == ids
        order += ids
    assert stored["shuffled_order"][: len(order)] == order
    assert len(order) == min(len(zoo), info["max_samples"])
    run, epoch = stored["reference_trial_and_epoch"]
    assert torch.equal(prepared.reference, zoo.params[run, info["epoch_list"].index(epoch)])
    assert prepared.normalization.to_document() == prepared.measured("train").to_document()
    assert [n - 1 for n in prepared.max_positions] == info["max_positions"]
    assert info["properties"] == info["property_keys"]["result_keys"] + info["property_keys"]["config_keys"]
    for name in ("train", "val"):
        measured, published = prepared.measured(SPLITS[name]).to_document(), stored[f"normalization_{name}"]
        assert measured.pop("mode") == published["mode"]
        assert measured.keys() == published.keys() - {"mode"}
        for layer, pair in measured.items():
            assert pair.keys() == published[layer].keys()
            assert_close(list(pair.values()), [published[layer][key] for key in pair], "sane/statistics", layer)
        for k, key in enumerate(info["properties"]):
            values = [row[k] for row in stored[f"props_first_cycle_{name}"]]
            assert_close(prepared.properties(SPLITS[name], key), values, "float32", f"{key} of {name}")


@pytest.mark.golden("pipeline.json")
def test_windows_are_as_many_and_as_large_as_the_published_samples(golden, tmp_path):
    """We draw windows when they are needed; the original stored each, with all its permutations, in a file."""
    stored, info = golden.case, golden.case["dataset_info_train"]
    prepared = prepare(published_zoo(tmp_path / "zoo", stored), published_config(stored))
    window = min(info["windowsize"], prepared.tokenizer.shape[0])
    for name, count in stored["n_samples"].items():
        data = WindowDataset(prepared, SPLITS[name], window=window, supersample=info["supersample"])
        assert len(data) == count
    assert stored["n_samples"][info["split"]] == info["num_samples"] * info["supersample"]
    batch, shown = data.batch(1, 0), stored["sample_format"]
    shape = [1 + info["permutation_number"], *batch.views.shape[1:]]  # canonical and permuted, we: two views
    assert shown["w"] == [shape, str(batch.views.dtype)]
    for key, part in (("m", batch.mask[0]), ("p", batch.positions[0])):
        assert shown[key] == [list(part.shape), str(part.dtype)]
    assert shown["props"] == [[len(info["properties"])], "torch.float32"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return zoo_of_networks(tmp_path_factory.mktemp("zoos") / "cnn", CNN, runs=12, checkpoints=3)


@pytest.mark.parametrize("align", ["last", "each"])
def test_alignment_keeps_functions_and_comes_near_the_reference(zoo, align):
    prepared = prepare(zoo, PrepareConfig(align=align))
    samples = prepared.samples["train"]
    raw = zoo.params.gather(samples.runs, samples.checkpoints)
    aligned = prepared.vectors("train", slice(None))
    x = torch.randn(4, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = network_of(zoo)[0]().double()
    for before, after in zip(raw[:3], aligned[:3], strict=True):
        outputs = []
        for vector in (before, after):
            zoo.layout.load_into(network, vector.double())
            outputs.append(network(x))
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    products = [(vectors @ prepared.reference).double() for vectors in (raw, aligned)]
    assert (products[1] >= products[0] - 1e-4).all() and (products[1] > products[0] + 1e-3).any()
    assert torch.equal(aligned[2], prepared.reference)


def test_one_permutation_per_run_is_that_of_its_last_checkpoint(zoo):
    last, each = (prepare(zoo, PrepareConfig(align=align)) for align in ("last", "each"))
    assert torch.equal(last.vectors("test", slice(2, None, 3)), each.vectors("test", slice(2, None, 3)))
    assert all(len(table) == len(zoo) for table in last.permutations)
    assert all(len(table) == 3 * len(zoo) for table in each.permutations)


def test_a_prepared_file_is_read_back_and_small(zoo, tmp_path):
    prepared = prepare(zoo, PrepareConfig(normalization="minmax", token_size=32))
    prepared.save(tmp_path / "prepared.safetensors")
    back = open_prepared(tmp_path / "prepared.safetensors")
    assert isinstance(back, Prepared) and back.config == prepared.config
    for split in prepared.samples:
        a, b = (p.tokens(p.vectors(split, slice(None))) for p in (prepared, back))
        assert torch.equal(a, b)
    assert torch.equal(back.reference, prepared.reference)
    assert (tmp_path / "prepared.safetensors").stat().st_size < 0.1 * 4 * zoo.layout.size * 36


def test_a_prepared_file_is_small_beside_a_zoo_of_few_checkpoints(tmp_path):
    alexnet = {"model::type": "MiniAlexNet", "model::o_dim": 10}
    made = zoo_of_networks(tmp_path / "zoo", alexnet, runs=2, checkpoints=1)
    prepare(made, PrepareConfig(split="published", fractions=(1, 0, 0))).save(tmp_path / "prepared.safetensors")
    assert (tmp_path / "prepared.safetensors").stat().st_size < 0.1 * 4 * made.layout.size * 2


def test_a_prepared_file_that_was_moved_with_its_zoo_is_read(tmp_path):
    made = zoo_of_networks(tmp_path / "a" / "zoo", CNN, runs=3, checkpoints=1)
    prepare(made, PrepareConfig(split="published", align="none")).save(tmp_path / "a" / "prepared.safetensors")
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_prepared(tmp_path / "b" / "prepared.safetensors").zoo.path == tmp_path / "b" / "zoo"
    (tmp_path / "b" / "zoo").rename(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match=r"is not in .*zoo: move it back or prepare it again; .* zoo=FOLDER"):
        open_prepared(tmp_path / "b" / "prepared.safetensors")
    assert len(open_prepared(tmp_path / "b" / "prepared.safetensors", tmp_path / "c").zoo) == 3
    next((tmp_path / "c" / "shards").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"lacks \d runs of .*: restore its shards, or prepare it again"):
        open_prepared(tmp_path / "b" / "prepared.safetensors", tmp_path / "c")


def test_checkpoints_that_are_not_finite_or_too_large_are_left_out_and_counted(tmp_path):
    made = zoo_of_networks(tmp_path / "zoo", CNN, runs=4, checkpoints=3)
    bad = made.params["run001"].clone()
    bad[1, 5], bad[2, 7] = torch.nan, 1e6
    made.append([Run("worse", bad, range(3), {"test_acc": [0.1] * 3, "train_acc": [0.1] * 3}, CNN)])
    prepared = prepare(made, PrepareConfig(max_abs=100.0))
    assert prepared.dropped == {"not finite": 1, "above 100": 1}
    assert sum(len(samples.runs) for samples in prepared.samples.values()) == 13
    with pytest.raises(ValueError, match=r"no training checkpoint .* 14 above 1e-05; 1 not finite: choose other steps"):
        prepare(made, PrepareConfig(max_abs=1e-5))


def test_a_zoo_without_validation_runs_is_prepared_and_read_back(tmp_path):
    made = zoo_of_networks(tmp_path / "zoo", CNN, runs=3)
    config = PrepareConfig(split="published", fractions=(0.5, 0.0, 0.5), align="none")
    prepare(made, config).save(tmp_path / "prepared.safetensors")
    back = open_prepared(tmp_path / "prepared.safetensors")
    assert {split: len(samples.runs) for split, samples in back.samples.items()} == {
        "train": 3,
        "validation": 0,
        "test": 6,
    }


def test_the_best_quantile_of_runs(zoo):
    kept = prepare(zoo, PrepareConfig(min_quantile=0.5, align="none"))
    runs = np.unique(np.concatenate([s.runs for s in kept.samples.values()]))
    last = read_property(zoo, "test_acc", np.arange(12), np.full(12, -1))
    assert set(runs) == set(np.flatnonzero(last >= np.median(last)))


def test_properties(zoo):
    runs, checkpoints = np.array([0, 3]), np.array([1, 2])
    assert read_property(zoo, "epoch", runs, checkpoints).tolist() == [1, 2]
    assert read_property(zoo, "config:lr", runs, checkpoints).tolist() == [0.1, 0.1]
    gap = read_property(zoo, "ggap", runs, checkpoints)
    train, test = (read_property(zoo, f"{part}_acc", runs, checkpoints) for part in ("train", "test"))
    assert np.array_equal(gap, train - test)
    with pytest.raises(KeyError, match="'val_acc' is not in the zoo; it has epoch, test_acc, train_acc and config:KEY"):
        read_property(zoo, "val_acc", runs, checkpoints)
    with pytest.raises(KeyError, match="'wd' in its configuration; there are lr"):
        read_property(zoo, "config:wd", runs, checkpoints)


def test_a_zoo_of_an_unknown_network_can_be_prepared_without_alignment(tmp_path):
    layout = ParameterLayout.from_state_dict({"weight": torch.zeros(4, 3), "bias": torch.zeros(4)})
    made = Zoo.create(tmp_path / "zoo", layout=layout)
    made.append([Run(f"{i}", torch.randn(2, 16), range(2)) for i in range(5)])
    with pytest.raises(ValueError, match=r"is not known \(no task, and no model::type in its runs\): prepare"):
        prepare(made)
    assert prepare(made, PrepareConfig(align="none")).tokenizer.shape == (4, 4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"token_size": 0}, "token_size must be at least 1"),
        ({"fractions": (0.5, 0.1, 0.1)}, "three that sum to 1"),
        ({"min_quantile": 1.0}, "min_quantile must be from 0"),
        ({"max_abs": 0.0}, "max_abs must be positive, got 0 and 0.0"),
        ({"max_abs": float("nan")}, "max_abs must be positive"),
        ({"fractions": (float("nan"),) * 3}, "fractions must be three that sum to 1"),
    ],
)
def test_bad_settings_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        PrepareConfig(**options)


def test_blocks_of_few_checkpoints_are_spread_over_the_split(zoo):
    prepared = prepare(zoo, PrepareConfig())
    count = len(prepared.samples["train"].runs)
    ((places, vectors),) = prepared.blocks("train", 3)
    assert places.tolist() == [0, (count - 1) // 2, count - 1]
    assert torch.equal(vectors, prepared.vectors("train", places))
    ((places, _),) = prepared.blocks("train")
    assert places.tolist() == list(range(count))


@pytest.mark.parametrize("part", [slice(0, 1), slice(1100, 1300), slice(-1, None)])
def test_runs_are_told_apart_that_differ_in_one_part_alone(tmp_path, part):
    whole = zoo_of_networks(tmp_path / "a", CNN, runs=12, checkpoints=1)
    zoo = Zoo.create(tmp_path / "b", layout=whole.layout, split=(0.6, 0.2, 0.2))
    vectors = whole.params[0, 0].repeat(12, 1)
    vectors[:, part] += torch.arange(12)[:, None]
    zoo.append([Run(f"r{k:02d}", vector[None], [0], {}, CNN) for k, vector in enumerate(vectors)])
    prepared = prepare(zoo, PrepareConfig(token_size=40, align="none", normalization="none"))
    marks = [mark for split in ("train", "validation", "test") for mark in prepared.marks(split)]
    assert len({*marks}) == 12 and prepared.marks("train") == prepare(zoo, prepared.config).marks("train")
