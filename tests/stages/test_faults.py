"""What a run survives, and what it says: signals, hangs, lost ranks; with real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import _free_port
from tests.stages.test_sft import overrides
from tests.tiny import ROOT, make_model_dir, make_shards, sft_stage
from triptych_core.checkpoint.folders import checkpoints
from triptych_core.faults.codes import HUNG, PEER_LOST, PREEMPTED

# What is done in a rank before it joins the others; `fault` is called when its layer 1 is entered
# at step 6.
RANK = """
import os, signal, sys, time
import triptych_core.faults.heartbeat as heartbeat

def fault(rank):
    {fault}

enter = heartbeat.Heartbeat._enter
def enter_or_fault(self, number, module, args):
    enter(self, number, module, args)
    if self._step == 6 and number == 4:
        fault(self_rank)
heartbeat.Heartbeat._enter = enter_or_fault
{before}
"""


def launch(out: int, words: list[str], code: str) -> None:
    """Two ranks as a launcher starts them; all forked from here, so that imports are paid once."""
    import triptych_models.families  # noqa: F401

    os.setsid()
    os.chdir(ROOT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False) for fd in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    port, pids = _free_port(), []
    for rank in (0, 1):
        pid = os.fork()
        if not pid:
            rank_main(rank, port, words, code)
        pids.append(pid)
    print("pids", *pids, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(pid, signal.SIGTERM) for pid in pids])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print("codes", *codes, flush=True)
    os._exit(0)


def rank_main(rank: int, port: int, words: list[str], code: str) -> None:
    from triptych_core.config import load_config, run_main

    sft = sft_stage()
    config = load_config(sft.SftConfig, None, words)
    exec(code, {"self_rank": rank, "rank": rank})
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ |= ranks | place
    try:
        run_main(sft.main, config)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("faults")
    make_model_dir(path / "model")
    make_shards(path / "train", 40, seed=1)
    return path


class Job:
    """A run of two ranks under a small launcher, in a process group of its own."""

    def __init__(
        self, workspace: Path, name: str, *more: str, fault: str = "pass", before: str = "pass"
    ) -> None:
        self.dir = workspace / "runs" / name
        usual = ["evaluation.shards=[]", "export=false", "run.steps=1000000", "log.every=1"]
        usual += ["checkpoint.every=5", "log.progress=false"]
        words = overrides(workspace, self.dir, *usual, *more)
        self.out = (workspace / f"{name}.txt").open("w+")
        code = RANK.format(fault=fault, before=before)
        self.process = multiprocessing.get_context("fork").Process(
            target=launch, args=(self.out.fileno(), words, code)
        )
        self.process.start()

    def said(self) -> str:
        return Path(self.out.name).read_text()

    def wait_for(self, seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not seen():
            assert self.process.exitcode is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: f"\nstep {step}/" in self.said())

    def pids(self) -> list[int]:
        return [int(word) for word in re.findall(r"pids (\d+) (\d+)", self.said())[0]]

    def end(self, timeout: float = 120) -> list[int]:
        """Codes of the ranks; none of the job's processes is left."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"it did not end within {timeout:g} s: {self.said()}")
        group = _members(self.process.pid)
        deadline = time.monotonic() + 60  # data workers and sentinels see the end of their rank
        while group and time.monotonic() < deadline:
            time.sleep(0.05)
            group = _members(self.process.pid)
        for pid in group:
            os.kill(pid, signal.SIGKILL)
        assert not group, self.said()
        found = re.findall(r"codes (-?\d+) (-?\d+)", self.said())
        return [int(code) for code in found[0]] if found else []


def _members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def test_a_signal_to_one_rank_or_all_saves_and_leaves_together(workspace):
    job = Job(workspace, "stop", "data.num_workers=1")
    job.wait_for_step(3)
    os.kill(job.pids()[1], signal.SIGUSR1)
    assert job.end() == [PREEMPTED, PREEMPTED], job.said()
    step = int(re.findall(r"stopped after step (\d+); the same command", job.said())[0])
    assert checkpoints(job.dir)[-1].name == f"step-{step:06d}"
    lines = [json.loads(line)["step"] for line in (job.dir / "metrics.jsonl").open()]
    assert lines == list(range(1, step + 1)) and (job.dir / "report.html").exists()
    # The launcher sends SIGTERM to ranks that the group's has reached, data workers included.
    again = Job(workspace, "stop", "data.num_workers=1")
    again.wait_for_step(step + 2)
    assert f"goes on after step {step}" in again.said()
    os.killpg(again.process.pid, signal.SIGTERM)
    assert again.end() == [PREEMPTED, PREEMPTED], again.said()
    assert int(re.findall(r"stopped after step (\d+)", again.said())[0]) > step


