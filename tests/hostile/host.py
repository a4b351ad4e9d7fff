"""A process that has imported all doors, and forks a watched child for each file and door.

    python -m tests.hostile.host FOLDER [CASE]     one line of JSON for each

pytest's own process stays free of torch's threads, and imports are paid once.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from tests.hostile.cases import CASES
from tests.hostile.doors import DOORS
from tests.hostile.watch import CANARY, watched

TIMEOUT = 120.0  # on a machine that others use, too; what a case may take is processor time


def main(scratch: Path, only: str | None) -> None:
    """Feed every case to each of its doors; prints one line a trial."""
    torch.set_num_threads(1)
    gc.freeze()  # or each child's collections would copy every page of what was imported
    # What a payload would read or make; both beside the folders that a child may write in.
    os.environ[CANARY] = str(scratch / CANARY)
    for case in CASES:
        if only is not None and not re.match(only, case.name):
            continue
        made = scratch / case.name
        made.mkdir()
        path = case.make(made)
        for door in case.doors:
            folder = scratch / f"{case.name}.{door}"
            folder.mkdir()
            verdict = watched(partial(DOORS[door], path, folder), folder, TIMEOUT)
            canary = scratch / CANARY
            if canary.exists():
                verdict.events.append("the canary was touched")
                canary.unlink()
            line = {"case": case.name, "door": door, **asdict(verdict)}
            print(json.dumps(line), flush=True)
            shutil.rmtree(folder)
        shutil.rmtree(made, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2] if len(sys.argv) > 2 else None)
