"""Build all wheels and try each, with zoo-common's, in an empty environment that gets them from a local folder only.

Every module must import, or name the extra that it needs; ``--version`` must answer, and ``--help`` must answer in under half a second without torch.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HELP_SECONDS = 0.5

IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
names = [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if "pip install" not in str(error):
            raise
print(len(names) + 1)
"""

NO_TORCH = """
import importlib, sys
main = importlib.import_module(sys.argv[1] + ".cli").main
sys.argv = ["command", "--help"]
sys.exit(main() or "torch" in sys.modules)
"""


def run(*command: str | Path) -> str:
    """Output of a command; ends this script with the command's own output if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def seconds_of_help(script: Path) -> float:
    """Fastest of five calls: what else the machine does can only add to it."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        help_text = run(script, "--help")
        times.append(time.perf_counter() - start)
        if "usage:" not in help_text:
            sys.exit(f"{script.name} --help shows no usage: {help_text!r}")
    return min(times)


def check(wheel: Path, wheels: Path, environment: Path) -> None:
    """Install one wheel with zoo-common's and use it."""
    package = wheel.name.partition("-")[0]
    common = next(wheels.glob("zoo_common-*.whl"))
    python = environment / "bin" / "python"
    run("uv", "venv", "--quiet", "--python", sys.executable, environment)
    run("uv", "pip", "install", "--quiet", "--python", python, *{wheel, common})
    modules = int(run(python, "-c", IMPORT_ALL, package))
    run(python, "-c", NO_TORCH, package)
    script = environment / "bin" / ("zoo" if package == "zoo_common" else package.replace("_", "-"))
    told = run(script, "--version").split()
    seconds = seconds_of_help(script)
    sys.stdout.write(f"{wheel.name}: {modules} modules import, {' '.join(told)}, --help in {seconds:.2f} s\n")
    if told[-1] != wheel.name.split("-")[1]:
        sys.exit(f"{script.name} --version says {told}, the wheel is {wheel.name}")
    if seconds >= HELP_SECONDS:
        sys.exit(f"{script.name} --help took {seconds:.2f} s, allowed {HELP_SECONDS} s")


def main() -> None:
    """Build and check all wheels."""
    os.environ.pop("VIRTUAL_ENV", None)
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder) / "wheels"
        run("uv", "build", "--quiet", "--all-packages", "--wheel", "--out-dir", wheels)
        found = sorted(wheels.glob("*.whl"))
        if len(found) != len(list(ROOT.glob("packages/*/pyproject.toml"))):
            sys.exit(f"expected one wheel per package, got {[wheel.name for wheel in found]}")
        for wheel in found:
            check(wheel, wheels, Path(folder) / wheel.stem)


if __name__ == "__main__":
    main()