def test_ranks_without_a_launcher_save_and_leave(workspace):
    job = Job(workspace, "orphans")
    job.wait_for_step(3)
    job.process.kill()
    job.end()
    assert "the launcher is gone" in job.said()
    step = int(re.findall(r"stopped after step (\d+)", job.said())[0])
    assert checkpoints(job.dir)[-1].name == f"step-{step:06d}"


HANGS = {
    "sleeps": (
        "rank == 1 and time.sleep(600)",
        r"rank 1 holds up the others: step 6, in the forwa",
    ),
    "stopped": ("rank == 1 and os.kill(os.getpid(), signal.SIGSTOP)", r"rank 1 is stopped: step 6"),
    "skips": (
        "import torch, torch.distributed as d; d.all_reduce(torch.ones(1)) if rank == 0 else "
        "d.barrier(group=d.new_group([1, 0], use_local_synchronization=True))",
        r"rank 1 .*(collectives where another|holds up)",
    ),
}


@pytest.mark.parametrize("name", HANGS)
def test_a_hang_is_explained_and_ended(workspace, name):
    fault, wanted = HANGS[name]
    job = Job(workspace, name, "run.hang_seconds=2", fault=fault)
    codes = job.end()
    assert HUNG in codes and 0 not in codes, job.said()
    assert re.search(wanted, job.said()), job.said()
    assert "module hf.model.language_model.layers.1" in job.said()
    assert "samples 0" in job.said()
    (folder,) = (job.dir / "hang").iterdir()
    stacks = [(folder / f"rank-0000{rank}.txt").read_text() for rank in (0, 1)]
    assert "in train" in stacks[0] and "loop.py" in stacks[0]
    assert name == "stopped" or "enter_or_fault" in stacks[1]
    whole = [path.name for path in checkpoints(job.dir)]
    # A rank that was stopped may not have come to the end of its background save.
    assert whole == ["step-000005"] or (name == "stopped" and not whole)


def test_a_killed_rank_takes_the_job_down(workspace):
    job = Job(workspace, "killed")
    job.wait_for_step(3)
    began = time.monotonic()
    os.kill(job.pids()[1], signal.SIGKILL)
    first, second = job.end()
    assert second == -signal.SIGKILL and first in (1, PEER_LOST)
    assert time.monotonic() - began < 60  # seconds on a quiet machine; the backend waits minutes


def test_a_supervised_run_starts_again_after_a_crash_only(workspace, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys\n"
        f"folder, codes = {str(tmp_path / 'run')!r}, sys.argv[2:]\n"
        "os.makedirs(folder + '/checkpoints', exist_ok=True)\n"
        "number = len(os.listdir(folder + '/checkpoints'))\n"
        "os.makedirs(f'{folder}/checkpoints/step-{number + 1:06d}')\n"
        "os.kill(os.getpid(), 9) if codes[number] == 'kill' else sys.exit(int(codes[number]))\n"
    )

    def supervise(*words: str) -> tuple[int, str]:
        base = [sys.executable, "-m", "triptych_core.faults.supervise", "--max-restarts", "2", "--"]
        done = subprocess.run([*base, *words], capture_output=True, text=True, cwd=ROOT)
        return done.returncode, done.stderr

    run = [sys.executable, str(script), f"run.dir={tmp_path / 'run'}"]
    code, said = supervise(*run, "kill", "76", "0")
    assert code == 0 and "ended with 137: it crashed; starts again after step 1 (1 of 2)" in said
    assert "ended with 76: it hung; starts again after step 2 (2 of 2)" in said
    code, said = supervise(*run, "", "", "", "2")
    assert code == 2 and "a mistake that starting again does not mend" in said
    crash = [sys.executable, "-c", "import sys; sys.exit(1)"]
    code, said = supervise(*crash, f"run.dir={tmp_path / 'none'}")
    assert code == 1 and said.count("starts again") == 1 and "with no new checkpoint" in said
    assert supervise(*crash)[0] == 2
