import json
import os
import re
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.reliability import truncate
from zoo_common import ParameterLayout, Run, Zoo, files
from zoo_common.verify import verify_zoo

LEFT = f".{'1f' * 16}-2.safetensors"


def test_a_sound_zoo_has_no_problems(zoo):
    report = verify_zoo(zoo.path)
    assert (report.shards, report.runs, report.checkpoints, report.leftovers) == (3, 4, 12, 0)
    assert report.problems == ()


def test_values_that_are_not_finite_name_shard_run_and_tensor(zoo, make_run):
    run = make_run("bad")
    run.params[2, zoo.layout.tensors[1].offset] = float("nan")
    zoo.append([make_run("good"), run], name="x")
    assert verify_zoo(zoo.path).problems == ("shard 'x': run 'bad': '0.bias' holds values that are not finite",)


def test_a_damaged_tensor_is_named(zoo):
    path = zoo.path / "shards" / "1.safetensors"
    with safe_open(path, "pt") as file:
        first = file.get_tensor("params").numpy().tobytes()
    content = path.read_bytes()
    position = content.index(first)
    path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    assert verify_zoo(zoo.path).problems == ("shard '1': tensor 'params' is damaged: wrong SHA-256, in run 'c'",)


def test_every_bad_shard_is_listed(zoo):
    truncate(zoo.path / "shards" / "0.safetensors")
    shutil.copy(zoo.path / "shards" / "1.safetensors", zoo.path / "shards" / "copy.safetensors")
    (zoo.path / "shards" / LEFT).write_bytes(b"left by a killed writer")
    report = verify_zoo(zoo.path)
    assert report.leftovers == 1 and len(report.problems) == 2
    assert "0.safetensors is truncated" in report.problems[0]
    assert report.problems[1] == "run 'c' is in several shards: 1, copy"


@pytest.mark.parametrize(
    ("tensor", "value", "match"),
    [
        ("params", torch.zeros(5, 9), r"tensor 'params': expected shape \(5, 10\), got \(5, 9\)"),
        ("step", None, r"tensor 'step': expected shape \(5,\), got None"),
        ("odd", torch.zeros(1), r"tensor 'odd': expected shape None, got \(1,\)"),
        ("offsets", torch.tensor([0, 2, 5]), r"tensor 'offsets': expected shape \(2,\), got \(3,\)"),
        ("offsets", torch.tensor([1, 5]), "must rise from 0"),
    ],
)
def test_a_wrong_structure_is_named(zoo, tensor, value, match):
    path = zoo.path / "shards" / "1.safetensors"
    file = files.TensorFile(path, "weightspace-zoo-shard")
    tensors = file.load()
    tensors.pop(tensor, None)
    if value is not None:
        tensors[tensor] = value
    files.write_tensors(path, "weightspace-zoo-shard", tensors, file.metadata)
    (problem,) = verify_zoo(zoo.path).problems
    assert re.match(rf"shard '1': .*{match}", problem)


@pytest.fixture
def mixed(tmp_path, layout, make_run):
    """A zoo with two layouts and a shard of differences; small, so that every byte can be damaged."""
    zoo = Zoo.create(tmp_path / "mixed", layout=layout, attributes={"é": 1e-7})
    zoo.append([make_run("a", 3), make_run("b", 1), make_run("c", 2)], name="plain")
    other = zoo.with_layout(ParameterLayout.from_state_dict({"wé": torch.zeros(3)}))
    other.append([Run("t", torch.randn(2, 3), [0, 1])], name="tiny")
    delta = Zoo.create(tmp_path / "delta", layout=layout, dtype="delta10")
    delta.append([make_run("d", 17), make_run("e", 2)], name="delta")
    shutil.copy(delta.path / "shards" / "delta.safetensors", zoo.path / "shards")
    assert verify_zoo(zoo.path).problems == ()
    return zoo


def place_of(path, position, runs):
    """Words that must be in the report on a damaged byte: the file, the tensor and the run in which it stands."""
    if path.suffix == ".json":
        return [str(path)]
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    if position < start:
        return [path.name]
    header = json.loads(content[8:start])
    del header["__metadata__"]
    inside = {n: r for n, r in header.items() if r["data_offsets"][0] <= position - start < r["data_offsets"][1]}
    ((name, row),) = inside.items()
    if name == "offsets":
        return [path.name, "'offsets'"]
    at = (position - start - row["data_offsets"][0]) * row["shape"][0] // np.diff(row["data_offsets"])[0]
    if name == "params/groups":
        return [path.stem, repr(name), *map(repr, runs)]
    if name == "checksums":
        return [path.stem, repr(name), repr(list(runs)[at])]
    lengths = [-(-n // 16) if name == "params/keys" else n for n in runs.values()]
    return [path.stem, repr(name), repr(list(runs)[np.searchsorted(np.cumsum(lengths), at, side="right")])]


RUNS = {"plain": {"a": 3, "b": 1, "c": 2}, "delta": {"d": 17, "e": 2}, "tiny": {"t": 2}}


def check_flipped(zoo, path, position, bit):
    expected = place_of(path, position, RUNS.get(path.stem))
    with path.open("rb+", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, position)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), position)
        problems = verify_zoo(zoo.path).problems
        os.pwrite(file.fileno(), bytes([byte]), position)
    found = any(all(word in problem for word in expected) for problem in problems)
    assert found, f"{path.name}, bit {bit} of byte {position}: {expected} not in {problems}"
    others = [run for runs in RUNS.values() for run in runs if repr(run) not in expected]
    if any(word.startswith(("'params", "'metrics")) for word in expected):
        assert not any(f"run {run!r}" in problem for run in others for problem in problems)


