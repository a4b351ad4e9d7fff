"""A launcher that dies is missed from a rank's first moments on; a shell that ends is not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.tiny import ROOT

RANK = """
import time
from triptych_core.faults.lineage import note_launcher, parent_of
noted = note_launcher()
print("noted", flush=True)
input()  # as it imports and loads, its launcher dies
for _ in range(200):
    gone = any(parent_of(child) != parent for child, parent in note_launcher())
    if gone:
        break
    time.sleep(0.01)
print(len(noted), gone, flush=True)
"""
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(rank.stdout.readline(), end="", flush=True)
subprocess.Popen([sys.executable, "-c", "print(open(0).read(), flush=True)"], stdin=rank.stdout)
"""


@pytest.mark.parametrize(("local_rank", "said"), [("0", "1 True"), (None, "0 False")])
def test_only_a_launcher_is_missed(local_rank, said):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "packages/core")}
    environment.pop("LOCAL_RANK", None)
    if local_rank is not None:
        environment["LOCAL_RANK"] = local_rank
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment},
    )
    assert launcher.stdout.readline() == "noted\n"
    launcher.wait(60)
    launcher.stdin.write("\n")
    launcher.stdin.close()
    assert launcher.stdout.read().split("\n")[0] == said
