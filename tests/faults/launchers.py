"""The real SFT stage under real launchers that die, and one that starts it again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.outcome import Outcome
from tests.faults.processes import collect, command_of, descendants, has_loaded
from tests.faults.stage_jobs import PATIENCE, workspace
from tests.faults.toy import differs, lost_and_repeated
from tests.ranks import _free_port
from tests.stages.test_sft import overrides
from tests.tiny import ROOT
from triptych_core.checkpoint.folders import checkpoints
from triptych_core.checkpoint.manifest import find_damage

LEAVES = 60.0  # seconds within which all processes of a job must be gone
STEPS = 16  # of a supervised run


class Death(NamedTuple):
    """A launcher, what it gets, and when: at a step, or while its ranks begin."""

    launcher: str
    sent: signal.Signals
    at_step: int


DEATHS = [
    Death("deepspeed", signal.SIGKILL, 0),
    Death("deepspeed", signal.SIGTERM, 7),
    Death("torchrun", signal.SIGTERM, 7),
    Death("deepspeed", signal.SIGKILL, 7),
]


def launchers(folder: Path, short: bool) -> Outcome:
    """Ranks without a launcher save and leave, whenever it dies."""
    outcome = Outcome()
    workspace(folder)
    for number, death in enumerate(DEATHS[:1] if short else DEATHS):
        run_dir, said = folder / f"runs/{number}", folder / f"{number}.txt"
        process = start(folder, run_dir, said, death.launcher, "run.steps=1000000")
        if death.at_step:
            wait_for(lambda: f"step {death.at_step}/" in said.read_text(), process, said)  # noqa: B023
        else:
            wait_for(lambda: are_beginning(process.pid), process, said)  # noqa: B023
        process.send_signal(death.sent)
        began = time.monotonic()
        process.wait(PATIENCE)
        left = wait_until_gone(PATIENCE)
        if death.at_step:  # the others first have to begin
            outcome.named_after(time.monotonic() - began, LEAVES)
        whole = [path for path in checkpoints(run_dir) if find_damage(path) is None]
        saved = "stopped after step" in said.read_text()
        what = f"{death}: left {left}, whole {whole}: {said.read_text()[-1500:]}"
        outcome.add(what, detected=saved and not left, recovered=bool(whole))
    return outcome


def supervised(folder: Path, short: bool) -> Outcome:
    """A rank is killed, the other one stands still: started again, it ends as if neither had."""
    outcome = Outcome()
    workspace(folder)
    more = (f"run.steps={STEPS}", "data.num_workers=1")
    # Under the same launcher: what is imported when, rich for one, draws from Python's generator.
    wanted, told = folder / "runs/wanted", folder / "wanted.txt"
    undisturbed = start(folder, wanted, told, "deepspeed", *more)
    assert undisturbed.wait(PATIENCE) == 0, told.read_text()
    run_dir, said = folder / "runs/supervised", folder / "supervised.txt"
    process = start(folder, run_dir, said, "supervise", *more)
    faults = {7: (1, signal.SIGKILL), 12: (0, signal.SIGSTOP)}
    for number, (step, (rank, sent)) in enumerate(faults.items(), 1):
        wait_for(lambda: f"\nstep {step}/" in said.read_text(), process, said)  # noqa: B023
        (pid,) = ranks(process.pid, rank)
        os.kill(pid, sent)
        again = f"({number} of 3)"
        began = time.monotonic()
        wait_for(lambda: again in said.read_text(), process, said)  # noqa: B023
        outcome.named_after(time.monotonic() - began, LEAVES)
    code, text = process.wait(PATIENCE), said.read_text()
    wrong = differs(run_dir, wanted, STEPS)
    lost, repeated = lost_and_repeated(run_dir)
    causes = re.findall(r"supervise: ended with \d+: (.*?); starts again after step (\d+)", text)
    left = wait_until_gone(LEAVES)
    outcome.add(
        f"code {code}, {causes}, differs: {wrong}, left {left}: {text[-2000:]}",
        detected=len(causes) == 2 and causes[0][1] == "5" and causes[1][1] == "10",
        recovered=code == 0 and not wrong and not left,
        **{"wrong": wrong, "lost": lost, "repeated": repeated},
    )
    return outcome


def start(
    folder: Path, run_dir: Path, said: Path, launcher: str, *more: str
) -> subprocess.Popen[Any]:
    """Two ranks of the stage under a launcher, in a session of its own."""
    port, programs = str(_free_port()), Path(sys.executable).parent
    deepspeed = [str(programs / "deepspeed"), "--num_gpus", "2", "--master_port", port]
    supervise = [sys.executable, "-m", "triptych_core.faults.supervise", "--max-restarts", "3"]
    starts = {
        "deepspeed": deepspeed,
        "torchrun": [str(programs / "torchrun"), "--nproc_per_node", "2", "--master_port", port],
        "supervise": [*supervise, "--", *deepspeed],
    }
    words = overrides(folder, run_dir, "log.every=1", "export=false", "log.progress=false")
    words += ["evaluation.shards=[]", "checkpoint.every=5", *more]
    with said.open("w") as out:
        return subprocess.Popen(
            [*starts[launcher], "stages/sft.py", *words],
            **{"stdout": out, "stderr": out, "cwd": ROOT, "start_new_session": True},
            env=os.environ | {"DS_ACCELERATOR": "cpu"},
        )


def ranks(launcher: int, *numbers: int) -> list[int]:
    """Processes of a launcher's ranks: all, or of these numbers; not what they have started."""
    found = []
    for pid in descendants(launcher):
        words: list[bytes] = []
        with suppress(OSError):  # it is gone by now
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        local = [word for word in words if word.startswith(b"LOCAL_RANK=")]
        command = command_of(pid)
        is_stage = " stages/sft.py " in command and "deepspeed.launcher" not in command
        if is_stage and local and (not numbers or int(local[0][11:]) in numbers):
            found.append(pid)
    return found


def are_beginning(launcher: int) -> bool:
    """Whether both ranks have read their configuration and now import torch."""
    return all(
        any(has_loaded(pid, "libtorch_cpu") for pid in ranks(launcher, rank)) for rank in (0, 1)
    )


def wait_for(seen: Callable[[], bool], process: subprocess.Popen[Any], said: Path) -> None:
    """Until it is so. Raises AssertionError if the process ends, or takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not seen():
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.05)


def wait_until_gone(seconds: float) -> list[str]:
    """Until this process has started nothing that still runs; returns what did not go."""
    deadline = time.monotonic() + seconds
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        collect()
        time.sleep(0.1)
    return [command_of(pid)[:100] for pid in left]
