import json

import pytest
from support.reliability import truncate
from zoo_common import Zoo
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
        == f"zoo: there is no zoo in {tmp_path} (no zoo.json): check the path, or make one there first\n"
    )
