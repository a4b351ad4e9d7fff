"""The real SFT stage on two ranks: asked to stop, standing still, killed; with real launchers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.outcome import Outcome
from tests.stages.test_faults import Job
from tests.stages.test_sft import overrides
from tests.tiny import ROOT, make_model_dir, make_shards
from triptych_core.checkpoint.folders import checkpoints
from triptych_core.checkpoint.manifest import find_damage
from triptych_core.faults.codes import HUNG, PREEMPTED

LEAVES = 60.0  # seconds within which all processes of a job must be gone
STOPS = {
    "SIGUSR1 to one rank": "rank == 1 and os.kill(os.getpid(), signal.SIGUSR1)",
    "SIGTERM to the group": "rank == 0 and os.killpg(0, signal.SIGTERM)",
    "Ctrl-C": "rank == 0 and os.killpg(0, signal.SIGINT)",
    "Ctrl-C twice": "rank == 0 and [os.killpg(0, signal.SIGINT), time.sleep(0.5), "
    "os.killpg(0, signal.SIGINT), time.sleep(5)]",
    "grace expires": "rank == 0 and [os.killpg(0, signal.SIGTERM), time.sleep(600)]",
}
HANGS = {
    "a rank sleeps": ("rank == 1 and time.sleep(600)", "rank 1 holds up the others"),
    "a rank is stopped": (
        "rank == 1 and os.kill(os.getpid(), signal.SIGSTOP)",
        "rank 1 is stopped",
    ),
    "a rank is stuck in C": (
        "import ctypes; rank == 1 and ctypes.PyDLL(None).sleep(600)",
        "rank 1 cannot run Python",
    ),
    "a rank skips a collective": (
        "import torch, torch.distributed as d; d.all_reduce(torch.ones(1)) if rank == 0 else "
        "time.sleep(600)",
        "rank 1 holds up the others",
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
        codes = job.end()
        whole = [path for path in checkpoints(job.dir) if find_damage(path) is None]
        last = int(whole[-1].name[5:]) if whole else 0
        again = Job(folder, f"stop-{number}", f"run.steps={last + 2}")
        goes_on = again.end() == [0, 0] and f"goes on after step {last}" in again.said()
        what = f"{name}: codes {codes}, whole up to step {last}: {job.said()[-600:]}"
        is_forced = name in ("Ctrl-C twice", "grace expires")
        ended = PREEMPTED in codes if is_forced else codes == [PREEMPTED] * 2 and last >= 6
        outcome.add(what, detected=ended, recovered=goes_on and last >= 5)
    return outcome


def hangs(folder: Path, short: bool) -> Outcome:
    """Each kind of standstill, all at the same time; hang_seconds is auto."""
    outcome, jobs = Outcome(), {}
    workspace(folder)
    for number, (name, (fault, wanted)) in enumerate(HANGS.items()):
        if short and number:
            break
        mark = folder / f"{number}.mark"
        first = f"Path({str(mark)!r}).write_text(str(time.time())); "
        fault = "from pathlib import Path; " + first + fault
        jobs[name] = Job(folder, f"hang-{number}", fault=fault), mark, wanted
    for name, (job, mark, wanted) in jobs.items():
        codes = job.end()
        ranks = sorted((job.dir / "hang").glob("*/rank-*.json"))
        named = wanted in job.said() and "module hf.model" in job.said() and len(ranks) == 2
        sound = [path.name for path in checkpoints(job.dir)] == ["step-000005"]
        what = f"{name}: codes {codes}: {job.said()[-1500:]}"
        outcome.add(what, detected=named and HUNG in codes, recovered=sound)
        if ranks:
            seconds = max(path.stat().st_mtime for path in ranks) - float(mark.read_text())
            slowest = [
                float(s) for s in re.findall(r"slowest_seconds\": ([\d.]+)", ranks[0].read_text())
            ]
            outcome.named_after(seconds, max(10.0, 3 * max(slowest, default=0.0)))
    return outcome


def launchers(folder: Path, short: bool) -> Outcome:
    """SIGTERM to what a user started, `deepspeed` and torchrun; and its SIGKILL."""
    outcome = Outcome()
    workspace(folder)
    starts = {
        "deepspeed": ["deepspeed", "--num_gpus", "2"],
        "torchrun": ["torchrun", "--nproc_per_node", "2"],
    }
    for (name, start), sent in zip(
        [*starts.items(), ("deepspeed", starts["deepspeed"])],
        (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL),
        strict=True,
    ):
        run_dir = folder / f"runs/{name}-{sent.name}"
        words = overrides(folder, run_dir, "run.steps=1000000", "log.every=1", "export=false")
        words += ["evaluation.shards=[]", "checkpoint.every=5", "log.progress=false"]
        program = str(Path(sys.executable).parent / start[0])
        environment = os.environ | {"DS_ACCELERATOR": "cpu"}
        with (folder / f"{name}-{sent.name}.txt").open("w+") as out:
            process = subprocess.Popen(
                [program, *start[1:], "stages/sft.py", *words],
                **{"stdout": out, "stderr": out, "cwd": ROOT},
                start_new_session=True,
                env=environment,
            )
            said = Path(out.name)
            deadline = time.monotonic() + 120
            while "step 7/" not in said.read_text() and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(sent)
            began = time.monotonic()
            process.wait(LEAVES)
            while (left := naming(str(run_dir))) and time.monotonic() - began < LEAVES:
                time.sleep(0.1)
        outcome.named_after(time.monotonic() - began, LEAVES)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        whole = [path for path in checkpoints(run_dir) if find_damage(path) is None]
        what = f"{name} {sent.name}: {len(left)} left, {whole}: {said.read_text()[-1500:]}"
        saved = "stopped after step" in said.read_text()
        outcome.add(what, detected=not left, recovered=saved and bool(whole))
        if short:
            break
    return outcome


def naming(word: str) -> list[int]:
    """Processes in whose command line a word is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found
