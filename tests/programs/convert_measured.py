"""Convert, and print how much private memory that took at its peak beyond what the imports take, in MB.

Usage: convert_measured.py SOURCE TARGET FORMAT
"""

import sys
import threading
from pathlib import Path

from zoo_common.formats import lmdb_runs  # noqa: F401 (an import is no part of the conversion)
from zoo_common.formats.convert import convert


def private() -> float:
    """Memory of this process in MB that is no cached file: the rest can be given back at any moment."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024


def watch() -> None:
    """Follow the peak."""
    while not stop.wait(0.005):
        peak[0] = max(peak[0], private())


stop, start = threading.Event(), private()
peak = [start]
watcher = threading.Thread(target=watch)
watcher.start()
convert(sys.argv[1], sys.argv[2], target_format=sys.argv[3])
stop.set()
watcher.join()
print(f"{peak[0] - start:.0f}")
