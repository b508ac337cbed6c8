"""Timing for the benchmarks of this folder."""

import time
from collections.abc import Callable


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Least CPU time of some calls."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)
