"""Trainings that are killed, interrupted or run out of disk; the state is always the last one that was saved."""

import json
import signal
from pathlib import Path

import pytest
import torch
from pilimit import load_metadata, load_net
from support.reliability import assert_one_error_line, interpreted, run, run_killed, run_signalled, truncate
from zoo_common.files import TensorFile

PROGRAMS = Path(__file__).parents[3] / "tests" / "programs"
INFINITE = ("--momentum", "0.5")
BOUNDED = ("--max-atoms", "60", "--momentum", "0.5", "--data-augment")
FINITE = ("--width", "32", "--momentum", "0.5")
KINDS = pytest.mark.parametrize("options", [INFINITE, BOUNDED, FINITE], ids=["infinite", "bounded", "finite"])


def command(folder, options):
    return [PROGRAMS / "train_infinite.py", folder, *options]


def log(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(actual, expected):
    assert log(actual) == log(expected)
    if (expected / "state.safetensors").exists():
        a, b = (
            TensorFile(folder / "state.safetensors", "weightspace-training").load() for folder in (actual, expected)
        )
        names = [name for name in b if "random" not in name]
    else:
        a, b = (load_net(folder / "net").state_dict() for folder in (actual, expected))
        for folder, state in ((actual, a), (expected, b)):
            dense = TensorFile(folder / "net" / "net.safetensors", "pilimit-net").load()
            state |= {name: value for name, value in dense.items() if name.startswith("optimizer")}
        names = list(b)
    assert set(a) == set(b) and len(names) > 3
    for name in names:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of an uninterrupted run."""
    made = {}

    def make(options):
        if options not in made:
            made[options] = tmp_path_factory.mktemp("whole")
            result = run(command(made[options], options))
            assert result.returncode == 0, result.stderr
        return made[options]

    return make


@pytest.mark.reliability
@KINDS
@pytest.mark.parametrize("seed", range(2))
def test_killed_often_and_resumed_equals_uninterrupted(whole, tmp_path, options, seed):
    assert run_killed(command(tmp_path, options), watch=tmp_path, seed=seed, kills=6) > 0
    assert_same_run(tmp_path, whole(options))


@pytest.mark.reliability
def test_every_kill_leaves_a_readable_state(tmp_path):
    """Saves write new atoms only, and none of them is lost by a kill in the middle of the next."""
    steps = []
    for seed in range(8):
        run_signalled(command(tmp_path, INFINITE), signal.SIGKILL, watch=tmp_path, changes=4 + seed, delay=seed / 500)
        if (tmp_path / "net" / "net.safetensors").exists():
            net, step = load_net(tmp_path / "net"), load_metadata(tmp_path / "net")["step"]
            steps.append(step)
            assert [len(layer.atoms) for layer in net.infinite_layers()] == [8 + 8 * step] * 2
    assert steps == sorted(steps) and steps[-1] > steps[0]


@pytest.mark.reliability
@KINDS
def test_ctrl_c_saves_and_is_one_line(whole, tmp_path, options):
    stopped = run_signalled(command(tmp_path, options), signal.SIGINT, watch=tmp_path, changes=6)
    assert_one_error_line(stopped, "interrupted at step", "go on with --resume", status=130)
    result = run(command(tmp_path, options))
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path, whole(options))


@pytest.mark.reliability
@pytest.mark.parametrize("options", [INFINITE, FINITE], ids=["infinite", "finite"])
def test_a_full_disk_is_one_line_and_the_state_before_stays(whole, tmp_path, options):
    limit = "12000" if options == INFINITE else "20000"
    result = run([PROGRAMS / "restricted.py", limit, *interpreted(command(tmp_path, options))])
    assert_one_error_line(result, "File too large")
    result = run(command(tmp_path, options))
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path, whole(options))


@pytest.mark.reliability
def test_a_truncated_state_is_one_line(tmp_path):
    run(command(tmp_path, (*INFINITE, "--limit-seconds", "0")))
    truncate(tmp_path / "net" / "net.safetensors")
    assert_one_error_line(run(command(tmp_path, INFINITE)), "net.safetensors is truncated", "restore it")
