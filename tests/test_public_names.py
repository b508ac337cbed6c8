"""What a package exports: everything can be imported, is typed, and costs no torch until it is used."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ["zoo_common", "gpt_diffusion", "ghn", "pilimit", "sane"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_can_be_imported_and_is_seen_by_type_checkers(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    assert dir(module) == sorted(module.__all__)
    typed = re.findall(r"^    from .* as (\w+)$", Path(module.__file__).read_text(), re.MULTILINE)
    assert sorted(typed) == sorted(module.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_another_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"'{package}' has no attribute 'Absent'"):
        importlib.import_module(package).Absent  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_and_its_command_does_not_import_torch(package):
    code = f"import sys, {package}.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
