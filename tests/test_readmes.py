"""The code in the READMEs runs: all blocks of one README in order, in an empty folder."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = sorted([*ROOT.glob("README.md"), *ROOT.glob("packages/*/README.md")])
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("readme", READMES, ids=[str(path.relative_to(ROOT).parent) for path in READMES])
def test_code_of_readme_runs(readme, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = readme.read_text()
    names: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        language, code = block.groups()
        line = text.count("\n", 0, block.start()) + 1
        if language == "python":
            exec(compile("\n" * line + code, str(readme), "exec"), names)  # noqa: S102
        else:
            run_console(code, f"{readme}:{line}")


def run_console(code, where):
    """Run the lines that start with ``$ zoo``: quick commands on what the Python blocks made."""
    for command in re.findall(r"^\$ (zoo .*)$", code, re.MULTILINE):
        words = shlex.split(command, comments=True)
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{where}: {command}\n{result.stderr}"
