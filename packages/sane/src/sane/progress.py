"""Progress bars of loops that may take long: the command line shows them, the library is silent."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

_DELAY = 1.0
"""Seconds before a bar appears."""
_shown: ContextVar[bool] = ContextVar("shown", default=False)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Show the bars of :func:`track` in this context, or not."""
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


def track(items: Iterable[T], what: str) -> Iterator[T]:
    """The items, with a bar if bars are shown and there are several; loops within them have none of their own."""
    items = list(items)
    if not _shown.get() or len(items) < 2:
        yield from items
        return
    with tqdm(items, desc=what, leave=False, delay=_DELAY) as bar, progress_bars(False):
        yield from bar
