"""Every skill says what it is for, names files that exist, and its check passes."""

import re
import subprocess
import sys
from pathlib import Path

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
def test_its_check_passes(skill: Path) -> None:
    command = [sys.executable, str(skill / "check.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
