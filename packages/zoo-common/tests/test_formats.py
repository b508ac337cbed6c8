"""Published formats: read by their rules, written so that others read them, converted in both directions."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.golden import assert_stats
from support.reliability import assert_same_files, truncate
from torch import nn
from zoo_common import ParameterLayout, Run, Zoo, convert, open_source
from zoo_common.cli import main
from zoo_common.formats import lmdb_runs, zoos

GOLDEN = Path(__file__).parent / "golden" / "checkpoint_datasets"


@pytest.fixture(autouse=True)
def closed():
    """No environment stays open: LMDB opens none twice."""
    yield
    while lmdb_runs._open:
        lmdb_runs._open.popitem()[1].close()


def published(golden):
    """Folder of a golden dataset."""
    name = golden.case["dataset_name"].removesuffix("_loss").removesuffix("_error")
    return golden.path.parent / "checkpoint_datasets" / name


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


# G.pt's datasets


@pytest.mark.golden("parameter_dataset.json", cases="datasets")
def test_a_dataset_of_gpt_reads_as_published(golden, tmp_path):
    case = golden.case
    quietly(published(golden), tmp_path / "zoo", verify_done=case["options"].get("verify_done", False))
    zoo = Zoo.open(tmp_path / "zoo")
    splits = [case[split] for split in ("train", "test") if case[split] and case[split]["runs"]]
    for split, place in zip(splits, (slice(None), slice(-case["num_test_runs"], None)), strict=False):
        assert list(zoo.run_ids[place][: len(split["runs"])]) == split["runs"]
    for split in splits:
        assert zoo.layout.names == tuple(split["parameter_names"])
        assert zoo.layout.sizes == tuple(split["parameter_sizes"])
        assert [len(zoo.params[run]) for run in split["runs"]] == split["num_checkpoints"]
        curves = [zoo.metrics[case["train_metric"]][run].tolist() for run in split["runs"]]
        np.testing.assert_array_equal(np.float32(curves), np.float32(split["run_losses"]))
        best = max if case["train_metric"] == "train_ret" else min
        assert best(map(best, curves)) == split["optimal"]
        low, high = torch.cat([zoo.params[run] for run in split["runs"]]).aminmax()
        assert (low.item(), high.item()) == (split["min_val"], split["max_val"])
        for network in split["networks"]:
            vector = zoo.params[split["runs"][network["run"]], network["iter"]]
            assert_stats(vector, network["raw"], what=f"run {network['run']}")
    assert all(run.config == {} for run in zoo.runs)
    assert zoo.verify().problems == ()


@pytest.mark.golden("parameter_dataset.json", cases="datasets")
def test_a_dataset_of_gpt_comes_back_bit_by_bit(golden, tmp_path):
    source = published(golden)
    quietly(source, tmp_path / "zoo")
    quietly(tmp_path / "zoo", tmp_path / "back", target_format="gpt")
    zoo, records, written = Zoo.open(tmp_path / "zoo"), {}, {}
    for folder in sorted(source.iterdir()):
        records |= dump(folder)
        for name in folder.name.split("_"):
            assert run_record(tmp_path / "back" / name, name) == run_record(folder, name)
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted(zoo.run_ids)
    for run_id in zoo.run_ids:
        written |= dump(tmp_path / "back" / run_id)
        assert (tmp_path / "back" / run_id / "DONE.txt").read_bytes() == b""
    assert written == records
    first = [key.decode() for key in sorted(dump(tmp_path / "back" / zoo.run_ids[0]))]
    assert first == golden.case["keys_of_first_database"]
    assert written[f"{first[0]}_arch".encode()].hex() == golden.case["raw_arch_value_hex"]


@pytest.mark.parametrize(
    ("given", "steps"), [({}, [0, 2, 9, 100_001, 100_010]), ({"steps_per_epoch": 468}, [0, 2, 9, 469, 478])]
)
def test_steps_are_those_of_the_keys(tmp_path, given, steps):
    quietly(GOLDEN / "mnist", tmp_path / "zoo", **given)
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.task == "mnist" and zoo.steps["000000"].tolist() == steps
    quietly(tmp_path / "zoo", tmp_path / "back", target_format="gpt")
    assert_same_files(tmp_path / "back", GOLDEN / "mnist", except_for=["data.mdb", "lock.mdb"])


def test_a_wrong_length_of_an_epoch_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"000000/ep001_it00010.pt.*epoch of 9 steps"):
        quietly(GOLDEN / "mnist", tmp_path / "zoo", steps_per_epoch=9)


@pytest.mark.parametrize("section", ["metadata", "checkpoints", "notes"])
def test_what_does_not_follow_from_the_run_is_kept(tmp_path, section):
    shutil.copytree(GOLDEN / "mnist", tmp_path / "in")
    file = tmp_path / "in" / "000001" / "runs.json"
    document = json.loads(file.read_text())
    document.setdefault(section, {})["avg_test_loss" if section == "metadata" else "000001/ep000_it00000.pt"] = {"x": 1}
    file.write_text(json.dumps(document, indent=2, sort_keys=True))
    quietly(tmp_path / "in", tmp_path / "zoo")
    assert len(json.dumps(Zoo.open(tmp_path / "zoo").runs[1].config)) < (100 if section == "metadata" else 2000)
    quietly(tmp_path / "zoo", tmp_path / "out", target_format="gpt")
    assert_same_files(tmp_path / "out", tmp_path / "in", except_for=["data.mdb", "lock.mdb"])


def write_lmdb(folder, records, document):
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, values in records.items():
            transaction.put(key.encode(), np.array(values, "<f4").tobytes())
    (folder / "runs.json").write_text(json.dumps(document))


def test_other_sizes_give_tensors_without_names_or_those_of_a_task(tmp_path):
    values = np.arange(760, dtype="f4")
    records = {"000000/it00001.pt": values, "000000/it00001.pt_arch": [640, 10, 100, 10]}
    write_lmdb(tmp_path / "in" / "000000", records, {"checkpoints": {"000000/it00001.pt": {"loss": 1}}, "metadata": {}})
    quietly(tmp_path / "in", tmp_path / "plain")
    plain = Zoo.open(tmp_path / "plain")
    assert plain.layout.names == ("tensor0", "tensor1", "tensor2", "tensor3") and plain.layout.sizes[0] == 640
    assert "not known" in plain.attributes["note"] and plain.params["000000", 0].tolist() == values.tolist()
    quietly(tmp_path / "in", tmp_path / "named", task="digits")
    named = Zoo.open(tmp_path / "named")
    assert named.layout.shapes[0] == (10, 64) and (named.task, named.attributes) == ("digits", {})
    with pytest.raises(ValueError, match=r"'000000'.*\[640, 10, 100, 10\].*cifar10"):
        quietly(tmp_path / "in", tmp_path / "wrong", task="cifar10")


def test_missing_cut_and_infinite_records_are_dropped_by_name(tmp_path):
    keys = [f"000000/it{i:05d}.pt" for i in range(4)]
    records = {key: [1.0, 2, 3, 4] for key in keys} | {f"{key}_arch": [3, 1] for key in keys}
    records[keys[1]], records[keys[2]] = [1.0, np.nan, 3, 4], [1.0]
    del records[keys[3]]
    rows = {key: {"train_ret": i} for i, key in enumerate(keys)}
    write_lmdb(tmp_path / "in" / "000000", records, {"checkpoints": rows, "metadata": {}})
    result = quietly(tmp_path / "in", tmp_path / "zoo")
    nan, cut, missing = result.dropped_checkpoints["000000"]
    assert "it00001.pt: 'tensor0' is not finite" in nan and "4 bytes, not 16" in cut and "is missing" in missing
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.params["000000"].tolist() == [[1, 2, 3, 4]] and zoo.metrics["train_ret"]["000000"].tolist() == [0]
    assert zoo.runs[0].config["dropped_checkpoints"] == [nan, cut, missing]


def test_folders_that_are_not_done_can_be_passed_over(tmp_path):
    shutil.copytree(GOLDEN / "mnist", tmp_path / "in")
    (tmp_path / "in" / "000001" / "DONE.txt").unlink()
    assert open_source(tmp_path / "in").run_ids == ("000000", "000001", "000002")
    assert open_source(tmp_path / "in", verify_done=True).run_ids == ("000000", "000002")


def test_many_readers_share_the_environments_of_a_process(tmp_path):
    sources = [open_source(GOLDEN / "cartpole") for _ in range(2)] + [
        pickle.loads(pickle.dumps(open_source(GOLDEN / "cartpole")))
    ]
    vectors = [source.read(run_id).params for run_id in ("000005", "000004") for source in sources]
    assert torch.equal(vectors[0], vectors[1]) and torch.equal(vectors[3], vectors[5])
    child = os.fork()
    if child == 0:
        os._exit(not torch.equal(sources[0].read("000004").params, vectors[3]))
    assert os.waitpid(child, 0)[1] == 0


def test_no_more_than_some_environments_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(lmdb_runs, "_MOST_OPEN", 2)
    source = open_source(GOLDEN / "cartpole")
    for run_id in source.run_ids:
        source.read(run_id)
        assert len(lmdb_runs._open) <= 2
    source.read(source.run_ids[0])


def test_without_lmdb_the_error_names_the_extra(tmp_path):
    code = (
        "import sys; sys.modules['lmdb'] = None; from zoo_common.cli import main; "
        f"sys.exit(main(['convert', {str(GOLDEN / 'mnist')!r}, {str(tmp_path / 'zoo')!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "pip install 'zoo-common[lmdb]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


# Trial folders


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


@pytest.fixture
def trials(tmp_path):
    """Three trials whose order on disk is not that of their names."""
    for seed in (2, 3, 1):
        write_trial(tmp_path / "trials" / f"NN_tune_{seed:05d}_seed={seed}", seed)
    return tmp_path / "trials"


@pytest.mark.parametrize("first", [0, 1])
def test_trials_read_as_published(tmp_path, first):
    for seed in (2, 1):
        write_trial(tmp_path / "in" / f"NN_{seed}", seed, epochs=(1, 3), first=first)
    quietly(tmp_path / "in", tmp_path / "zoo")
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.run_ids == ("NN_1", "NN_2") and zoo.layout == ParameterLayout.from_module(make_net())
    for seed in (1, 2):
        run = f"NN_{seed}"
        assert zoo.steps[run].tolist() == [1, 3]
        np.testing.assert_allclose(zoo.metrics["test_acc"][run], [0.1 + 0.01 * seed, 0.3 + 0.01 * seed], rtol=1e-12)
        assert zoo.runs[zoo.index(run)].config["optim::lr"] == 1e-3
        for i, epoch in enumerate((1, 3)):
            expected = make_net(10 * seed + epoch).state_dict()
            found = zoo.weights(run, i)
            assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


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


@pytest.mark.parametrize(("first", "epochs"), [(0, (0, 1, 2, 3)), (1, (1, 2, 3)), (1, (3,)), (0, (2, 3)), (2, (2, 3))])
def test_exported_trials_are_read_by_the_published_rules(tmp_path, first, epochs):
    for seed in (1, 2):
        write_trial(tmp_path / "in" / f"NN_{seed}", seed, epochs=epochs, first=first)
    quietly(tmp_path / "in", tmp_path / "zoo")
    quietly(tmp_path / "zoo", tmp_path / "out", target_format="trials")
    for (name, epoch), (state, line) in original_reader(tmp_path / "out", epochs).items():
        seed = int(name[-1])
        expected = make_net(10 * seed + epoch).state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in expected)
        assert line["test_acc"] == 0.1 * epoch + 0.01 * seed
        assert line["config"]["seed"] == seed and line["trial_id"] == f"da_{seed}"
        assert json.loads((tmp_path / "out" / name / "params.json").read_text())["seed"] == seed
    quietly(tmp_path / "out", tmp_path / "again")
    assert_same_runs(Zoo.open(tmp_path / "again"), Zoo.open(tmp_path / "zoo"))


def test_the_short_folder_name_goes_first_and_epochs_can_be_chosen(trials, tmp_path):
    trial = trials / "NN_tune_00001_seed=1"
    (trial / "checkpoint_1").mkdir()
    torch.save(make_net(99).state_dict(), trial / "checkpoint_1" / "checkpoints")
    result = quietly(trials, tmp_path / "zoo", epochs=[2, 1, 7])
    zoo = Zoo.open(tmp_path / "zoo")
    assert torch.equal(zoo.params[trial.name, 0], zoo.layout.flatten(make_net(99)))
    assert zoo.steps[trial.name].tolist() == [1, 2]
    assert "checkpoint_000007" in result.dropped_checkpoints[trial.name][0] and len(result.dropped_checkpoints) == 3


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_bad_checkpoints_are_dropped_by_name_and_never_run(trials, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two, three = sorted(trials.iterdir())
    state = make_net().state_dict()
    state["0.bias"][1] = float("nan")
    torch.save(state, one / "checkpoint_000000" / "checkpoints")
    torch.save({"a": Evil()}, one / "checkpoint_000001" / "checkpoints")
    truncate(one / "checkpoint_000002" / "checkpoints")
    (two / "checkpoint_000001" / "checkpoints").unlink()
    torch.save(OrderedDict(a=3), three / "checkpoint_000002" / "checkpoints")
    with (three / "result.json").open("a") as file:
        file.write('{"training_iteration": 4, "test_')
    (trials / "logs").mkdir()
    result = quietly(trials, tmp_path / "zoo")
    assert result.dropped_runs.keys() == {one.name, "logs"} and "no checkpoints" in result.dropped_runs["logs"]
    assert "mkdir" in result.dropped_runs[one.name] or "'0.bias'" in result.dropped_runs[one.name]
    assert "checkpoint_000001" in result.dropped_checkpoints[two.name][0]
    assert "'a' is int" in result.dropped_checkpoints[three.name][0]
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.run_ids == (two.name, three.name) and zoo.steps[two.name].tolist() == [0, 2]
    assert zoo.runs[1].config["from_trial"]["damaged_lines"] == 1
    assert not (tmp_path / "evil").exists() and zoo.verify().problems == ()


@pytest.mark.parametrize(("kind", "file"), [("trials", "params.json"), ("gpt", "runs.json")])
@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_run_with_a_damaged_description_is_dropped_by_name(trials, tmp_path, kind, file, content):
    source = tmp_path / "in"
    shutil.copytree(trials if kind == "trials" else GOLDEN / "mnist", source)
    first = min(source.iterdir())
    (first / file).write_text(content) if content else (first / file).unlink()
    result = quietly(source, tmp_path / "zoo", source_format=kind)
    if (kind, content) == ("trials", None):  # then the lines of result.json tell the config
        assert Zoo.open(tmp_path / "zoo").runs[0].config["seed"] == 1
    else:
        assert list(result.dropped_runs) == [first.name] and file in result.dropped_runs[first.name]


# Folders of files


def test_files_and_folders_of_files_are_runs(tmp_path):
    folder = tmp_path / "in" / "training"
    folder.mkdir(parents=True)
    for step in (2, 10, 1):
        torch.save({"state_dict": make_net(step).state_dict(), "step": step}, folder / f"net_{step}.pth")
    save_file(make_net(7).state_dict(), tmp_path / "in" / "single.safetensors")
    torch.save(make_net(8).state_dict(), tmp_path / "in" / "a net.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "in" / "notes.txt").touch()
    quietly(tmp_path / "in", tmp_path / "zoo")
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.run_ids == ("a_net", "single", "training") and zoo.steps["training"].tolist() == [1, 2, 10]
    expected = {("training", 0): 1, ("training", 1): 2, ("training", 2): 10, ("single", 0): 7, ("a_net", 0): 8}
    for (run, i), seed in expected.items():
        assert torch.equal(zoo.params[run, i], zoo.layout.flatten(make_net(seed)))
        assert zoo.weights(run, i)["1.num_batches_tracked"] == seed


def test_steps_of_names_that_do_not_tell_them_are_counted(tmp_path):
    for name in ("first.pt", "best.pt", "epoch_3.pt"):
        (tmp_path / "in" / "run").mkdir(parents=True, exist_ok=True)
        torch.save(make_net().state_dict(), tmp_path / "in" / "run" / name)
    quietly(tmp_path / "in", tmp_path / "zoo")
    assert Zoo.open(tmp_path / "zoo").steps["run"].tolist() == [0, 1, 2]


# From a zoo and back


@pytest.fixture
def own(tmp_path):
    """A zoo with buffers, configs and steps of its own, in small shards."""
    layout = ParameterLayout.from_module(make_net())
    zoo = Zoo.create(tmp_path / "own", layout=layout, task="sum", split=(0.5, 0.2, 0.3), attributes={"n": 1})
    for seed in range(5):
        nets = [make_net(10 * seed + i) for i in range(1 + seed)]
        steps = [0, 5, 123_456, 200_000, 10_000_000][: 1 + seed]
        metrics = {"test_loss": [0.1 * i for i in range(1 + seed)], "test_error": [50.0 - i for i in range(1 + seed)]}
        buffers = {"1.num_batches_tracked": torch.stack([net[1].num_batches_tracked for net in nets])}
        zoo.append([Run(f"run.{seed}", layout.stack(nets), steps, metrics, {"seed": seed}, buffers)], name=f"s{seed}")
    return zoo


def test_a_zoo_becomes_trials_with_common_epochs_and_comes_back(own, tmp_path):
    quietly(own.path, tmp_path / "trials", target_format="trials")
    state, line = original_reader(tmp_path / "trials", [0])["run.3", 0]
    assert state["1.num_batches_tracked"] == 30 and (line["test_error"], line["config"]) == (50.0, {"seed": 3})
    assert max(p.name for p in (tmp_path / "trials" / "run.2").glob("check*")) == "checkpoint_000002"
    file = tmp_path / "trials" / "run.2" / "checkpoint_000002" / "checkpoints"
    storages = {tensor.untyped_storage().nbytes() for tensor in torch.load(file, weights_only=True).values()}
    assert max(storages) == 24, "a tensor was saved with what it is a view of"
    quietly(tmp_path / "trials", tmp_path / "back")
    back = Zoo.open(tmp_path / "back")
    for info in back.runs:
        info.config.pop("from_trial")
    assert_same_runs(back, own)


def test_a_zoo_becomes_a_dataset_of_gpt_and_comes_back(own, tmp_path):
    result = quietly(own.path, tmp_path / "gpt", target_format="gpt")
    assert result.left_out == ["1.num_batches_tracked"]
    assert sorted(p.name for p in (tmp_path / "gpt").iterdir()) == [f"{i:06d}" for i in range(5)]
    record = run_record(tmp_path / "gpt" / "000003", "000003")
    keys = sorted(record["checkpoints"])
    assert keys[1:3] == ["000003/ep000_it00005.pt", "000003/ep001_it23456.pt"]
    assert record["metadata"]["avg_test_err"] == [50.0, 49.0, 48.0, 47.0]
    assert record["metadata"]["optimal_test_loss"] == 0.0 and record["metadata"]["optimal_test_err"] == 47.0
    vectors = [np.frombuffer(dump(tmp_path / "gpt" / "000003")[key.encode()], "f4") for key in keys]
    np.testing.assert_array_equal(vectors, own.params["run.3"].numpy())
    quietly(tmp_path / "gpt", tmp_path / "back")
    back = Zoo.open(tmp_path / "back")
    assert back.task == "sum" and back.layout.tensors == own.layout.tensors and back.layout.buffers == ()
    for run_id in own.run_ids:
        assert torch.equal(back.params[run_id], own.params[run_id]) and own.runs[own.index(run_id)].config == (
            back.runs[back.index(run_id)].config
        )
        assert back.steps[run_id].tolist() == own.steps[run_id].tolist()
        assert back.metrics["test_error"][run_id].tolist() == own.metrics["test_error"][run_id].tolist()


def test_returns_make_a_dataset_of_reinforcement_learning(tmp_path):
    layout = ParameterLayout.from_module(nn.Linear(2, 1))
    zoo = Zoo.create(tmp_path / "zoo", layout=layout)
    zoo.append([Run("000007", torch.zeros(2, 3), [0, 9], {"train_ret": [1.5, 0.5]})])
    quietly(zoo.path, tmp_path / "gpt", target_format="gpt")
    records = dump(tmp_path / "gpt" / "000007")
    assert records[b"000007/it00009.pt_train_ret"] == np.float32(0.5).tobytes() and len(records) == 6
    assert run_record(tmp_path / "gpt" / "000007", "000007")["metadata"]["optimal_train_ret"] == 1.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_zoo_can_be_stored_in_another_dtype(own, tmp_path, dtype):
    quietly(own.path, tmp_path / "half", dtype=dtype)
    half = Zoo.open(tmp_path / "half")
    assert (half.task, half.fractions, half.attributes) == (own.task, own.fractions, own.attributes)
    assert torch.equal(half.params["run.4"], own.params["run.4"].to(getattr(torch, dtype)))
    assert [run.split for run in half.runs] == [run.split for run in own.runs]
    for kind in ("gpt", "trials"):
        quietly(half.path, tmp_path / kind, target_format=kind)
        back = open_source(tmp_path / kind).read("run.4").params
        assert torch.equal(back, half.params["run.4"].float())


def test_a_zoo_can_be_stored_as_differences_and_gone_on_with(own, tmp_path):
    quietly(own.path, tmp_path / "small", dtype="delta10", limit_runs=1)
    assert quietly(own.path, tmp_path / "small", dtype="delta10").present == 1
    small = Zoo.open(tmp_path / "small")
    assert small.storage == "delta10" and small.run_ids == own.run_ids
    for run_id in own.run_ids:
        torch.testing.assert_close(small.params[run_id], own.params[run_id].float(), rtol=0, atol=0.02)
    quietly(small.path, tmp_path / "trials", target_format="trials")
    back = open_source(tmp_path / "trials").read(own.run_ids[0]).params
    assert torch.equal(back, small.params[own.run_ids[0]])


# Going on, and what is refused


def test_a_conversion_goes_on_where_it_stopped(trials, tmp_path, monkeypatch):
    monkeypatch.setattr(zoos, "_SHARD_BYTES", 1)  # one run per shard
    whole = quietly(trials, tmp_path / "whole")
    assert (whole.added, whole.present, whole.checkpoints) == (3, 0, 9)
    for kind, target in (("zoo", "a"), ("trials", "b"), ("gpt", "c")):
        source = trials if kind == "zoo" else tmp_path / "whole"
        first = quietly(source, tmp_path / target, target_format=kind, limit_runs=2)
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / target).rglob("*") if path.is_file()}
        rest = quietly(source, tmp_path / target, target_format=kind)
        assert (first.added, rest.added, rest.present) == (2, 1, 2)
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if path.name != "lock.mdb")
        assert quietly(source, tmp_path / target, target_format=kind).added == 0
    assert_same_files(tmp_path / "a", tmp_path / "whole")


@pytest.mark.parametrize("kind", ["zoo", "gpt", "trials"])
def test_another_source_with_the_same_run_names_is_refused(trials, tmp_path, kind):
    quietly(trials, tmp_path / "out", target_format=kind)
    for seed in (1, 2, 3):
        shutil.rmtree(trials / f"NN_tune_{seed:05d}_seed={seed}")
        write_trial(trials / f"NN_tune_{seed:05d}_seed={seed}", seed + 5)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="choose another target"):
        quietly(trials, tmp_path / "out", target_format=kind)
    assert {p: p.read_bytes() for p in before if p.name != "lock.mdb"} == {
        p: content for p, content in before.items() if p.name != "lock.mdb"
    }


def test_leftovers_of_killed_writers_are_removed(own, tmp_path):
    left = tmp_path / "out" / f".{'0' * 32}-run.1"
    left.mkdir(parents=True)
    quietly(own.path, tmp_path / "out", target_format="trials")
    assert not left.exists() and len(list((tmp_path / "out").iterdir())) == 5


def test_a_run_of_another_layout_stops_the_conversion_or_is_passed_over(trials, tmp_path):
    write_trial(trials / "NN_tune_00002_wide", 9, width=4)
    with pytest.raises(ValueError, match=r"'NN_tune_00002_wide'.*'0.weight' is float32 \(4, 2\).*--skip-other-layouts"):
        quietly(trials, tmp_path / "zoo")
    result = quietly(trials, tmp_path / "zoo", skip_other_layouts=True)
    assert list(result.other_layouts) == ["NN_tune_00002_wide"] and result.added + result.present == 3


def test_runs_of_other_layouts_in_a_zoo_are_told_apart(own, tmp_path):
    wide = own.with_layout(ParameterLayout.from_module(nn.Linear(2, 1)))
    wide.append([Run("other", torch.zeros(1, 3), [0])], name="t")
    with pytest.raises(ValueError, match=r"'other'.*'0.weight' is absent"):
        quietly(own.path, tmp_path / "gpt", target_format="gpt")
    assert quietly(own.path, tmp_path / "gpt", target_format="gpt", skip_other_layouts=True).present == 5


@pytest.mark.parametrize("kind", ["zoo", "gpt", "trials"])
def test_the_order_of_the_tensors_does_not_count(own, tmp_path, kind):
    swapped = ParameterLayout.from_state_dict(dict(reversed(make_net(5).state_dict().items())))
    wide = own.with_layout(swapped)
    wide.append([Run("swapped", swapped.stack([make_net(5).state_dict()]), [0], buffers=zero(own, 1))], name="t")
    quietly(own.path, tmp_path / "out", target_format=kind)
    run = open_source(tmp_path / "out").read("swapped")
    assert torch.equal(run.params[0], own.layout.flatten(make_net(5)))


def test_damage_of_a_shard_stops_the_conversion(own, tmp_path):
    file = own.path / "shards" / "s2.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"s2.safetensors is damaged"):
        quietly(own.path, tmp_path / "gpt", target_format="gpt")
    assert sorted(path.name for path in (tmp_path / "gpt").iterdir()) == ["000000", "000001"]


def refuse(name):
    """Prepare a source and a target that do not work; returns the arguments and a part of the message."""

    def decorate(make):
        REFUSED.append(pytest.param(make, id=name))
        return make

    return decorate


REFUSED = []


@refuse("no folder")
def _(tmp, own):
    return [tmp / "absent", tmp / "out"], "there is no folder"


@refuse("nothing in it")
def _(tmp, own):
    (tmp / "empty").mkdir()
    return [tmp / "empty", tmp / "out"], "holds no runs: expected a zoo: zoo.json; runs of G.pt"


@refuse("another format")
def _(tmp, own):
    return [GOLDEN / "mnist", tmp / "out", "--from", "files"], "holds no runs of the format 'files'"


@refuse("one run")
def _(tmp, own):
    return [GOLDEN / "mnist" / "000000", tmp / "out"], f"this is one run, give {GOLDEN / 'mnist'}"


@refuse("an empty zoo")
def _(tmp, own):
    Zoo.create(tmp / "zoo", layout=own.layout)
    return [tmp / "zoo", tmp / "out", "--to", "gpt"], "holds no runs"


@refuse("a run twice")
def _(tmp, own):
    shutil.copytree(GOLDEN / "cartpole", tmp / "in")
    shutil.copytree(GOLDEN / "cartpole" / "000003", tmp / "in" / "000005")
    return [tmp / "in", tmp / "out"], f"{tmp}/in/000004_000005 and {tmp}/in/000005 both hold a run '000005'"


@refuse("names that become one")
def _(tmp, own):
    (tmp / "in").mkdir()
    for name in ("a b.pt", "a_b.pt"):
        torch.save(make_net().state_dict(), tmp / "in" / name)
    return [tmp / "in", tmp / "out"], "both hold a run 'a_b'"


@refuse("nothing readable")
def _(tmp, own):
    (tmp / "in").mkdir()
    (tmp / "in" / "a.pt").write_bytes(b"no file of torch")
    return [tmp / "in", tmp / "out"], "none of the 1 runs"


@refuse("a truncated database")
def _(tmp, own):
    shutil.copytree(GOLDEN / "mnist" / "000000", tmp / "in" / "000000")
    truncate(tmp / "in" / "000000" / "data.mdb")
    return [tmp / "in", tmp / "out"], "data.mdb is truncated"


@refuse("no database")
def _(tmp, own):
    shutil.copytree(GOLDEN / "mnist" / "000000", tmp / "in" / "000000")
    (tmp / "in" / "000000" / "data.mdb").write_bytes(b"x" * 10_000)
    return [tmp / "in", tmp / "out"], "data.mdb is damaged"


@refuse("a target with other files")
def _(tmp, own):
    (tmp / "out").mkdir()
    (tmp / "out" / "thesis.tex").touch()
    return [own.path, tmp / "out", "--to", "gpt"], "holds other files (thesis.tex)"


@refuse("a target in the source")
def _(tmp, own):
    return [own.path, own.path / "out", "--to", "gpt"], "lies in the source"


@refuse("the source as target")
def _(tmp, own):
    return [own.path, own.path], "lies in the source"


@refuse("a zoo of something else")
def _(tmp, own):
    return [GOLDEN / "mnist", own.path], "is another one"


@refuse("a file as target")
def _(tmp, own):
    (tmp / "out").touch()
    return [own.path, tmp / "out", "--to", "trials"], "is a file"


@refuse("an option of another format")
def _(tmp, own):
    return [GOLDEN / "mnist", tmp / "out", "--epochs", "1"], "epochs is not an option of the format 'gpt'"


@refuse("a dtype for a published format")
def _(tmp, own):
    return [own.path, tmp / "out", "--to", "gpt", "--dtype", "float16"], "a dtype can be chosen for a zoo"


@refuse("no runs asked for")
def _(tmp, own):
    return [own.path, tmp / "out", "--limit-runs", "0"], "at least 1, got 0"


@refuse("steps beyond the keys")
def _(tmp, own):
    metrics = {"test_loss": [0, 0], "test_error": [0, 0]}
    own.append([Run("late", torch.zeros(2, own.layout.size), [10**8 - 1, 10**8], metrics, buffers=zero(own, 2))])
    return [own.path, tmp / "out", "--to", "gpt"], "run 'late': steps up to 100000000"


def zero(zoo, count):
    return {spec.name: torch.zeros(count, *spec.shape, dtype=spec.dtype) for spec in zoo.layout.buffers}


@pytest.mark.parametrize("make", REFUSED)
def test_what_cannot_be_converted_is_one_line(make, own, tmp_path, capsys):
    arguments, message = make(tmp_path, own)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["convert", *map(str, arguments)]) == 1
    error = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line and "run/s" not in line]
    assert len(error) == 1 and message in error[0], error
    assert {path: path.read_bytes() for path in before} == before


def test_the_command_prints_what_was_done(own, tmp_path, capsys):
    assert main(["convert", str(own.path), str(tmp_path / "out"), "--to", "trials", "--json"]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["added"], summary["checkpoints"], summary["parameters"]) == (5, 15, own.layout.size)
    assert "5/5" in captured.err
