"""The methods meet in examples only: none imports another, and zoo_common imports none of them."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = {
    path.parent.parent.parent.name: path.parent for path in Path(__file__).parents[1].glob("packages/*/src/*/py.typed")
}
IMPORT_NAMES = {folder.name for folder in PACKAGES.values()}


def allowed(folder):
    return {folder.name, "zoo_common"}


def imported_modules(tree):
    """Top-level names that a module imports anywhere, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_all_packages_are_found():
    assert len(PACKAGES) == len(IMPORT_NAMES) >= 5 and "zoo_common" in IMPORT_NAMES


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_no_source_file_imports_another_method(package):
    folder = PACKAGES[package]
    for path in folder.rglob("*.py"):
        names = set(imported_modules(ast.parse(path.read_text()))) & IMPORT_NAMES
        assert names <= allowed(folder), f"{path} imports {names - allowed(folder)}"


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_importing_every_module_loads_no_other_method(package):
    folder = PACKAGES[package]
    program = f"""
import importlib, json, pkgutil, sys
import {folder.name} as package
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(json.loads(result.stdout.splitlines()[-1])) & IMPORT_NAMES <= allowed(folder)


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_help_is_answered_without_torch(package):
    name = PACKAGES[package].name
    program = f"""
import sys
from {name}.cli import main
sys.argv = ["command", "--help"]
sys.exit(main() or "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr or "--help imports torch"
