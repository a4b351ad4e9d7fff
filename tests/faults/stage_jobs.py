"""The real SFT stage on two ranks: asked to stop, or standing still."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import NamedTuple

from tests.faults.outcome import Outcome
from tests.stages.test_faults import Job
from tests.tiny import make_model_dir, make_shards
from triptych_core.checkpoint.folders import checkpoints
from triptych_core.checkpoint.manifest import find_damage
from triptych_core.faults.codes import HUNG, PREEMPTED, USER_ERROR

PATIENCE = 900.0  # seconds for a job to come so far, on a machine that others use, too
STOPS = {
    "SIGUSR1 to one rank": "rank == 1 and os.kill(os.getpid(), signal.SIGUSR1)",
    "SIGTERM to the group": "rank == 0 and os.killpg(0, signal.SIGTERM)",
    "Ctrl-C": "rank == 0 and os.killpg(0, signal.SIGINT)",
    "Ctrl-C twice": "rank == 0 and [os.killpg(0, signal.SIGINT), time.sleep(0.5), "
    "os.killpg(0, signal.SIGINT), time.sleep(5)]",
    "grace expires": "rank == 0 and [os.killpg(0, signal.SIGTERM), time.sleep(600)]",
}


class Hang(NamedTuple):
    """What a rank does at step 6, what must be said of it, and how the job must end."""

    fault: str
    said: tuple[str, ...]
    code: int = HUNG
    words: tuple[str, ...] = ()
    before: str = "pass"


LAYER = "module hf.model"
HANGS = {
    "a rank sleeps": Hang("rank == 1 and time.sleep(600)", ("rank 1 holds up the others", LAYER)),
    "a rank is stopped": Hang(
        "rank == 1 and os.kill(os.getpid(), signal.SIGSTOP)", ("rank 1 is stopped", LAYER)
    ),
    "a rank is stuck in C": Hang(
        "import ctypes; rank == 1 and ctypes.PyDLL(None).sleep(600)",
        ("rank 1 cannot run Python", LAYER),
    ),
    "a rank skips a collective": Hang(
        "import torch, torch.distributed as d; d.all_reduce(torch.ones(1)) if rank == 0 else "
        "time.sleep(600)",
        ("rank 1 holds up the others", LAYER),
    ),
    # Data may be slow: that is said, and the job goes on until they are given up.
    "a data worker is stopped": Hang(
        "from tests.faults.processes import descendants; "
        "from triptych_core.faults.lineage import parent_of; "
        "rank == 1 and [os.kill(pid, signal.SIGSTOP) for pid in descendants(os.getpid()) "
        "if parent_of(pid) != os.getpid()]",
        ("waits on: rank 1 holds up the others", "waiting for data", "got none from worker 0 on "),
        USER_ERROR,
        ("data.num_workers=1", "data.prefetch=1", "data.timeout_s=45"),
    ),
    "a sample is never decoded": Hang(
        "from triptych_data.prepare import PackBuilder; "
        "rank == 1 and setattr(PackBuilder, '_encode', lambda *_: time.sleep(600))",
        ("rank 1 holds up the others: step 7, waiting for data", "reading ", ".tar"),
        before="import triptych_core.faults.sentinel as s; s.EXCUSED = 20",
    ),
}


def workspace(folder: Path) -> Path:
    """A tiny model and shards."""
    make_model_dir(folder / "model")
    make_shards(folder / "train", 40, seed=1)
    return folder


def stops(folder: Path, short: bool) -> Outcome:
    """Each request to stop: codes, a whole checkpoint, nothing left running, and it goes on."""
    outcome = Outcome()
    workspace(folder)
    for number, (name, fault) in enumerate(STOPS.items()):
        if short and number:
            break
        job = Job(
            folder, f"stop-{number}", "run.grace_seconds=3", "data.num_workers=1", fault=fault
        )
        codes = job.end(PATIENCE)
        whole = [path for path in checkpoints(job.dir) if find_damage(path) is None]
        last = int(whole[-1].name[5:]) if whole else 0
        again = Job(folder, f"stop-{number}", f"run.steps={last + 2}")
        goes_on = again.end(PATIENCE) == [0, 0] and f"goes on after step {last}" in again.said()
        what = f"{name}: codes {codes}, whole up to step {last}: {job.said()[-600:]}"
        is_forced = name in ("Ctrl-C twice", "grace expires")
        ended = PREEMPTED in codes if is_forced else codes == [PREEMPTED] * 2 and last >= 6
        outcome.add(what, detected=ended, recovered=goes_on and last >= 5)
    return outcome


def hangs(folder: Path, short: bool) -> Outcome:
    """Each kind of standstill, three at a time; hang_seconds is auto."""
    workspace(folder)
    outcome, names = Outcome(), list(HANGS)[:1] if short else list(HANGS)
    for first in range(0, len(names), 3):
        jobs = {name: _begin(folder, name) for name in names[first : first + 3]}
        named = _first_words(jobs)
        for name, job in jobs.items():
            _look(outcome, folder, name, job, named.get(name))
    return outcome


def _begin(folder: Path, name: str) -> Job:
    hang, mark = HANGS[name], str(_mark(folder, name))
    noted = f"from pathlib import Path; Path({mark!r}).write_text(str(time.time())); {hang.fault}"
    return Job(folder, name.replace(" ", "-"), *hang.words, fault=noted, before=hang.before)


def _first_words(jobs: dict[str, Job]) -> dict[str, float]:
    """When each job first said that it stands still."""
    found: dict[str, float] = {}
    deadline = time.monotonic() + PATIENCE
    while len(found) < len(jobs) and time.monotonic() < deadline:
        for name, job in jobs.items():
            if name not in found and "no progress for" in job.said():
                found[name] = time.time()
        if all(job.process.exitcode is not None for job in jobs.values()):
            break
        time.sleep(0.1)
    return found


def _look(outcome: Outcome, folder: Path, name: str, job: Job, named: float | None) -> None:
    codes, said, hang = job.end(PATIENCE), job.said(), HANGS[name]
    reports = sorted((job.dir / "hang").glob("*/rank-*.json"))
    whole = [path for path in checkpoints(job.dir) if find_damage(path) is None]
    # A rank that was stopped may not have come to the end of its background save.
    is_saved = bool(whole) or name == "a rank is stopped"
    outcome.add(
        f"{name}: codes {codes}: {said[-1500:]}",
        detected=all(text in said for text in hang.said) and hang.code in codes,
        recovered=is_saved and whole == checkpoints(job.dir) and len(reports) == 2,
    )
    if named is not None and reports:
        slowest = re.findall(r"slowest_seconds\": ([\d.]+)", reports[0].read_text())
        allowed = max(10.0, 3 * max(map(float, slowest), default=0.0))
        outcome.named_after(named - float(_mark(folder, name).read_text()), allowed)


def _mark(folder: Path, name: str) -> Path:
    return folder / f"{name}.mark"
