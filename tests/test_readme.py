"""The README is run: its commands exist, its Python works, its files are there."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from jaxformer.experiment import load

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
FIRST = 'pip install -e ".[train]" && python -m train configs/vit_digits.py'
SECOND = 'pip install -e ".[test]" && python -m pytest'


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[list[str]]:
    """Every `python -m train|evaluate ...` line of the README and the docs."""
    found = []
    for page in PAGES:
        for line in page.read_text().splitlines():
            match = re.search(r"python -m (train|evaluate)(\.\w+)? [^`&|#]*", line)
            if match and "..." not in line:
                found.append(shlex.split(match.group(0))[2:])
    return found


def test_the_two_commands_stand_there():
    assert FIRST in README and SECOND in README
    assert SECOND.replace("pip install", "pip install -q") in (ROOT / ".ci/run").read_text()


def test_every_command_names_a_config_and_fields_that_exist():
    assert len(commands()) >= 4
    for program, *argv in commands():
        if program in ("train", "evaluate") and argv[0].endswith(".py"):
            load(ROOT / argv[0], [a for a in argv[1:] if re.match(r"[\w.]+=", a)])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_python_runs_without_the_trainer(page, tmp_path):
    for code in blocks(page.read_text(), "python"):
        out = subprocess.run(
            [sys.executable, "-c", code + "\nimport sys; assert 'train' not in sys.modules"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_file_that_is_linked_is_there(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_no_page_names_a_machine():
    for page in PAGES:
        assert not re.search(r"/(root|work|home)/", page.read_text()), page


def test_every_number_is_there():
    assert "MEASURED" not in README and "_ROW" not in README
    assert (ROOT / ".ci" / "run").read_text().count(FIRST.split(" && ")[1]) == 1
