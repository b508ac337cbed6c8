import json
import os
import re
import resource

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from support.reliability import flip_bit, flip_every_bit, truncate
from torch import nn
from zoo_common import ParameterLayout, Run, Zoo
from zoo_common.index import split_of
from zoo_common.manifest import read_document

LENGTHS = {"a": 3, "b": 1, "c": 5, "d": 3}


def shard_path(zoo, name):
    return zoo.path / "shards" / f"{name}.safetensors"


def test_everything_comes_back_after_opening(zoo, make_run):
    opened = Zoo.open(zoo.path)
    assert opened.task == "digits_loss" and opened.attributes == {"classes": 10}
    assert opened.layout == zoo.layout and opened.run_ids == ("a", "b", "c", "d")
    for run_id, length in LENGTHS.items():
        run, position = make_run(run_id, length), opened.index(run_id)
        info = opened.runs[position]
        assert (info.id, info.checkpoints, info.config) == (run_id, length, dict(run.config))
        assert torch.equal(opened.params[position], run.params)
        assert opened.steps[position].tolist() == run.steps
        assert opened.metrics["val_loss"][position].tolist() == run.metrics["val_loss"].double().tolist()
        for checkpoint in range(-length, length):
            assert torch.equal(opened.params[run_id, checkpoint], run.params[checkpoint])
            assert opened.steps[run_id, checkpoint] == run.steps[checkpoint]
            assert opened.weights(run_id, checkpoint)["1.num_batches_tracked"] == checkpoint % length


def test_a_run_read_whole_can_be_stored_again(zoo, tmp_path):
    copy = Zoo.create(tmp_path / "copy", layout=zoo.layout)
    copy.append([zoo.run(run_id) for run_id in ("c", "b")])
    for run_id in ("c", "b"):
        assert torch.equal(copy.params[run_id], zoo.params[run_id])
        assert copy.runs[copy.index(run_id)].config == zoo.runs[zoo.index(run_id)].config
        assert copy.steps[run_id].tolist() == zoo.steps[run_id].tolist()
        assert copy.metrics["error"][run_id].tolist() == zoo.metrics["error"][run_id].tolist()
        assert copy.weights(run_id, -1)["1.num_batches_tracked"] == zoo.weights(run_id, -1)["1.num_batches_tracked"]


def test_shards_are_the_documented_safetensors_files(zoo, layout):
    document = json.loads((zoo.path / "zoo.json").read_text())
    assert document["format"] == "weightspace-zoo" and document["layout"] == layout.id and document["version"] == 1
    assert (zoo.path / "layouts" / f"{layout.id}.json").is_file()
    with safe_open(shard_path(zoo, "0"), "np") as file:
        names = {"params", "step", "offsets", "metrics/val_loss", "metrics/error", "buffers/1.num_batches_tracked"}
        assert set(file.keys()) == names | {"checksums"}
        assert file.get_tensor("offsets").tolist() == [0, 3, 4]
        metadata = file.metadata()
        assert json.loads(metadata["layout"]) == layout.id
        assert json.loads(metadata["runs"]) == ["a", "b"] and json.loads(metadata["configs"]) == [{"seed": 1}] * 2


def test_parameters_are_mapped_and_not_copied(zoo):
    assert zoo.params["a"].data_ptr() == zoo.params["a", 0].data_ptr()
    zoo.params["a"][0] = 7
    assert (Zoo.open(zoo.path).params["a", 0] != 7).all()


def test_weights_load_into_a_module(zoo):
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(1), nn.Identity())
    module.load_state_dict(zoo.weights("c", 4))
    assert torch.equal(zoo.layout.flatten(module), zoo.params["c", 4])


@given(st.lists(st.tuples(st.integers(-4, 3), st.integers(-5, 4)), max_size=20))
def test_gather_equals_reading_one_by_one(shared_zoo, wanted):
    pairs = [(run, i) for run, i in wanted if -shared_zoo.runs[run].checkpoints <= i < shared_zoo.runs[run].checkpoints]
    runs, checkpoints = np.array([p[0] for p in pairs], dtype=int), np.array([p[1] for p in pairs], dtype=int)
    gathered = shared_zoo.params.gather(runs, checkpoints)
    assert gathered.shape == (len(pairs), shared_zoo.layout.size) and gathered.dtype == torch.float32
    losses = shared_zoo.metrics["val_loss"].gather(runs, checkpoints)
    for row, loss, (run, checkpoint) in zip(gathered, losses, pairs, strict=True):
        assert torch.equal(row, shared_zoo.params[run, checkpoint])
        assert loss == shared_zoo.metrics["val_loss"][run, checkpoint]


