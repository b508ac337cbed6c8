"""Killing, resuming and damaging real commands and files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

Command = Sequence[str | os.PathLike[str]]


def _environment() -> dict[str, str]:
    """One thread, so that numbers are bitwise the same in every run."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def run(command: Command, *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        interpreted(command), cwd=cwd, env=_environment(), capture_output=True, text=True, check=False
    )


def run_killed(command: Command, *, watch: Path, seed: int, kills: int, cwd: Path | None = None) -> int:
    """Run a command again and again, ending it with ``kill -9`` at random moments of its work, and then to its end.

    Each moment is a random number of changes in a folder, then up to 30 ms more, so kills hit the writing of files and
    the work between, however slow the machine is. The whole process group dies.

    Args:
        command: What to run; it must go on where it was killed when started again.
        watch: Folder in which the command writes.
        seed: Decides the moments.
        kills: How often to kill at most.
        cwd: Working folder.

    Returns:
        How often it was killed before it ended by itself; a test should check that this is not 0.
    """
    rng = np.random.default_rng(seed)
    done = 0
    for _ in range(kills):
        changes, delay = int(rng.integers(1, 8)), rng.uniform(0, 0.03)
        ended = run_signalled(command, signal.SIGKILL, watch=watch, changes=changes, delay=delay, cwd=cwd)
        if ended.returncode == 0:
            return done
        assert ended.returncode == -signal.SIGKILL, f"{command} failed by itself:\n{ended.stderr}"
        done += 1
    finished = run(command, cwd=cwd)
    assert finished.returncode == 0, f"{command} did not resume:\n{finished.stderr}"
    return done


def run_signalled(
    command: Command, number: int, *, watch: Path, changes: int, delay: float = 0.0, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command and send its process group a signal after some changes in a folder and a delay in seconds."""
    process = subprocess.Popen(
        interpreted(command),
        cwd=cwd,
        env=_environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for_changes(process, watch, changes)
    time.sleep(delay)
    if process.poll() is None:
        os.killpg(process.pid, number)
    _, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, "", errors)


def interpreted(command: Command) -> list[str]:
    """The words of a command; a ``.py`` file runs in this interpreter."""
    words = [os.fspath(word) for word in command]
    return [sys.executable, *words] if words[0].endswith(".py") else words


def _wait_for_changes(process: subprocess.Popen[str], folder: Path, changes: int) -> None:
    before = _snapshot(folder)
    while changes and process.poll() is None:
        time.sleep(0.0005)
        now = _snapshot(folder)
        changes -= now != before
        before = now


def _snapshot(folder: Path) -> frozenset[tuple[str, int, int]]:
    found = set()
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.stat(os.path.join(root, name))
            except FileNotFoundError:
                continue
            found.add((name, status.st_size, status.st_mtime_ns))
    return frozenset(found)


def assert_same_files(actual: Path, expected: Path, *, except_for: Collection[str] = ()) -> None:
    """Two folders hold the same files: the same tensors and metadata, bit by bit, and otherwise the same bytes.

    What killed writers leave behind (names that start with a dot) does not count, nor do the ``seconds`` in the lines
    of logs (``.jsonl``), nor the files with the names ``except_for``.
    """
    names = [name for name in _files(expected) if Path(name).name not in except_for]
    assert [name for name in _files(actual) if Path(name).name not in except_for] == names
    assert names, f"{expected} holds no files to compare"
    for name in names:
        if name.endswith(".safetensors"):
            assert_same_tensors(actual / name, expected / name)
        elif name.endswith(".jsonl"):
            assert _log(actual / name) == _log(expected / name), name
        else:
            assert (actual / name).read_bytes() == (expected / name).read_bytes(), name


def assert_same_tensors(actual: Path, expected: Path) -> None:
    """Two safetensors files hold the same tensors and metadata, bit by bit."""
    with safe_open(actual, "pt") as a, safe_open(expected, "pt") as b:
        assert a.metadata() == b.metadata(), f"{actual}: metadata"
        assert sorted(a.keys()) == sorted(b.keys()), f"{actual}: names"
        for name in b.keys():  # noqa: SIM118
            x, y = a.get_tensor(name), b.get_tensor(name)
            assert (x.dtype, x.shape) == (y.dtype, y.shape), f"{actual}: {name}"
            same = torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
            assert same, f"{actual}: {name}"


def _log(path: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def _files(folder: Path) -> list[str]:
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path) for path in paths if not any(part.startswith(".") for part in path.parts))


def truncate(path: Path, keep: float = 0.5) -> None:
    """Cut a file to a fraction of its length."""
    os.truncate(path, int(path.stat().st_size * keep))


def flip_bit(path: Path, seed: int = 0) -> None:
    """Flip one random bit of a file."""
    content = bytearray(path.read_bytes())
    position = int(np.random.default_rng(seed).integers(8 * len(content)))
    content[position // 8] ^= 1 << (position % 8)
    path.write_bytes(content)


def flip_every_bit(path: Path) -> Iterator[int]:
    """Flip the bits of a file one after the other; each is flipped back before the next."""
    with path.open("rb+", buffering=0) as file:
        for position in range(8 * path.stat().st_size):
            byte = os.pread(file.fileno(), 1, position // 8)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << position % 8]), position // 8)
            yield position
            os.pwrite(file.fileno(), byte, position // 8)


def assert_one_error_line(result: subprocess.CompletedProcess[str], *parts: str, status: int = 1) -> None:
    """A command ended with this status and one line on stderr (progress bars aside) that holds all these parts."""
    lines = [line for line in re.split(r"[\r\n]+", result.stderr) if line.strip() and not re.search(r"\d%\|", line)]
    assert result.returncode == status, f"status {result.returncode}:\n{result.stderr}"
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0], f"{part!r} is not in: {lines[0]}"
