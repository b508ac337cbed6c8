"""Fill a small disk with a zoo and go on after making room; print what happened as one JSON object.

Usage: full_disk.py FOLDER SOURCE

Mounts a tmpfs of 300 kB on FOLDER, and at the end makes it read-only, so start it by ``unshare --map-root-user --mount``.
Where this is not possible, a limit on the size of files takes the place of the full disk.
"""

import contextlib
import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from zoo_common import ParameterLayout, Run, Zoo
from zoo_common.cli import main


def command(*words: object) -> dict[str, object]:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main([str(word) for word in words])
    return {"status": status, "lines": errors.getvalue().splitlines()}


def append(zoo: Zoo, run_id: str, checkpoints: int) -> str | None:
    """Append a run; returns the error."""
    try:
        zoo.append([Run(run_id, torch.ones(checkpoints, zoo.layout.size), range(checkpoints))], name=run_id)
    except OSError as error:
        return str(error)
    return None


def mount(*words: object) -> bool:
    return not subprocess.run(["mount", *map(str, words)], stderr=subprocess.DEVNULL, check=False).returncode


def state(folder: Path) -> dict[str, object]:
    report = Zoo.open(folder).verify()
    return {"runs": Zoo.open(folder).run_ids, "problems": report.problems, "leftovers": report.leftovers}


folder, source = Path(sys.argv[1]), sys.argv[2]
small = mount("-t", "tmpfs", "-o", "size=300k", "tmpfs", folder)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
zoo = Zoo.create(folder / "zoo", layout=ParameterLayout.from_state_dict({"w": torch.zeros(1000)}))
append(zoo, "first", 10)
if not small:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))
result: dict[str, object] = {"small": small, "append": append(zoo, "large", 100)}
result["merge"] = command("merge", zoo.path, source)
result["merge into a new zoo"] = command("merge", folder / "new", source)
result["full"] = state(zoo.path)
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
result["later"] = [append(zoo, "second", 10), state(zoo.path)]
if small and mount("-o", "remount,ro", folder):
    result["read-only"] = [append(zoo, "third", 1), command("merge", zoo.path, source), state(zoo.path)]
    result["read-only commands"] = [command(name, zoo.path) for name in ("inspect", "verify")]
print(json.dumps(result))