@pytest.fixture(scope="module")
def shared_zoo(tmp_path_factory):
    layout = ParameterLayout.from_module(nn.Linear(3, 1))
    zoo = Zoo.create(tmp_path_factory.mktemp("shared") / "zoo", layout=layout)
    generator = torch.Generator().manual_seed(0)
    for run_id, length in LENGTHS.items():
        params, loss = torch.randn(length, 4, generator=generator), torch.rand(length, generator=generator)
        zoo.append([Run(run_id, params, range(length), {"val_loss": loss})], name=run_id)
    return zoo


@pytest.mark.parametrize(
    ("read", "error", "match"),
    [
        (lambda zoo: zoo.params["x"], KeyError, "no run 'x'"),
        (lambda zoo: zoo.params[4], IndexError, "run 4 is out of range: the zoo has 4"),
        (lambda zoo: zoo.params["a", 3], IndexError, "checkpoint 3 is out of range: run 'a' has 3"),
        (lambda zoo: zoo.params.gather([0, 2], [0, 5]), IndexError, "run 'c' has 5"),
        (lambda zoo: zoo.params.gather([9], [0]), IndexError, "out of range"),
        (lambda zoo: zoo.metrics["loss"], KeyError, "'loss'.*val_loss, error"),
        (lambda zoo: zoo.split("dev"), ValueError, "train, validation, test, got 'dev'"),
        (lambda zoo: zoo.with_layout("0123"), FileNotFoundError, "'0123'"),
        (lambda zoo: zoo.stats(runs=[]), ValueError, "empty"),
        (lambda zoo: zoo.pairs([1], np.random.default_rng(0)), ValueError, "run 'b' has 1 checkpoints"),
        (lambda zoo: zoo.pairs([0], np.random.default_rng(0), min_spacing=0), ValueError, "1 <= min"),
        (lambda zoo: zoo.append([]), ValueError, "at least one run"),
    ],
)
def test_wrong_reads_are_named(zoo, read, error, match):
    with pytest.raises(error, match=match):
        read(zoo)


def test_metrics_and_steps_as_padded_tables(zoo):
    table = zoo.metrics["error"].padded()
    expected = [[0, 1, 2, -1, -1], [0, -1, -1, -1, -1], [0, 1, 2, 3, 4], [0, 1, 2, -1, -1]]
    assert np.nan_to_num(table, nan=-1).tolist() == expected


def test_a_metric_that_some_shards_lack_is_nan_there(zoo, make_run):
    zoo.append([make_run("e", 2, metrics={"accuracy": [0.5, 0.6]})])
    assert zoo.metrics["accuracy"]["e"].tolist() == [0.5, 0.6]
    assert np.isnan(zoo.metrics["accuracy"]["a"]).all() and np.isnan(zoo.metrics["error"]["e"]).all()
    assert set(zoo.metrics) == {"val_loss", "error", "accuracy"}


def test_splits_depend_on_the_id_alone_and_have_their_fractions():
    fractions = (0.7, 0.2, 0.1)
    splits = [split_of(f"run-{i}", fractions) for i in range(20_000)]
    counts = np.array([splits.count(name) for name in ("train", "validation", "test")]) / len(splits)
    # three standard deviations of a binomial share of 20,000 draws are below 0.01
    np.testing.assert_allclose(counts, fractions, atol=0.01, rtol=0)
    assert {split_of(f"{i}", (1, 0, 0)) for i in range(100)} == {"train"}
    assert {split_of(f"{i}", (0, 0, 1)) for i in range(100)} == {"test"}


