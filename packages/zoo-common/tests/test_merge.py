import os

import pytest
import torch
from zoo_common import Run, Zoo
from zoo_common.layout import ParameterLayout
from zoo_common.merge import Merged, merge_zoos


@pytest.fixture
def parts(tmp_path, layout, make_run):
    """Two zoos with a shard of the same name each."""
    zoos = []
    for part, ids in {"one": ("a", "b"), "two": ("c",)}.items():
        zoo = Zoo.create(tmp_path / part, layout=layout, task="digits_loss", attributes={"classes": 10, "part": part})
        zoo.append([make_run(run_id) for run_id in ids], name="0")
        zoos.append(zoo)
    return zoos


def test_merged_zoo_holds_every_run_and_shares_the_disk(parts, tmp_path, make_run):
    merged = merge_zoos(tmp_path / "all", [zoo.path for zoo in parts])
    assert merged == Merged(added=2, present=0, runs=3)
    zoo = Zoo.open(tmp_path / "all")
    assert zoo.attributes == {"classes": 10} and zoo.task == "digits_loss"
    for run_id in ("a", "b", "c"):
        assert torch.equal(zoo.params[run_id], make_run(run_id).params)
    assert zoo.shards["0"].file.path.stat().st_ino == parts[0].shards["0"].file.path.stat().st_ino
    assert not zoo.verify().problems


def test_merging_again_changes_nothing(parts, tmp_path, make_run):
    paths = [zoo.path for zoo in parts]
    merge_zoos(tmp_path / "all", paths)
    before = sorted(os.listdir(tmp_path / "all" / "shards"))
    assert merge_zoos(tmp_path / "all", paths) == Merged(added=0, present=2, runs=3)
    parts[1].append([make_run("d")])
    assert merge_zoos(tmp_path / "all", paths) == Merged(added=1, present=2, runs=4)
    assert set(before) < set(os.listdir(tmp_path / "all" / "shards"))


def test_copies_where_links_are_impossible(parts, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("another device")

    monkeypatch.setattr(os, "link", refuse)
    merge_zoos(tmp_path / "all", [zoo.path for zoo in parts])
    zoo = Zoo.open(tmp_path / "all")
    assert len(zoo) == 3 and not zoo.verify().problems
    assert zoo.shards["0"].file.path.stat().st_ino != parts[0].shards["0"].file.path.stat().st_ino


def test_duplicates_are_refused_before_anything_is_written(parts, tmp_path, make_run):
    parts[1].append([make_run("a", 2)], name="again")
    with pytest.raises(
        ValueError, match=r"run 'a' is in .*again\.safetensors and in .*0\.safetensors with other content"
    ):
        merge_zoos(tmp_path / "all", [zoo.path for zoo in parts])
    assert not (tmp_path / "all").exists()


def test_other_layouts_come_along(parts, tmp_path):
    tiny = ParameterLayout.from_state_dict({"w": torch.zeros(2)})
    parts[1].with_layout(tiny).append([Run("tiny", torch.ones(1, 2), [0])])
    merge_zoos(tmp_path / "all", [zoo.path for zoo in parts])
    assert Zoo.open(tmp_path / "all").with_layout(tiny.id).run_ids == ("tiny",)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"task": "mnist_loss"}, "task mnist_loss is not digits_loss"), ({"split": (1, 0, 0)}, "fractions")],
)
def test_zoos_of_another_kind_are_refused(parts, tmp_path, layout, options, match):
    Zoo.create(tmp_path / "odd", layout=layout, **{"task": "digits_loss", **options})
    with pytest.raises(ValueError, match=match):
        merge_zoos(tmp_path / "all", [parts[0].path, tmp_path / "odd"])
    with pytest.raises(ValueError, match="at least one source"):
        merge_zoos(tmp_path / "all", [])
