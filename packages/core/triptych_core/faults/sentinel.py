"""A process beside each rank that sees what the rank itself cannot: that it stands still.

It wakes twice a second, imports no torch, and ends with the rank. A rank that is stopped, or stuck
in C with Python's lock held, can neither notice nor tell; this can, and can end it.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from triptych_core.faults import page
from triptych_core.faults.codes import HUNG, PEER_LOST, PREEMPTED
from triptych_core.faults.culprit import Report, Verdict, find_culprit
from triptych_core.faults.lineage import parent_of, status_of
from triptych_core.lines import write_whole

POLL = 0.5  # seconds
ANSWER = 2.0  # within which a rank says what it does, if it can run Python at all
GATHER = 5.0  # within which all ranks of a standing job have told, and peers of a dead one failed
SLOW = 1800.0  # for compilation, checkpoints, evaluation: far above what they take
EXCUSED = 1800.0  # for which data are waited for, or a layer that compiles; each alarm is said
MIN_LIMIT, FACTOR = 10.0, 3.0  # hang_seconds=auto: named by then; times the slowest step
# Before that: what a poll, an answer that does not come, its stacks and the others' reports take,
# 3.1 s on a quiet machine; 3.2 s at a load of 18 on each core.
TELLING = 4.0
DUMP_SIGNAL = signal.SIGUSR2


def main(settings: dict[str, Any]) -> None:
    """Watch until the rank is gone or says that it needs no watching."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are the rank's to handle
    watch = _Watch(settings)
    poll = select.poll()
    poll.register(settings["socket"], select.POLLIN)
    while not poll.poll(int(POLL * 1000)):
        watch.look()


class _Watch:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._set = settings
        self._page = mmap.mmap(settings["page"], page.SIZE)
        self._socket = socket.socket(fileno=settings["socket"])
        self._beats, self._quiet, self._looked = -1, 0.0, time.monotonic()
        self._patience = 1.0  # more after a standstill that was excused
        self._lost_at: float | None = None
        self._told_stop = False

    def look(self) -> None:
        """Once a poll."""
        now, beat = time.monotonic(), page.read(self._page)
        # What a machine slept is no standstill of the job.
        passed, self._looked = min(now - self._looked, 2 * POLL), now
        if beat.beats != self._beats:
            self._beats, self._quiet, self._patience = beat.beats, 0.0, 1.0
        else:
            self._quiet += passed
        if not self._told_stop and any(parent_of(c) != p for c, p in self._set["lineage"]):
            self._told_stop = True
            self._say("the launcher is gone: saves after this step and stops")
            self._send("stop")
        if beat.stop_at and now - beat.stop_at > self._set["grace"]:
            self._say(f"stopping took more than {self._set['grace']:g} s (run.grace_seconds)")
            self._end(PREEMPTED)
        self._look_at_peers(now)
        limit = self._limit(beat)
        if limit and self._quiet > limit * self._patience:
            self._raise_alarm(beat)

    def _limit(self, beat: page.Beat) -> float:
        """Seconds that the rank may say nothing; 0: any."""
        limit = self._set["hang_seconds"]
        if limit == 0:
            return 0.0
        if beat.steps <= page.WARM_UP or page.KINDS[beat.kind] in ("start", "between"):
            return SLOW if limit == "auto" else max(SLOW, limit)
        if limit != "auto":
            return float(limit)
        return max(MIN_LIMIT, FACTOR * beat.slowest) - TELLING

    def _look_at_peers(self, now: float) -> None:
        """Where a rank of this machine is gone, this one waits for it in vain."""
        if all(_is_alive(pid) for pid in self._set["peers"]):
            return
        self._lost_at = self._lost_at or now
        if now - self._lost_at > GATHER:
            self._say("another rank has died")
            self._end(PEER_LOST)

    def _raise_alarm(self, beat: page.Beat) -> None:
        report = self._ask(beat)
        folder = Path(self._set["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"rank-{self._set['rank']:05d}.txt", report.pop("stacks"))
        write_whole(folder / f"rank-{self._set['rank']:05d}.json", json.dumps(report, indent=2))
        reports = self._gather(folder)
        verdict = find_culprit(reports, self._set["world_size"])
        self._speak_for_all(reports, verdict, folder)
        if self._is_excused(verdict):
            self._patience *= 2
        else:
            self._end(HUNG)

    def _is_excused(self, verdict: Verdict) -> bool:
        return verdict.is_excused and self._quiet < self._set["excused"]

    def _gather(self, folder: Path) -> list[Report]:
        """Fresh reports of the ranks that stand still, as this one does."""
        deadline, found = time.monotonic() + GATHER, list[Report]()
        while len(found) < self._set["world_size"] and time.monotonic() < deadline:
            time.sleep(POLL / 5)
            paths = folder.glob("rank-*.json")
            fresh = [path for path in paths if time.time() - path.stat().st_mtime < 4 * GATHER]
            found = [json.loads(path.read_text()) for path in sorted(fresh)]
        return found

    def _speak_for_all(self, reports: list[Report], verdict: Verdict, folder: Path) -> None:
        if reports and reports[0]["rank"] != self._set["rank"]:
            return
        what = "waits on" if self._is_excused(verdict) else f"ends with exit code {HUNG}"
        self._say(
            f"no progress for {self._quiet:.0f} s (run.hang_seconds), {what}: {verdict.text}; "
            f"stacks of all ranks in {folder}"
        )

    def _ask(self, beat: page.Beat) -> dict[str, Any]:
        """What the rank says of itself; what can be seen from outside if it cannot."""
        names = self._set["modules"]
        answer: dict[str, Any] = {"waits": False, "compiles": False, "collectives": 0}
        answer |= {"state": "running", "at": "", "doing": "", "stacks": ""}
        self._send("report")
        told = select.select([self._socket], [], [], ANSWER)[0]
        if told:
            with suppress(ConnectionResetError):  # it is gone by now
                answer |= json.loads(self._socket.recv(1 << 20) or b"{}")
        else:
            with suppress(ProcessLookupError):
                os.kill(self._set["pid"], DUMP_SIGNAL)
            is_stopped = status_of(self._set["pid"])[0] in "Tt"
            time.sleep(POLL)
            stacks = os.pread(self._set["stacks"], 1 << 20, 0).decode(errors="replace")
            answer["state"] = "stopped" if is_stopped else "silent"
            answer["stacks"] = stacks or f"none could be written: the process {answer['state']}\n"
        return {
            "rank": self._set["rank"],
            "pid": self._set["pid"],
            "step": beat.step,
            "kind": page.KINDS[beat.kind],
            "module": names[beat.module] if beat.module >= 0 else "",
            "keys": beat.keys,
            "beats": beat.beats,
            "quiet_seconds": round(self._quiet, 1),
            "slowest_seconds": round(beat.slowest, 3),
            **answer,
        }

    def _end(self, code: int) -> None:
        """End the rank with this code; a rank that cannot even do that, without one."""
        self._send(f"exit {code}")
        deadline = time.monotonic() + ANSWER
        while _is_alive(self._set["pid"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        with suppress(ProcessLookupError):
            os.kill(self._set["pid"], signal.SIGKILL)
        os._exit(0)

    def _send(self, word: str) -> None:
        with suppress(OSError):
            self._socket.send(word.encode(), socket.MSG_DONTWAIT)

    def _say(self, text: str) -> None:
        os.write(2, f"rank {self._set['rank']}: {text}\n".encode())


def _is_alive(pid: int) -> bool:
    return status_of(pid)[0] not in "XZ"
