import json
import re

import pytest
import torch
from support.reliability import truncate
from zoo_common import ParameterLayout, Zoo
from zoo_common.cli import main


def test_inspect_tells_what_a_zoo_holds(zoo, capsys):
    assert main(["inspect", str(zoo.path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["task"] == "digits_loss" and summary["layout"] == zoo.layout.id
    assert (summary["runs"], summary["checkpoints"], summary["shards"]) == (4, 12, 3)
    assert summary["parameters"] == 10 and summary["metrics"]["error"] == [0, 4]
    assert sum(summary["splits"].values()) == 4
    assert main(["inspect", str(zoo.path)]) == 0
    assert "digits_loss" in capsys.readouterr().out


def test_verify_answers_by_its_status(zoo, capsys):
    assert main(["verify", str(zoo.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    truncate(zoo.path / "shards" / "1.safetensors")
    assert main(["verify", str(zoo.path), "--json"]) == 1
    captured = capsys.readouterr()
    assert "1.safetensors is truncated" in json.loads(captured.out)["problems"][0]
    assert len(captured.err.splitlines()) == 1 and "1 problem" in captured.err


@pytest.mark.parametrize("times", [1, 2])
def test_merge_brings_zoos_together(zoo, tmp_path, capsys, times):
    assert main(["merge", str(tmp_path / "all"), *[str(zoo.path)] * times, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"added": 3, "present": 3 * times - 3, "runs": 4}
    assert Zoo.open(tmp_path / "all").run_ids == zoo.run_ids


def test_merge_without_a_source_is_a_wrong_use(tmp_path, capsys):
    assert main(["merge", str(tmp_path / "all")]) == 2
    assert "Required" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_folder_without_a_zoo_is_one_line(tmp_path, capsys, command):
    assert main([command, str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err
        == f"zoo: there is no zoo in {tmp_path} (no zoo.json): check the path, or make one there first; "
        "`zoo convert` makes one of published runs\n"
    )


def test_repair_tells_what_it_did(zoo, capsys):
    truncate(zoo.path / "shards" / "1.safetensors")
    (zoo.path / "shards" / f".{'0' * 32}-x.safetensors").write_bytes(b"half")
    assert main(["verify", str(zoo.path), "--repair", "--older-than", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["removed"], report["leftovers"], report["problems"]) == (1, 0, [])
    assert len(report["quarantined"]) == 1 and "truncated" in report["quarantined"][0]
    assert main(["inspect", str(zoo.path)]) == 0


def test_empty_zoos_are_no_problem(tmp_path, layout, capsys):
    Zoo.create(tmp_path / "empty", layout=layout)
    for words in (["inspect"], ["verify"], ["verify", "--repair"], ["merge", str(tmp_path / "all")]):
        assert main([*words, str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().err == "" and len(Zoo.open(tmp_path / "all")) == 0


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ("missing", "there is no zoo in .*missing.*check the path"),
        ("file.txt", "there is no zoo in .*file.txt"),
        ("other-layout", "cannot merge .*other-layout with .*zoo: layout .* is not .*; keep them apart"),
        ("double", "run 'a' is in .*double.* and in .*with other content: remove one of the shards"),
    ],
)
def test_what_cannot_be_merged_is_one_line_and_nothing_is_lost(zoo, tmp_path, make_run, capsys, other, match):
    (tmp_path / "file.txt").write_text("no zoo")
    options = {"task": "digits_loss", "attributes": {}}
    Zoo.create(tmp_path / "other-layout", layout=ParameterLayout.from_state_dict({"w": torch.zeros(2)}), **options)
    Zoo.create(tmp_path / "double", layout=zoo.layout, **options).append([make_run("a", 2)])
    before = {path: path.read_bytes() for path in zoo.path.rglob("*") if path.is_file()}
    assert main(["merge", str(zoo.path), str(tmp_path / other)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(match, line)
    assert before == {path: path.read_bytes() for path in zoo.path.rglob("*") if path.is_file()}
