"""Golden tests: every case of every stored file, in the package's own folder or in ``GOLDEN_DIR``.

A test names its file and where the cases stand in it::

    @pytest.mark.golden("tokenization.json", cases="cases")
    def test_splits_are_the_published_ones(golden): ...

It runs once for each entry of that list or mapping (once in all without ``cases``), on
``packages/<name>/tests/golden/`` or on the folder that the environment variable ``GOLDEN_DIR`` names. The name may be a
pattern (``transformer_forward_real_*.json``) for files of one format; ``having="key"`` passes over files of another
package's format that have the same name. A file that is absent from ``GOLDEN_DIR`` gives no test; a file without a
single case, or without a list that its format has, fails. The summary prints the number of cases per file, and the
files that no test read; a golden run without a single case fails.
"""

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

#: Tolerances (atol, rtol) of |a - b| <= atol + rtol * max|b|: the one table for all packages.
#: The two defaults hold where neither the README of the goldens nor the specification names another.
TOLERANCES: dict[str, tuple[float, float]] = {
    "float32": (0.0, 1e-4),
    "float64": (0.0, 1e-9),
    "exact": (0.0, 0.0),
    # gpt-diffusion: README of its goldens
    "gpt-diffusion/forward": (1e-5, 0.0),
    "gpt-diffusion/loss": (0.0, 1e-5),
    "gpt-diffusion/process": (1e-5, 0.0),
    "gpt-diffusion/ddim": (1e-3, 0.0),
    "gpt-diffusion/schedule": (0.0, 1e-12),
    # ghn: README of its goldens
    "ghn/values": (2e-5, 0.0),
    "ghn/norms": (0.0, 1e-5),
    # sane: section 20 of its specification
    "sane/forward": (1e-5, 1e-4),
    "sane/loss": (0.0, 1e-5),
    "sane/steps": (0.0, 1e-4),
    "sane/statistics": (1e-9, 1e-5),  # the original sums in float32
    "sane/features": (1e-9, 1e-6),
    "sane/ridge": (1e-6, 0.0),
    "sane/kde": (1e-6, 0.0),
    # pilimit: section 14 of its specification; 1e-7 where |q| is near 1, which training brings about
    "pilimit/float64": (0.0, 1e-7),
    "pilimit/float32": (2e-6, 0.0),
    "pilimit/float16": (1e-2, 0.0),
}


