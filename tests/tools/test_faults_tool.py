"""The fault matrix as `make test` has time for: its cheap rows, and that a missing guard shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tests.tiny import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from faults import main

ROWS = ("power", "checkpoint", "shard", "row", "settings")


def faults(*words: str) -> tuple[int, str, str]:
    command = [sys.executable, "tools/faults.py", *words]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def ran() -> tuple[int, str, str]:
    """A short form of these rows, and of those that a switched-off guard turns red."""
    return faults("--short", "--mutations", *(word for key in ROWS for word in ("--only", key)))


def test_every_row_is_green(ran):
    code, out, err = ran
    assert code == 0, out + err
    rows = re.findall(r"^\| `(\w+)` .*\| (\d+), (\d+) \|.*\| green \|$", out, flags=re.M)
    assert [key for key, *_ in rows] == list(ROWS)
    assert all((lost, repeated) == ("0", "0") for _, lost, repeated in rows)


def test_a_row_without_its_guard_is_red(ran):
    _, out, _ = ran
    guards = re.findall(r"^\| [^|]+ \| `\w+` \| (\d+) of \d+ \| (red|\S+) \|$", out, flags=re.M)
    assert len(guards) == 7, out
    assert {colour for _, colour in guards} == {"red"}


def test_an_unknown_row_is_named():
    done = CliRunner().invoke(main, ["--only", "fire"])
    assert done.exit_code == 2 and "got fire" in done.output and "kill, rank, power" in done.output
