"""The code in the READMEs runs: all blocks of one README in order, in an empty folder."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

MODULES = {"zoo": "zoo_common", "gpt-diffusion": "gpt_diffusion", "ghn": "ghn", "pilimit": "pilimit", "sane": "sane"}
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
    """Run the lines that start with ``$`` and one of our commands, in this process."""
    for command in re.findall(r"^\$ (.*)$", code, re.MULTILINE):
        program, *arguments = shlex.split(command, comments=True)
        if program in MODULES:
            main = importlib.import_module(f"{MODULES[program]}.cli").main
            assert main(arguments) == 0, f"{where}: {command}"
