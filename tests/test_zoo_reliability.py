"""Zoos that are written to by many processes, killed, damaged, on full disks and in folders that cannot be written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.reliability import assert_one_error_line, run, truncate
from zoo_common import ParameterLayout, Run, Zoo
from zoo_common.files import leftover_files
from zoo_common.merge import merge_zoos
from zoo_common.verify import verify_zoo

PROGRAMS = Path(__file__).parent / "programs"
LAYOUT = ParameterLayout.from_state_dict({"w": torch.zeros(50, 50), "b": torch.zeros(50)})


def vectors(run_id):
    """What ``zoo_workers.py`` stores as this run."""
    return torch.randn(20, LAYOUT.size, generator=torch.Generator().manual_seed(sum(run_id.encode())))


class Workers:
    """Starts and kills the workers of ``zoo_workers.py``."""

    def __init__(self):
        command = [sys.executable, os.fspath(PROGRAMS / "zoo_workers.py")]
        pipe = subprocess.PIPE
        self.factory = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        self.living, self.done = set(), []

    def start(self, *words):
        """Fork a worker."""
        self.factory.stdin.write(" ".join(map(str, words)) + "\n")
        self.factory.stdin.flush()
        pid = int(self._wait_for("started"))
        self.living.add(pid)
        return pid

    def kill(self, pid):
        """``kill -9``; false if the worker ended before."""
        self.living.remove(pid)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def wait_for_one(self):
        """Until a worker says that something is done."""
        self.done.append(self._wait_for("done"))

    def close(self):
        """Kill all; ``done`` is complete then."""
        for pid in list(self.living):
            self.kill(pid)
        self.factory.stdin.close()
        self.done += [line.split()[1] for line in self.factory.stdout if line.startswith("done")]
        self.factory.wait()

    def _wait_for(self, what):
        for line in self.factory.stdout:
            word, value = line.split()
            if word == what:
                return value
            self.done.append(value)
        raise AssertionError("the workers ended by themselves")


@pytest.fixture
def workers():
    workers = Workers()
    yield workers
    if workers.factory.poll() is None:
        os.killpg(workers.factory.pid, signal.SIGKILL)
        workers.factory.wait()
    workers.factory.stdin.close()
    workers.factory.stdout.close()


def wait_for_files(zoo, count):
    """Until a zoo that is being written is there, with so many files of its runs."""
    while not zoo.exists() or len(list((zoo / "shards").glob("[!.]*"))) < count:
        time.sleep(0.0002)


def few_or_many(few, many):
    """A short form of a test for every day, a long one for the reliability tier."""
    return pytest.mark.parametrize("kills", [few, pytest.param(many, marks=pytest.mark.reliability)])


@few_or_many(5, 50)
def test_eight_writers_killed_at_random_moments_lose_no_finished_run(tmp_path, workers, kills):
    zoo = Zoo.create(tmp_path / "zoo", layout=LAYOUT)
    rng = np.random.default_rng(kills)
    for writer in range(8):
        workers.start("append", zoo.path, f"w{writer}")
    workers.wait_for_one()
    leftovers = 0
    for killed in range(kills):
        time.sleep(rng.uniform(0, 0.05))
        victim = sorted(workers.living)[rng.integers(8)]
        assert workers.kill(victim)
        opened = Zoo.open(zoo.path)
        assert set(opened.run_ids) >= set(workers.done)
        leftovers = max(leftovers, len(leftover_files(zoo.path / "shards")))
        if killed % 10 == 0:
            report = opened.verify(repair=True)  # may not touch the files of the seven others
            assert report.problems == () and report.quarantined == () and report.removed == 0
        workers.start("append", zoo.path, f"again{killed}")
    workers.close()
    opened = Zoo.open(zoo.path)
    assert leftovers > 0, "no writer was killed while it wrote"
    assert len(workers.done) > 8 and set(opened.run_ids) >= set(workers.done)
    for run_id in opened.run_ids:
        assert torch.equal(opened.params[run_id], vectors(run_id))
    result = run(["zoo", "verify", zoo.path, "--repair", "--older-than", "0", "--json"])
    report = json.loads(result.stdout)
    assert result.returncode == 0 and report["removed"] > 0 and report["leftovers"] == 0
    assert not [name for name in os.listdir(zoo.path / "shards") if name.startswith(".")]
    assert Zoo.open(zoo.path).run_ids == opened.run_ids


@few_or_many(4, 50)
@pytest.mark.parametrize("kind", ["merge", "copy"])
def test_a_merge_killed_at_a_random_moment_is_run_again(tmp_path, workers, kind, kills):
    sources = [tmp_path / "one", tmp_path / "two"]
    for source in sources:
        zoo = Zoo.create(source, layout=LAYOUT)
        for i in range(15):
            zoo.append([Run(f"{source.name}-{i}", vectors(f"{source.name}-{i}"), range(20))], name=f"{i}")
    before = {path: path.stat().st_mtime_ns for source in sources for path in source.rglob("*")}
    rng, partial = np.random.default_rng(kills), 0
    for i in range(10 * kills):  # more of them only if a busy machine lets merges end before they are killed
        if i >= kills and partial:
            break
        target = tmp_path / f"merged-{i}"
        pid = workers.start(kind, target, *sources)
        wait_for_files(target, rng.integers(20))
        time.sleep(rng.uniform(0, 0.005))
        workers.kill(pid)
        if (target / "zoo.json").exists():
            report = verify_zoo(target)
            assert report.problems == () and len(Zoo.open(target)) == report.runs
            partial += report.runs < 30
        assert merge_zoos(target, sources).runs == 30
        report = verify_zoo(target, repair=True, older_than=0)
        assert report.problems == () and report.leftovers == 0 and report.runs == 30
        shutil.rmtree(target)
    assert partial > 0, "no merge was killed in its middle"
    assert before == {path: path.stat().st_mtime_ns for source in sources for path in source.rglob("*")}
    assert all(verify_zoo(source).problems == () for source in sources)


@pytest.fixture
def source(tmp_path):
    """A zoo that is too large for the small disk."""
    zoo = Zoo.create(
        tmp_path / "source", layout=ParameterLayout.from_state_dict({"w": torch.zeros(1000)}), dtype="float16"
    )
    zoo.append([Run("big", torch.ones(400, 1000), range(400))], name="big")
    return zoo.path


def test_a_full_or_read_only_disk_is_one_line_and_loses_nothing(tmp_path, source):
    disk = tmp_path / "disk"
    disk.mkdir()
    alone = ["unshare", "--map-root-user", "--mount"]
    possible = shutil.which("unshare") and run([*alone, "true"]).returncode == 0
    result = run([*(alone if possible else []), sys.executable, PROGRAMS / "full_disk.py", disk, source])
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    problem = "No space left on device" if told["small"] else "File too large"
    assert problem in told["append"] and "large.safetensors" in told["append"]
    for merge in ("merge", "merge into a new zoo"):
        assert told[merge]["status"] == 1, told
        (line,) = told[merge]["lines"]
        assert line.startswith(f"zoo: {problem}: {disk}") and line.endswith("big.safetensors")
    assert told["full"] == {"runs": ["first"], "problems": [], "leftovers": 0}
    assert told["later"] == [None, {"runs": ["first", "second"], "problems": [], "leftovers": 0}]
    if "read-only" in told:
        error, merge, after = told["read-only"]
        assert "Read-only file system" in error and after == told["later"][1]
        assert merge["status"] == 1 and "Read-only file system" in merge["lines"][0] and len(merge["lines"]) == 1
        assert told["read-only commands"] == [{"status": 0, "lines": []}] * 2


def test_a_folder_without_write_permission_is_one_line_and_readable(tmp_path, source):
    zoo = Zoo.create(tmp_path / "locked", layout=ParameterLayout.from_state_dict({"w": torch.zeros(1000)}))
    zoo.append([Run("first", torch.ones(2, 1000), range(2))], name="first")
    left = zoo.path / "shards" / f".{'0' * 32}-x.safetensors"
    left.write_bytes(b"half")
    (zoo.path / "shards").chmod(0o555)
    restricted = [PROGRAMS / "restricted.py", "-", "zoo"]
    denied = ["Permission denied", os.fspath(zoo.path / "shards")]
    assert_one_error_line(run([*restricted, "merge", zoo.path, source]), *denied, "big.safetensors")
    assert_one_error_line(run([*restricted, "verify", zoo.path, "--repair", "--older-than", "0"]), *denied)
    (zoo.path / "shards").chmod(0o755)
    assert left.exists() and Zoo.open(zoo.path).run_ids == ("first",)
    assert run([*restricted, "merge", zoo.path, source]).returncode == 0
    assert Zoo.open(zoo.path).run_ids == ("big", "first")


def test_a_damaged_zoo_is_repaired_by_the_command_its_error_names(tmp_path):
    zoo = Zoo.create(tmp_path / "zoo", layout=LAYOUT)
    for name in ("a", "b"):
        zoo.append([Run(name, vectors(name), range(20))], name=name)
    truncate(zoo.path / "shards" / "a.safetensors")
    for command in ("inspect", "verify"):
        assert_one_error_line(run(["zoo", command, zoo.path]), "a.safetensors is truncated", "--repair")
    repaired = run(["zoo", "verify", zoo.path, "--repair"])
    assert repaired.returncode == 0 and "quarantine/a.safetensors" in repaired.stdout
    assert run(["zoo", "inspect", zoo.path]).returncode == 0
    assert Zoo.open(zoo.path).run_ids == ("b",)
