"""Every skill says what it is for, names files that exist, and its check passes."""

import multiprocessing
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import ROOT

SKILLS = sorted(path.parent for path in (ROOT / "skills").glob("*/SKILL.md"))
each = pytest.mark.parametrize("skill", SKILLS, ids=lambda path: path.name)


def test_every_folder_is_a_skill_that_agents_are_told_of() -> None:
    folders = sorted(path for path in (ROOT / "skills").iterdir() if path.is_dir())
    assert folders == SKILLS
    told = (ROOT / "AGENTS.md").read_text()
    assert [skill.name for skill in SKILLS if f"skills/{skill.name}" not in told] == []


@each
def test_what_it_says_is_there(skill: Path) -> None:
    text = (skill / "SKILL.md").read_text()
    name = re.search(r"^---\nname: (.+)\ndescription: .{20,}\n---\n", text)
    assert name is not None and name[1] == skill.name
    files = re.findall(r"\b(?:stages|tools|tests|packages|skills|examples)/[\w/.-]*\w", text)
    assert files and [file for file in files if not (ROOT / file).exists()] == []


@each
def test_its_check_passes(skill: Path, tmp_path: Path) -> None:
    """Those of one process are forked, so that imports are paid once; a pytest stands alone."""
    check = skill / "check.py"
    if "import pytest" in check.read_text():
        command = [sys.executable, str(check)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    with (tmp_path / "said").open("w+") as out:
        process = multiprocessing.get_context("fork").Process(target=run, args=(check, out))
        process.start()
        process.join(300)
        code = process.exitcode
        process.kill()
    assert code == 0, (tmp_path / "said").read_text()


def run(check: Path, out: Any) -> None:
    os.chdir(ROOT)
    sys.stdout = sys.stderr = out
    sys.argv, sys.path[0] = [str(check)], str(check.parent)
    runpy.run_path(str(check), run_name="__main__")