def test_appending_never_moves_a_run_to_another_split(zoo, make_run):
    before = {run.id: run.split for run in zoo.runs}
    zoo.append([make_run(f"new-{i}", 1) for i in range(50)], name="00")
    after = {run.id: run.split for run in Zoo.open(zoo.path).runs}
    assert before.items() <= after.items()
    parts = [zoo.split(name) for name in ("train", "validation", "test")]
    assert sorted(np.concatenate(parts)) == list(range(54))
    assert all(zoo.runs[i].split == "train" for i in parts[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_storage_rounds_to_nearest(tmp_path, layout, make_run, dtype):
    zoo = Zoo.create(tmp_path / "half", layout=layout, dtype=dtype)
    run = make_run("a")
    zoo.append([run])
    assert Zoo.open(zoo.path).params["a"].dtype == getattr(torch, dtype)
    assert torch.equal(zoo.params["a"], run.params.to(getattr(torch, dtype)))
    assert torch.equal(zoo.params.gather([0], [1])[0], run.params[1].to(getattr(torch, dtype)).float())


def test_overflow_names_run_and_tensor_and_writes_nothing(tmp_path, layout, make_run):
    zoo = Zoo.create(tmp_path / "half", layout=layout, dtype="float16")
    run = make_run("big")
    run.params[1, layout.tensors[1].offset] = 1e5
    with pytest.raises(ValueError, match=r"run 'big': '0\.bias' does not fit torch\.float16.*65504"):
        zoo.append([make_run("a"), run])
    assert not os.listdir(zoo.path / "shards")


def test_infinite_parameters_are_data_and_not_an_overflow(tmp_path, layout, make_run):
    zoo = Zoo.create(tmp_path / "half", layout=layout, dtype="float16")
    run = make_run("a")
    run.params[0, 0] = float("inf")
    zoo.append([run])
    assert zoo.params["a", 0][0] == float("inf")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"params": torch.zeros(3, 5)}, r"params must be.*\(checkpoints, 10\), got torch.float32 \(3, 5\)"),
        ({"params": torch.zeros(0, 10)}, "params must be"),
        ({"params": torch.zeros(3, 10, dtype=torch.int64)}, "params must be floating-point"),
        ({"steps": [0, 1]}, r"steps must be 3 rising integers, got \[0, 1\]"),
        ({"steps": [0, 2, 1]}, "steps must be 3 rising"),
        ({"metrics": {"loss": [1.0]}}, r"metric 'loss' must have shape \(3,\), got \(1,\)"),
        ({"metrics": {"a/b": [1.0, 2, 3]}}, "metric 'a/b'"),
        ({"buffers": {}}, "buffers must be"),
        ({"config": {"f": print}}, "config cannot be stored as JSON"),
    ],
)
def test_a_run_that_does_not_fit_is_named(zoo, make_run, changes, match):
    with pytest.raises(ValueError, match=rf"run 'x': {match}"):
        zoo.append([make_run("ok"), make_run("x", 3, **changes)])
    assert len(zoo) == 4 and len(os.listdir(zoo.path / "shards")) == 3


def test_bad_names_are_refused(zoo, make_run):
    for name in ("", ".hidden", "a/b", "a b", "x" * 129):
        with pytest.raises(ValueError, match="run id"):
            zoo.append([make_run(name)])
    with pytest.raises(ValueError, match="shard name"):
        zoo.append([make_run("fine")], name="../x")


def test_a_named_shard_written_again_is_kept(zoo, make_run):
    before = shard_path(zoo, "1").stat().st_mtime_ns
    assert Zoo.open(zoo.path).append([make_run("c", 5)], name="1") == "1"
    assert shard_path(zoo, "1").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"shard '1' is in .* with other runs"):
        zoo.append([make_run("e")], name="1")
    with pytest.raises(ValueError, match="with other runs"):
        zoo.append([make_run("c", 5, config={"seed": 77})], name="1")


def test_duplicate_runs_are_refused_and_detected(zoo, make_run):
    with pytest.raises(ValueError, match=r"run 'a' of shard .*shard '0'"):
        zoo.append([make_run("e"), make_run("a")])
    with pytest.raises(ValueError, match="run 'f'"):
        zoo.append([make_run("f"), make_run("f")])
    shard_path(zoo, "copy").write_bytes(shard_path(zoo, "1").read_bytes())
    with pytest.raises(ValueError, match=r"run 'c' of shard 'copy' .*shard '1'.*delete one"):
        Zoo.open(zoo.path)


