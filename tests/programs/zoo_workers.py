"""Fork a worker for every line of stdin, so that many can be started, and killed, within a second.

``append ZOO NAME`` appends runs ``NAME-0``, ``NAME-1``, ... until it is killed and says ``done ID`` after each;
``merge TARGET SOURCE...`` is ``zoo merge``, ``copy TARGET SOURCE...`` the same where hard links are impossible; both
pause before each file, so that a kill finds them at work, and say ``done STATUS``. The parent says ``started PID`` before.
"""

import contextlib
import io
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable

import torch
from zoo_common import Run, Zoo
from zoo_common.cli import main


def vectors(run_id: str, size: int) -> torch.Tensor:
    return torch.randn(20, size, generator=torch.Generator().manual_seed(sum(run_id.encode())))


def say(*words: object) -> None:
    os.write(1, f"{' '.join(map(str, words))}\n".encode())


def pausing(link: Callable[..., None], *, possible: bool) -> Callable[..., None]:
    """``os.link`` on a slow disk, or on one that has no links."""

    def linked(*paths: object) -> None:
        time.sleep(0.005)
        if not possible:
            raise OSError("another device")
        link(*paths)

    return linked


def work(kind: str, folder: str, *rest: str) -> None:
    if kind == "append":
        zoo = Zoo.open(folder)
        for i in itertools.count():
            run_id = f"{rest[0]}-{i}"
            zoo.append([Run(run_id, vectors(run_id, zoo.layout.size), range(20))])
            say("done", run_id)
    os.link = pausing(os.link, possible=kind == "merge")
    with contextlib.redirect_stdout(io.StringIO()):
        status = main(["merge", folder, *rest])
    say("done", status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for line in sys.stdin:
        if child := os.fork():
            say("started", child)
        else:
            work(*line.split())
            os._exit(0)
