"""Commands that are killed at any moment and resumed end with the files of an uninterrupted run."""

import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import pytest
import torch
from support.reliability import (
    assert_one_error_line,
    assert_same_files,
    interpreted,
    run,
    run_killed,
    run_signalled,
    truncate,
)
from zoo_common import ParameterLayout, Run, Zoo

PROGRAMS = Path(__file__).parent / "programs"

RECORD, TRAIN, TRAIN_ADAMW = (
    "record_zoo.py {folder}",
    "train_resumably.py {folder}",
    "train_resumably.py {folder} adamw",
)
GENERATE = (
    "gpt-diffusion generate digits {folder} --runs 24 --chunk 1 --steps 30 --save-count 5 --strategy stacked "
    "--split 0.7 0.15 0.15 --device cpu"
)
ACTORS = "gpt-diffusion generate cartpole {folder} --runs 8 --chunk 1 --steps 4 --envs 16 --save-count 3 --device cpu"
CONVERT = (
    "convert_in_small_shards.py {zoo} {folder} --dtype bfloat16",
    "convert_in_small_shards.py {gpt} {folder}",
    "zoo convert {zoo} {folder} --to gpt",
    "zoo convert {zoo} {folder} --to trials",
)
DENOISE = "train_denoiser.py {folder} {zoo}"
META_TRAIN = "train_ghn.py {folder}"
CNN_ZOO = "train_sane_zoo.py {folder}"
PRETRAIN = "pretrain_sane.py {folder} {prepared}"
STATE = (
    "state.safetensors",  # holds Python's global random state, which the command does not use
    "lock.mdb",  # of the process that wrote
)


class Workshop:
    """Runs programs, each of them once without any trouble."""

    def __init__(self, new_folder):
        self.new_folder, self.made = new_folder, {}

    def command(self, program, folder):
        """The words of a program that writes to a folder."""
        paths = {"folder": folder}
        if "{zoo}" in program:
            paths["zoo"] = self.whole(GENERATE)
        if "{gpt}" in program:
            paths["gpt"] = self.whole(CONVERT[2])
        if "{prepared}" in program:
            paths["prepared"] = self.prepared
        first, *rest = program.split()
        return [PROGRAMS / first if first.endswith(".py") else first, *(word.format(**paths) for word in rest)]

    def whole(self, program):
        """Folder of a program's output when nothing goes wrong."""
        if program not in self.made:
            self.made[program] = self.new_folder()
            result = run(self.command(program, self.made[program]))
            assert result.returncode == 0, result.stderr
        return self.made[program]

    @cached_property
    def prepared(self):
        """File of a prepared zoo of small CNNs."""
        out = self.new_folder() / "prepared.safetensors"
        result = run(["sane", "preprocess", self.whole(CNN_ZOO), "-o", out, "--token-size", "40"])
        assert result.returncode == 0, result.stderr
        return out

    def finish(self, program, folder):
        """Run a program to its end; the result must be that of the uninterrupted one."""
        result = run(self.command(program, folder))
        assert result.returncode == 0, result.stderr
        assert_same_files(folder, self.whole(program), except_for=STATE)

    def kill(self, program, folder, seed, kills):
        """Kill a program at random moments, resume and compare."""
        assert run_killed(self.command(program, folder), watch=folder, seed=seed, kills=kills) > 0
        assert_same_files(folder, self.whole(program), except_for=STATE)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(lambda: tmp_path_factory.mktemp("whole"))


def name_of(value):
    return " ".join(word for word in str(value).split() if "{" not in word)


@pytest.mark.parametrize("program", [RECORD, TRAIN, GENERATE, DENOISE, PRETRAIN], ids=name_of)
def test_killed_once_and_resumed_equals_uninterrupted(workshop, tmp_path, program):
    workshop.kill(program, tmp_path, seed=0, kills=1)


@pytest.mark.reliability
@pytest.mark.parametrize(
    "program",
    [RECORD, TRAIN, TRAIN_ADAMW, GENERATE, ACTORS, DENOISE, META_TRAIN, CNN_ZOO, PRETRAIN, *CONVERT],
    ids=name_of,
)
@pytest.mark.parametrize("seed", range(1, 3))
def test_killed_often_and_resumed_equals_uninterrupted(workshop, tmp_path, program, seed):
    workshop.kill(program, tmp_path, seed=seed, kills=6)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (GENERATE, "stopped (interrupted); the same command goes on"),
        (DENOISE, "go on with --resume"),
        (META_TRAIN, "go on with --resume"),
        (PRETRAIN, "go on with --resume"),
    ],
    ids=name_of,
)
def test_ctrl_c_is_one_line_and_what_was_done_is_kept(workshop, tmp_path, program, message):
    stopped = run_signalled(workshop.command(program, tmp_path), signal.SIGINT, watch=tmp_path, changes=8)
    assert_one_error_line(stopped, message, status=130)
    kept = {path: path.read_bytes() for pattern in ("shards/*", "**/*.jsonl") for path in tmp_path.glob(pattern)}
    assert kept
    workshop.finish(program, tmp_path)
    assert all(path.read_bytes().startswith(content) for path, content in kept.items())


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("program", "limit", "name"),
    [
        (GENERATE, 10_000, "runs-s0-0000000-0000000.safetensors"),
        (DENOISE, 60_000, "state.safetensors"),
        (DENOISE, 700, "config"),
        (PRETRAIN, 20_000, "state.safetensors"),
        (CONVERT[3], 3000, "digits-s0-0000000"),
    ],
    ids=["generate", "train", "train, nothing fits", "pretrain", "convert to trials"],
)
def test_a_full_disk_is_one_line_and_leaves_no_half_written_file(workshop, tmp_path, program, limit, name):
    result = run([PROGRAMS / "restricted.py", str(limit), *interpreted(workshop.command(program, tmp_path))])
    assert_one_error_line(result, "File too large", name)
    assert not list(tmp_path.rglob(f"*{name}*"))
    workshop.finish(program, tmp_path)