def test_two_writers_see_each_other_and_no_leftovers(zoo, make_run):
    other = Zoo.open(zoo.path)
    other.append([make_run("e")])
    (zoo.path / "shards" / ".123-half.safetensors").write_bytes(b"half")
    assert "e" not in zoo
    zoo.refresh()
    assert "e" in zoo and len(zoo) == 5
    with pytest.raises(ValueError, match="run 'e'"):
        other.append([make_run("e")])
    assert len(Zoo.open(zoo.path)) == 5


def test_more_shards_than_open_files_are_allowed(tmp_path, layout, make_run):
    zoo = Zoo.create(tmp_path / "many", layout=layout)
    for i in range(100):
        zoo.append([make_run(f"r{i}", 2)], name=f"{i:03d}")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, before[1]))
    try:
        opened = Zoo.open(zoo.path)
        gathered = opened.params.gather(np.arange(100), np.ones(100, int))
        steps = opened.steps.gather(np.arange(100), np.ones(100, int))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert torch.equal(gathered, torch.stack([make_run(f"r{i}", 2).params[1] for i in range(100)]))
    assert (steps == 2).all()


def test_several_layouts_live_in_one_zoo(zoo):
    module = nn.Linear(1, 1)
    other = zoo.with_layout(ParameterLayout.from_module(module))
    other.append([Run("tiny", torch.ones(2, 2), [0, 1])])
    opened = Zoo.open(zoo.path)
    assert opened.run_ids == ("a", "b", "c", "d") and "tiny" in opened
    assert opened.layout_ids == (zoo.layout.id, other.layout.id)
    view = opened.with_layout(other.layout.id)
    assert view.run_ids == ("tiny",) and view.params["tiny"].tolist() == [[1, 1], [1, 1]]
    assert not opened.verify().problems


def test_create_refuses_what_is_there_unless_it_is_the_same(zoo, layout):
    with pytest.raises(FileExistsError, match="there is a zoo"):
        Zoo.create(zoo.path, layout=layout)
    options = {"layout": layout, "task": "digits_loss", "attributes": {"classes": 10}, "exist_ok": True}
    assert len(Zoo.create(zoo.path, **options)) == 4
    with pytest.raises(
        ValueError, match=r"another one \(split: \[0\.8, 0\.1, 0\.1\] there, \[1\.0, 0\.0, 0\.0\] asked for"
    ):
        Zoo.create(zoo.path, **options, split=(1, 0, 0))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"split": (0.5, 0.4, 0.2)}, "sum to 1"),
        ({"split": (1.5, -0.5, 0)}, "three fractions"),
        ({"dtype": "int8"}, "'int8'"),
    ],
)
def test_create_checks_its_arguments(tmp_path, layout, options, match):
    with pytest.raises(ValueError, match=match):
        Zoo.create(tmp_path / "new", layout=layout, **options)
    assert not (tmp_path / "new").exists()


def test_opening_something_else_is_one_clear_error(tmp_path, zoo):
    with pytest.raises(FileNotFoundError, match=r"no zoo in .*no zoo\.json"):
        Zoo.open(tmp_path)
    document = json.loads((zoo.path / "zoo.json").read_text())
    (zoo.path / "zoo.json").write_text(json.dumps(document | {"version": 2}))
    with pytest.raises(ValueError, match="version 2"):
        Zoo.open(zoo.path)
    (zoo.path / "zoo.json").write_text("{")
    with pytest.raises(ValueError, match=r"zoo\.json is damaged"):
        Zoo.open(zoo.path)


def test_every_flipped_bit_in_the_description_is_found(zoo):
    for _ in flip_every_bit(zoo.path / "zoo.json"):
        with pytest.raises(ValueError, match=re.escape(str(zoo.path))):
            read_document(zoo.path)
    read_document(zoo.path)


