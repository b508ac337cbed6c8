import re
import shutil

import pytest
import torch
from safetensors import safe_open
from support.reliability import truncate
from zoo_common import files
from zoo_common.verify import verify_zoo


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
    (zoo.path / "shards" / f".{'1f' * 16}-2.safetensors").write_bytes(b"left by a killed writer")
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
