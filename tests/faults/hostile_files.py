"""The corpus of hostile files at every door that would take them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.faults.outcome import Outcome
from tests.hostile.test_hostile import GOOD, inert
from tests.tiny import ROOT


def hostile_files(folder: Path, short: bool) -> Outcome:
    """Nothing runs, talks or leaves its folder; each is refused, or means nothing."""
    command = [sys.executable, "-m", "tests.hostile.host", str(folder)]
    done = subprocess.run(
        [*command, *(["tar-"] if short else [])], cwd=ROOT, capture_output=True, text=True
    )
    outcome = Outcome() if done.returncode == 0 else Outcome(broke=done.stderr[-2000:])
    for line in done.stdout.splitlines():
        if not line.startswith('{"case"'):
            continue
        trial = json.loads(line)
        refused = trial["ending"] in GOOD and (trial["ending"] == "refused" or inert(trial["case"]))
        outcome.add(line[:300], detected=refused, recovered=not trial["events"])
    return outcome