def test_a_description_without_its_sum_may_be_edited(zoo):
    document = json.loads((zoo.path / "zoo.json").read_text())
    (zoo.path / "zoo.json").write_text(json.dumps(document | {"task": "other"}))
    with pytest.raises(ValueError, match="remove its entry 'sha256'"):
        Zoo.open(zoo.path)
    del document["sha256"]
    (zoo.path / "zoo.json").write_text(json.dumps(document | {"task": "other"}))
    assert Zoo.open(zoo.path).task == "other" and not zoo.verify().problems


def test_a_damaged_layout_is_named(zoo):
    path = zoo.path / "layouts" / f"{zoo.layout.id}.json"
    path.write_text(path.read_text().replace("0.weight", "1.weight"))
    with pytest.raises(ValueError, match=f"{zoo.layout.id}.json is damaged"):
        Zoo.open(zoo.path)


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_a_shard_is_found(zoo, seed):
    flip_bit(shard_path(zoo, "1"), seed)
    problems = zoo.verify().problems
    assert len(problems) >= 1 and "1" in problems[0]
    assert all("shard '1'" in problem or "1.safetensors" in problem for problem in problems)


def test_a_truncated_shard_is_named_when_opened(zoo):
    truncate(shard_path(zoo, "1"))
    with pytest.raises(ValueError, match=r"1\.safetensors is truncated"):
        Zoo.open(zoo.path)


@pytest.mark.parametrize("generator", [np.random.default_rng(0), torch.Generator().manual_seed(0)])
def test_pairs_are_uniform_in_the_spacing_and_then_in_the_start(zoo, generator):
    run, start, target = zoo.pairs(np.full(24_000, zoo.index("c")), generator)
    assert (run == zoo.index("c")).all() and (start >= 0).all() and (target <= 4).all()
    for spacing in (1, 2, 3, 4):
        starts = start[target - start == spacing]
        # a share of 24,000 draws has a standard deviation below 0.003, a share of a quarter of them below 0.007
        assert abs(len(starts) / 24_000 - 1 / 4) < 0.015
        np.testing.assert_allclose(
            np.bincount(starts, minlength=5 - spacing) / len(starts), 1 / (5 - spacing), atol=0.035
        )


def test_pairs_keep_to_the_spacings_of_mixed_runs(zoo):
    runs = np.array([0, 2, 3] * 500)
    run, start, target = zoo.pairs(runs, np.random.default_rng(1), min_spacing=2, max_spacing=3)
    assert (run == runs).all() and set(target - start) == {2, 3}
    assert (target < np.array([3, 1, 5, 3])[run]).all()


def test_stats_equal_the_plain_formulas(zoo):
    runs = [0, 2, 3]
    every = torch.cat([zoo.params[run] for run in runs]).double()
    stats = zoo.stats(runs=runs)
    assert stats.count == 11
    torch.testing.assert_close(stats.mean, every.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats.std, every.std(0), rtol=1e-12, atol=1e-12)
    assert stats.overall_mean == pytest.approx(every.mean().item(), rel=1e-12)
    assert stats.overall_std == pytest.approx(every.std().item(), rel=1e-12)
    assert (stats.low, stats.high) == (every.min().item(), every.max().item())
    assert zoo.stats("train").count == sum(run.checkpoints for run in zoo.runs if run.split == "train")


def test_filter_counts_by_reason(zoo, make_run):
    for run_id, value in {"nan": float("nan"), "inf": float("-inf"), "large": -11.0, "limit": 10.0}.items():
        run = make_run(run_id)
        run.params[1, 3] = value
        zoo.append([run], name=run_id)
    filtered = zoo.filter(max_abs=10.0)
    assert {zoo.run_ids[i] for i in filtered.kept} == {"a", "b", "c", "d", "limit"}
    assert filtered.dropped == {"non-finite": 2, "above 10": 1}


def test_an_empty_zoo_answers(tmp_path, layout):
    zoo = Zoo.create(tmp_path / "new" / "zoo", layout=layout)
    assert len(zoo) == 0 and len(zoo.split("train")) == 0 and list(zoo.metrics) == []
    assert zoo.params.gather([], []).shape == (0, layout.size)
    assert zoo.filter().kept.tolist() == [] and zoo.verify().problems == ()