def fill(name: str, shape: tuple[int, ...] | list[int], scale: float = 1.0) -> torch.Tensor:
    """The recipe of the golden inputs: float32 normal numbers seeded by the CRC-32 of a name."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    values = random.standard_normal(int(np.prod(shape))) * scale
    return torch.from_numpy(values.reshape(tuple(shape)).astype(np.float32))


def assert_close(actual: Any, expected: Any, tolerance: str = "float32", what: str = "") -> None:
    """Raise unless |actual - expected| <= atol + rtol * max|expected|, with the row of the table named."""
    a = np.asarray(actual.detach().cpu() if isinstance(actual, torch.Tensor) else actual, dtype=np.float64)
    b = np.asarray(expected.detach().cpu() if isinstance(expected, torch.Tensor) else expected, dtype=np.float64)
    assert a.shape == b.shape, f"{what}: shape {a.shape}, golden {b.shape}"
    if b.size == 0:
        return
    atol, rtol = TOLERANCES[tolerance]
    limit = atol + rtol * np.abs(b[np.isfinite(b)]).max(initial=0.0)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    worst = np.where(same, 0.0, np.abs(np.where(same, 0.0, a) - np.where(same, 0.0, b))).max()
    assert worst <= limit, f"{what}: differs by {worst:.3g}, allowed {limit:.3g} ({tolerance})"


def assert_stats(actual: torch.Tensor, stats: Mapping[str, Any], tolerance: str = "float32", what: str = "") -> None:
    """Compare a tensor with a stored summary: shape, mean, population std, L2 norm, first and last values."""
    assert list(actual.shape) == list(stats["shape"]), f"{what}: shape {tuple(actual.shape)}, golden {stats['shape']}"
    flat = actual.detach().double().flatten()
    scale = max(abs(v) for v in [*stats["first"], *stats["last"], stats["std"]])
    atol, rtol = TOLERANCES[tolerance]
    limit = atol + rtol * scale
    head, tail = flat[: len(stats["first"])], flat[flat.numel() - len(stats["last"]) :]
    pairs = [("first", head, stats["first"]), ("last", tail, stats["last"])]
    pairs += [("mean", flat.mean(), stats["mean"]), ("std", flat.std(correction=0), stats["std"])]
    for name, a, b in pairs:
        worst = (a - torch.tensor(b, dtype=torch.float64)).abs().max().item()
        assert worst <= limit, f"{what} {name}: differs by {worst:.3g}, allowed {limit:.3g} ({tolerance})"
    limit = atol * flat.numel() ** 0.5 + rtol * stats["l2"]
    assert abs(flat.norm().item() - stats["l2"]) <= limit, f"{what}: L2 norm {flat.norm()}, golden {stats['l2']}"


@dataclass(frozen=True)
class Golden:
    """One case of a golden file."""

    path: Path
    name: str
    case: Any
    document: Any

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays of the safetensors file with the same stem; empty if there is none."""
        path = self.path.with_suffix(".safetensors")
        return load_file(path) if path.exists() else {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """:attr:`arrays` as torch tensors."""
        return {name: torch.from_numpy(array) for name, array in self.arrays.items()}


@dataclass(frozen=True)
class Absent:
    """Stands for cases that are not there."""

    path: Path | None
    """The file; None if there is none."""
    why: str = ""
    fatal: bool = False
    """Wrong even if the file has other cases."""


def _folder(test_file: Path) -> Path:
    chosen = os.environ.get("GOLDEN_DIR")
    if chosen:
        folder = Path(chosen)
        if not folder.is_dir():
            raise pytest.UsageError(f"GOLDEN_DIR={chosen}: no such folder")
        return folder
    return test_file.parent / "golden"


def _cases(path: Path, where: str | None, one_of_many: bool = False) -> Iterator[Golden | Absent]:
    """The cases of a file; ``one_of_many``: a file of a pattern, which may lack a list."""
    document = json.loads(path.read_text()) if path.suffix == ".json" else None
    if where is None:
        yield Golden(path, path.stem, document, document)
        return
    found = document
    for key in where.split("."):
        if isinstance(found, dict) and key not in found:
            yield Absent(path, f"{path} has no {where!r} (it has {', '.join(found)})", fatal=not one_of_many)
            return
        found = found[key] if isinstance(found, dict) else found[int(key)]
    if not found:
        yield Absent(path, f"{path} has no case: its {where!r} is empty")
    items = found.items() if isinstance(found, dict) else enumerate(found)
    for key, case in items:
        name = case.get("name", case.get("config", key)) if isinstance(case, dict) else key
        yield Golden(path, str(name) if isinstance(name, str) else str(key), case, document)


_read: set[Path] = set()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a golden test one run for each stored case."""
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None or "golden" not in metafunc.fixturenames:
        return
    folder, pattern = _folder(Path(metafunc.definition.path)), marker.args[0]
    paths = sorted(folder.glob(pattern))
    if not paths and not os.environ.get("GOLDEN_DIR"):
        raise pytest.UsageError(f"golden file {folder / pattern} is missing")
    if "having" in marker.kwargs:
        paths = [path for path in paths if marker.kwargs["having"] in json.loads(path.read_text())]
    _read.update(paths)
    cases = [case for path in paths for case in _cases(path, marker.kwargs.get("cases"), "*" in pattern)]
    ids = [f"{c.path.name}-{i}-{c.name}" if isinstance(c, Golden) else f"absent{i}" for i, c in enumerate(cases)]
    metafunc.parametrize("golden", cases or [Absent(None)], ids=ids or ["absent"])


def _golden(item: pytest.Item) -> Golden | Absent | None:
    return item.callspec.params.get("golden") if hasattr(item, "callspec") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Pass over the files that ``GOLDEN_DIR`` does not hold, and over empty lists of files that have other cases."""
    known = {golden.path for item in items if isinstance(golden := _golden(item), Golden)} | {None}
    absent = [
        item
        for item in items
        if isinstance(golden := _golden(item), Absent) and not golden.fatal and golden.path in known
    ]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail for a file that has not the cases it should have."""
    if isinstance(golden := _golden(item), Absent):
        pytest.fail(golden.why, pytrace=False)


_ran: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the golden cases that ran."""
    if report.when == "call" and "golden" in report.keywords and "[" in report.nodeid:
        package = report.nodeid.split("/")[1] if report.nodeid.startswith("packages/") else ""
        file = report.nodeid.split("[", 1)[1].split("-", 1)[0]
        _ran[f"{package}/{file}"] += 1


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Print the number of golden cases per file."""
    if _ran:
        terminalreporter.section("golden cases")
        for file, count in sorted(_ran.items()):
            terminalreporter.write_line(f"{count:5d}  {file}")
    for path in sorted({file for folder in {p.parent for p in _read} for file in folder.glob("*.json")} - _read):
        if os.environ.get("GOLDEN_DIR"):
            terminalreporter.write_line(f"no test  {path.name}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A golden run that found no case has failed, whatever else passed."""
    if hasattr(session.config, "workerinput"):  # a worker of pytest-xdist: the reports are counted by the controller
        return
    wanted = bool(os.environ.get("GOLDEN_DIR")) or session.config.option.markexpr == "golden"
    if wanted and not _ran and not session.config.option.collectonly and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