@pytest.mark.reliability
def test_a_killed_worker_of_a_cluster_changes_nothing(workshop, tmp_path):
    """The zoo is that of one process without Ray, although a worker died while it trained."""
    by_one = GENERATE.replace("--chunk 1", "--chunk 4")
    result = run([PROGRAMS / "generate_on_ray.py", tmp_path / "zoo"])
    assert result.returncode == 0, result.stderr
    assert_same_files(tmp_path / "zoo", workshop.whole(by_one))


@pytest.mark.reliability
def test_a_generation_on_a_cluster_is_interrupted_and_continued(workshop, tmp_path):
    command = workshop.command(f"{GENERATE} --ray", tmp_path)
    stopped = run_signalled(command, signal.SIGINT, watch=tmp_path, changes=8)
    assert_one_error_line(stopped, "stopped (interrupted); the same command goes on", status=130)
    assert list((tmp_path / "shards").glob("*.safetensors"))
    workshop.finish(GENERATE, tmp_path)


@pytest.mark.reliability
def test_several_processes_fill_one_zoo(workshop, tmp_path):
    """Three seeds at the same time, in a folder that does not exist before."""
    words = workshop.command(GENERATE, tmp_path / "zoo")
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(lambda seed: run([*words, "--seed", str(seed)]), range(3)))
    assert [result.returncode for result in results] == [0] * 3, [result.stderr for result in results]
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.verify().problems == ()
    assert sorted(zoo.run_ids) == [f"digits-s{seed}-{run:07d}" for seed in range(3) for run in range(24)]
    alone = Zoo.open(workshop.whole(GENERATE))
    assert all(torch.equal(zoo.params[run_id], alone.params[run_id]) for run_id in alone.run_ids)


@pytest.mark.reliability
def test_a_full_disk_under_lmdb_is_one_line(workshop, tmp_path):
    result = run([PROGRAMS / "restricted.py", "10000", *interpreted(workshop.command(CONVERT[2], tmp_path))])
    assert_one_error_line(result, "cannot write", "/000000")
    assert not list(tmp_path.iterdir())
    workshop.finish(CONVERT[2], tmp_path)


@pytest.mark.reliability
@pytest.mark.parametrize("program", [GENERATE, DENOISE], ids=name_of)
def test_a_folder_that_cannot_be_written_is_one_line(workshop, tmp_path, program):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    result = run([PROGRAMS / "restricted.py", "-", *interpreted(workshop.command(program, folder))])
    assert_one_error_line(result, "locked" if program == GENERATE else "results")
    assert not list(folder.iterdir())


def test_a_damaged_zoo_is_one_clear_line(workshop, tmp_path):
    shutil.copytree(workshop.whole(RECORD), tmp_path / "zoo")
    truncate(tmp_path / "zoo" / "shards" / "run-3.safetensors")
    assert_one_error_line(run(["zoo", "inspect", tmp_path / "zoo"]), "run-3.safetensors is truncated", "restore it")


def big_zoo(path, runs, checkpoints, size):
    """A zoo of ``runs * checkpoints * size`` parameters of a network with two tensors."""
    layout = ParameterLayout.from_state_dict(
        {"weight": torch.empty(size - 1, 1, device="meta"), "bias": torch.empty(1)}
    )
    zoo = Zoo.create(path, layout=layout)
    for i in range(runs):
        params = torch.full((checkpoints, size), float(i))
        params[:, -1] = torch.arange(checkpoints)
        zoo.append([Run(f"{i:06d}", params, range(checkpoints), {"train_ret": range(checkpoints)})])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt", "trials"])
@pytest.mark.parametrize(("runs", "checkpoints"), [(80, 2), (1, 160)], ids=["many runs", "a long run"])
def test_conversion_needs_little_memory_for_any_size(tmp_path, kind, runs, checkpoints):
    big_zoo(tmp_path / "zoo", runs, checkpoints, size=2**20)  # 640 MB
    for source, target, way in (("zoo", "out", kind), ("out", "back", "zoo")):
        result = run([PROGRAMS / "convert_measured.py", tmp_path / source, tmp_path / target, way])
        assert result.returncode == 0, result.stderr
        print(kind, source, target, result.stdout)
        assert float(result.stdout) < 200
    back, zoo = Zoo.open(tmp_path / "back"), Zoo.open(tmp_path / "zoo")
    assert back.run_ids == zoo.run_ids
    assert all(torch.equal(back.params[run_id], zoo.params[run_id]) for run_id in zoo.run_ids)