def zoo_files(zoo):
    return sorted(path for path in zoo.path.rglob("*") if path.is_file())


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_is_located(mixed, seed):
    rng = np.random.default_rng(seed)
    for path in zoo_files(mixed):
        for position in rng.integers(path.stat().st_size, size=6):
            check_flipped(mixed, path, int(position), int(rng.integers(8)))


@pytest.mark.reliability
def test_a_flipped_bit_in_any_byte_is_located(mixed):
    rng = np.random.default_rng(0)
    for path in zoo_files(mixed):
        for position in range(path.stat().st_size):
            check_flipped(mixed, path, position, int(rng.integers(8)))
    assert verify_zoo(mixed.path).problems == ()


@pytest.mark.parametrize("keep", [0, 7, 100, -8, -1])
def test_a_cut_or_grown_shard_is_named(zoo, keep):
    path = zoo.path / "shards" / "1.safetensors"
    content = path.read_bytes()
    for damaged in (content[:keep], content + b"x"):
        path.write_bytes(damaged)
        (problem,) = verify_zoo(zoo.path).problems
        assert "1.safetensors is truncated or damaged" in problem


def test_shards_of_before_sums_per_run_open_and_name_all_runs(zoo):
    path = zoo.path / "shards" / "0.safetensors"
    file = files.TensorFile(path, "weightspace-zoo-shard")
    tensors, metadata = file.load(), dict(file.metadata)
    del tensors["checksums"], metadata["storage"], metadata["rounding"]
    files.write_tensors(path, "weightspace-zoo-shard", tensors, metadata)
    opened = Zoo.open(zoo.path)
    assert opened.params["a"].shape == (3, 10) and opened.rounding() is None
    assert verify_zoo(zoo.path).problems == ()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
    (problem,) = verify_zoo(zoo.path).problems
    assert problem.endswith("is damaged: wrong SHA-256, in runs 'a', 'b'")


def test_repair_moves_unreadable_shards_aside_and_the_zoo_opens(zoo):
    path = zoo.path / "shards" / "1.safetensors"
    truncate(path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=rf"1\.safetensors is truncated.*`zoo verify --repair {zoo.path}`"):
        Zoo.open(zoo.path)
    report = zoo.verify(repair=True)
    assert report.problems == () and (report.shards, report.runs) == (2, 3)
    (line,) = report.quarantined
    assert line.startswith("quarantine/1.safetensors: ") and "truncated" in line
    assert (zoo.path / "quarantine" / "1.safetensors").read_bytes() == content
    assert Zoo.open(zoo.path).run_ids == ("a", "b", "d")
    assert verify_zoo(zoo.path, repair=True).quarantined == ()
    path.write_bytes(b"again")
    zoo.verify(repair=True)
    assert len(os.listdir(zoo.path / "quarantine")) == 2, "nothing is overwritten"


def test_repair_moves_doubles_aside_but_no_run_that_is_nowhere_else(zoo, make_run):
    shards = zoo.path / "shards"
    shutil.copy(shards / "1.safetensors", shards / "copy.safetensors")
    assert verify_zoo(zoo.path, repair=True).quarantined == ("quarantine/copy.safetensors: all its runs are in 1",)
    assert len(Zoo.open(zoo.path)) == 4
    other = Zoo.create(zoo.path.parent / "other", layout=zoo.layout)
    other.append([make_run("c", 5), make_run("new")], name="half")
    shutil.copy(other.path / "shards" / "half.safetensors", shards)
    report = verify_zoo(zoo.path, repair=True)
    assert report.quarantined == () and report.problems == ("run 'c' is in several shards: 1, half",)


def test_repair_keeps_what_opens(zoo):
    path = zoo.path / "shards" / "1.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
    report = verify_zoo(zoo.path, repair=True)
    assert len(report.problems) == 1 and report.quarantined == () and path.exists()


def test_repair_removes_only_old_temporary_files(zoo):
    names = [zoo.path / "shards" / LEFT, zoo.path / "layouts" / LEFT, zoo.path / "shards" / ".tmpJiuPYz"]
    kept = [zoo.path / ".notes-of-mine", zoo.path / "shards" / ".gitkeep"]
    for path in [*names, *kept]:
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 7200,) * 2)
    young = zoo.path / "shards" / f".{'2e' * 16}-3.safetensors"
    young.write_bytes(b"at work")
    assert verify_zoo(zoo.path).leftovers == 4
    report = verify_zoo(zoo.path, repair=True)
    assert (report.removed, report.leftovers) == (3, 1)
    assert young.exists() and all(path.exists() for path in kept) and not any(path.exists() for path in names)
    assert verify_zoo(zoo.path, repair=True, older_than=0).removed == 1


def test_damaged_descriptions_do_not_hide_damaged_shards(zoo):
    (zoo.path / "zoo.json").write_text("{")
    layout = zoo.path / "layouts" / f"{zoo.layout.id}.json"
    layout.write_text(layout.read_text() + " ")
    path = zoo.path / "shards" / "1.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
    problems = verify_zoo(zoo.path).problems
    assert "zoo.json is damaged" in problems[0] and f"{zoo.layout.id}.json is damaged" in problems[1]
    assert any(re.match("shard '1': tensor .* is damaged.*, in run 'c'", problem) for problem in problems)
