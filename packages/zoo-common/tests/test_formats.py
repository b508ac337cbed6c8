"""Published formats: read by their rules, and written so that others read them."""

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
from support.formats import (
    assert_same_runs,
    dump,
    make_net,
    original_reader,
    quietly,
    run_record,
    write_trial,
)
from support.golden import assert_stats
from support.reliability import assert_same_files, truncate
from zoo_common import ParameterLayout, Zoo, open_source
from zoo_common.formats import lmdb_runs

GOLDEN = Path(__file__).parent / "golden" / "checkpoint_datasets"


def published(golden):
    """Folder of a golden dataset."""
    name = golden.case["dataset_name"].removesuffix("_loss").removesuffix("_error")
    return golden.path.parent / "checkpoint_datasets" / name


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


def test_folders_that_count_checkpoints_get_the_epochs_they_are_of(tmp_path):
    write_trial(tmp_path / "in" / "NN_1", 1, epochs=(0, 1, 2), first=0, last=5)  # saved after epochs 1, 3 and 5
    result = quietly(
        tmp_path / "in", tmp_path / "zoo", checkpoint_index_step=2, checkpoint_index_offset=1, epochs=[2, 3, 5]
    )
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.steps["NN_1"].tolist() == [3, 5]
    assert "checkpoint_000000.1" in result.dropped_checkpoints["NN_1"][0]  # epoch 2 is between two folders
    np.testing.assert_allclose(zoo.metrics["test_acc"]["NN_1"], [0.31, 0.51], rtol=1e-12)
    assert torch.equal(zoo.params["NN_1", 0], zoo.layout.flatten(make_net(11)))
    for step, offset in ((0, 0), (-1, 0), (1, -1)):
        with pytest.raises(ValueError, match="checkpoint_index_step must be at least 1"):
            quietly(tmp_path / "in", tmp_path / "no", checkpoint_index_step=step, checkpoint_index_offset=offset)


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
