"""Conversion: from a zoo to the published formats and back, stopped and gone on with, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.formats import (
    assert_same_runs,
    dump,
    make_net,
    original_reader,
    quietly,
    run_record,
    write_trial,
)
from support.reliability import assert_same_files, truncate
from torch import nn
from zoo_common import ParameterLayout, Run, Zoo, open_source
from zoo_common.cli import main
from zoo_common.formats import zoos

GOLDEN = Path(__file__).parent / "golden" / "checkpoint_datasets"


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
