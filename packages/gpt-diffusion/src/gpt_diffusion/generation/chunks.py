"""Filling a zoo chunk by chunk.

A chunk is trained whole, judged, and written as one shard whose name says which runs of which seed it covers. A
generation that was killed, or shall become longer, leaves out what is covered and trains the rest; chunks are never
changed. Generations with different seeds can fill one zoo at the same time.
"""

import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

from tqdm import tqdm
from zoo_common.zoo import Run, Zoo

from gpt_diffusion.generation.work import Work, data_name, run_id

Tick = Callable[[int], object]
Chunks = Generator[tuple[range, list[Run]], None, None]
Runner = Callable[[Work, Iterable[range], Tick], Chunks]
"""Trains chunks, wherever, and yields each with its finite runs when it is done. Closing it ends the unfinished ones."""

_SHARD = re.compile(r"runs-s(-?\d+)-(\d+)-(\d+)")


@dataclass(frozen=True)
class Generated:
    """What a generation did."""

    runs: int
    """Finite runs that the zoo holds now."""
    dropped: int
    """Runs of this seed left out because a weight or a metric was not finite."""
    remaining: int
    """Runs not trained yet; 0 of a generation without end."""
    model_steps: int
    """Optimizer steps of the chunks finished now, all runs together."""
    seconds: float
    strategy: str
    stopped: str | None
    """None, ``interrupted`` or ``time limit``; the same command then carries on."""


class TimeUpError(Exception):
    """The time limit has been reached."""


def shard_name(seed: int, runs: range) -> str:
    """Name of the shard that covers these runs."""
    return f"runs-s{seed}-{runs[0]:07d}-{runs[-1]:07d}"


def covered(zoo: Zoo, seed: int) -> list[range]:
    """The runs of a seed that the shards of a zoo cover, in order."""
    found = [match.groups() for name in zoo.shards if (match := _SHARD.fullmatch(name))]
    return sorted((range(int(a), int(b) + 1) for s, a, b in found if int(s) == seed), key=lambda runs: runs.start)


def missing(there: Iterable[range], runs: int | None, size: int, group: int = 1) -> Iterator[range]:
    """Chunks of the runs that are not covered, up to ``runs`` of them (None: without end).

    Chunks end at multiples of ``size``; one that begins within a group of runs with a common data order ends with it.
    """
    at = 0
    for part in there:
        yield from _cut(at, part.start if runs is None else min(part.start, runs), size, group)
        at = part.stop
    yield from _cut(at, runs, size, group)


def _cut(at: int, end: int | None, size: int, group: int) -> Iterator[range]:
    while end is None or at < end:
        unit = group if at % group else size
        stop = at + unit - at % unit
        stop = stop if end is None else min(stop, end)
        yield range(at, stop)
        at = stop


def one_after_the_other(work: Work, chunks: Iterable[range], tick: Tick) -> Chunks:
    """Train chunks in this process."""
    for runs in chunks:
        yield runs, work.train(runs, tick)


def fill(
    zoo: Zoo, work: Work, runs: int | None, *, runner: Runner, limit: float | None = None, progress: bool = True
) -> Generated:
    """Train what is missing of a number of runs and append it to the zoo.

    Args:
        zoo: Made with the options of the work.
        work: What to train.
        runs: How many runs of this seed the zoo shall have; None: go on until stopped.
        runner: How chunks are trained.
        limit: Seconds after which unfinished chunks are given up.
        progress: Show a bar on stderr.
    """
    o, start = work.options, time.monotonic()
    there = covered(zoo, work.seed)
    finished = sum(map(len, there))
    todo = None if runs is None else sum(map(len, missing(there, runs, o.chunk, o.share_batches)))
    trained, stopped = 0, None
    with tqdm(
        total=None if todo is None else (finished + todo) * o.steps,
        initial=finished * o.steps,
        desc=f"{data_name(work.task)} ({o.strategy})",
        unit="step",
        unit_scale=True,
        disable=not progress,
    ) as bar:

        def tick(steps: int) -> None:
            bar.update(steps)
            if limit is not None and time.monotonic() - start > limit:
                raise TimeUpError

        try:
            with closing(runner(work, missing(there, runs, o.chunk, o.share_batches), tick)) as done:
                for part, good in done:
                    if good:
                        zoo.append(good, name=shard_name(work.seed, part))
                    trained += len(part)
        except TimeUpError:
            stopped = "time limit"
        except KeyboardInterrupt:
            stopped = "interrupted"
    zoo.refresh()
    kept = sum(i.startswith(run_id(work.task, work.seed, 0)[:-7]) for i in zoo.run_ids)
    remaining = 0 if todo is None else todo - trained
    seconds = time.monotonic() - start
    return Generated(len(zoo), finished + trained - kept, remaining, trained * o.steps, seconds, o.strategy, stopped)
