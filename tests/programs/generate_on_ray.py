"""A zoo made by two workers of a local Ray cluster, of which one is killed in the middle; argument: folder."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

os.environ |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import ray
from gpt_diffusion import generate
from zoo_common import get_task

folder, driver = Path(sys.argv[1]), os.getpid()
killed = folder.with_suffix(".killed")
task = get_task("digits")
calls = 0


def constructor():
    """The network; after the first finished chunk, the first worker that makes the third one of a chunk dies."""
    global calls
    calls += 1
    middle = calls == 3 and any(folder.glob("shards/*.safetensors"))
    if middle and os.getpid() != driver and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return task.constructor()


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
dying = replace(task, constructor=constructor)
options = {"steps": 30, "save_count": 5, "strategy": "stacked", "split": (0.7, 0.15, 0.15), "device": "cpu"}
report = generate(dying, folder, runs=24, chunk=4, ray=True, progress=False, **options)
assert killed.exists()
assert (report.runs, report.remaining, report.stopped) == (24, 0, None), report
