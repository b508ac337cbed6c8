import subprocess
import sys

import gpt_diffusion
import pytest


def test_every_public_name_can_be_imported():
    for name in gpt_diffusion.__all__:
        assert getattr(gpt_diffusion, name).__name__ == name
    assert dir(gpt_diffusion) == sorted(gpt_diffusion.__all__)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'gpt_diffusion' has no attribute 'Gpt'"):
        gpt_diffusion.Gpt  # noqa: B018


def test_importing_the_package_does_not_import_torch():
    code = "import sys, gpt_diffusion; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
