"""Starts a run again after a crash: `python -m triptych_core.faults.supervise -- COMMAND`.

A stage goes on from its newest whole checkpoint by itself, so that starting it again is all there
is to do. Not started again: a run that ended well, was asked to stop, has a mistake of the user's
in it, was ended by its loss guard, or made no progress since it was last started: the same would
happen again.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from triptych_core.checkpoint.folders import checkpoints
from triptych_core.config import read_tree
from triptych_core.faults.codes import DIVERGED, HUNG, PEER_LOST, PREEMPTED, USER_ERROR

WHY = {
    USER_ERROR: "a mistake that starting again does not mend",
    PREEMPTED: "it was asked to stop",
    DIVERGED: "its loss guard ended it",
    HUNG: "it hung",
    PEER_LOST: "a rank of it died",
}
_FINAL = (0, USER_ERROR, PREEMPTED, DIVERGED)
_SUBREAPER = 36  # of prctl: orphans of the command become children of this process


def supervise(command: Sequence[str], max_restarts: int, run_dir: Path) -> int:
    """Run a command, and again after a crash; returns the code of its last end.

    Its processes are in a group of their own, which gets the signals of this one, and of which none
    is left when the command has ended.
    """
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    restarts = 0
    while True:
        before = _newest(run_dir)
        code = _run(command)
        after = _newest(run_dir)
        if code in _FINAL:
            _say(f"ended with {code}" + (f": {WHY[code]}" if code else ""))
            return code
        why = WHY.get(code, "it crashed")
        if after == before and restarts:
            _say(f"ended with {code}: {why}, with no new checkpoint since it was started again")
            return code
        if restarts == max_restarts:
            _say(f"ended with {code}: {why}; was started again {restarts} times")
            return code
        restarts += 1
        where = f"after step {after}" if after else "from the start"
        _say(f"ended with {code}: {why}; starts again {where} ({restarts} of {max_restarts})")


def _run(command: Sequence[str]) -> int:
    process = subprocess.Popen(command, start_new_session=True)

    def hand_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    kept = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        code = process.wait()
        _end_group(process.pid)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


def _end_group(group: int) -> None:
    """Kill what is left of a command that has ended, and collect it."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    with suppress(ChildProcessError):
        while os.waitpid(-1, 0)[0]:
            pass


def _newest(run_dir: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    found = checkpoints(run_dir)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def find_run_dir(command: Sequence[str]) -> Path:
    """The run.dir of a stage's command line: an override, or the key in its YAML.

    Raises:
        ValueError: neither names it.
    """
    found: str | None = None
    for number, word in enumerate(command):
        name, _, value = word.partition("=")
        if name == "--config":
            path = Path(value or command[min(number + 1, len(command) - 1)])
            section = read_tree(path).get("run") if path.is_file() else None
            found = found or (section.get("dir") if isinstance(section, dict) else None)
    for word in command:
        if word.startswith("run.dir="):
            found = word.removeprefix("run.dir=")
    if found is None:
        raise ValueError(
            "run.dir: must be given, where supervise looks for progress, got nothing; add "
            "run.dir=… to the command"
        )
    return Path(found)


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)  # noqa: T201


def main(words: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m triptych_core.faults.supervise", description=__doc__
    )
    parser.add_argument("--max-restarts", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- deepspeed stages/sft.py …")
    options = parser.parse_args(words)
    command = options.command[options.command[:1] == ["--"] :]
    try:
        if not command:
            raise ValueError("COMMAND: must be given after --, got nothing; see --help")
        return supervise(command, options.max_restarts, find_run_dir(command))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
