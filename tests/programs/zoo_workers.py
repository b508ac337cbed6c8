"""Fork a worker for every line of stdin, so that many can be started, and killed, within a second.

``append ZOO NAME`` appends runs ``NAME-0``, ``NAME-1``, ... until it is killed and says ``done ID`` after each;
``merge TARGET SOURCE...`` is ``zoo merge``, ``copy TARGET SOURCE...`` the same where hard links are impossible; both say
``done STATUS``. The parent says ``started PID`` before.
"""

import contextlib
import io
import itertools
import os
import signal
import sys

import torch
from zoo_common import Run, Zoo
from zoo_common.cli import main


def vectors(run_id: str, size: int) -> torch.Tensor:
    return torch.randn(20, size, generator=torch.Generator().manual_seed(sum(run_id.encode())))


def say(*words: object) -> None:
    os.write(1, f"{' '.join(map(str, words))}\n".encode())


def refuse(*_: object) -> None:
    raise OSError("another device")


def work(kind: str, folder: str, *rest: str) -> None:
    if kind == "append":
        zoo = Zoo.open(folder)
        for i in itertools.count():
            run_id = f"{rest[0]}-{i}"
            zoo.append([Run(run_id, vectors(run_id, zoo.layout.size), range(20))])
            say("done", run_id)
    if kind == "copy":
        os.link = refuse
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
