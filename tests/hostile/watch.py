"""One call in a watched child: what it ran, opened and wrote, its memory and its time."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CANARY = "TRIPTYCH_CANARY"
"""What each payload's code or path holds, and what no audited event may."""
RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
TALKS = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request")
WRITES = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.chmod")
ADDRESS_SPACE = 6 << 30
"""Bytes a child may map beyond what it began with: a bomb shall fail and not fill a machine."""


@dataclass
class Verdict:
    """What a call came to.

    ending: "accepted"; "refused", with a ValueError or exit code of ours; "broke", with anything
    else; "died" or "hung". events: what must never be seen.
    """

    ending: str
    message: str = ""
    seconds: float = 0.0  # of one core
    mebibytes: float = 0.0  # of memory, at most, over what there was before
    events: list[str] = field(default_factory=list)


def watched(call: Callable[[], str | None], folder: Path, timeout: float) -> Verdict:
    """Call it in a forked child that may write in `folder` alone."""
    receiver, sender = _pipe()
    child = os.fork()
    if child == 0:
        receiver.close()
        _be_the_child(call, folder, sender)
    sender.close()
    answered = receiver.poll(timeout)
    if not answered:
        os.kill(child, signal.SIGKILL)
    try:
        verdict = Verdict(**receiver.recv()) if answered else Verdict("hung", f"over {timeout} s")
    except EOFError:
        verdict = Verdict("died", "without a word")
    os.waitpid(child, 0)
    receiver.close()
    return verdict


def _pipe() -> tuple[Connection, Connection]:
    reader, writer = os.pipe()
    return Connection(reader, writable=False), Connection(writer, readable=False)


def _be_the_child(call: Callable[[], str | None], folder: Path, sender: Connection) -> None:
    os.setpgid(0, 0)
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a question would wait for a person
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + ADDRESS_SPACE, most))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    events: list[str] = []
    sys.addaudithook(_Eyes(folder, events))
    before, began = _memory("VmRSS"), time.process_time()
    ending, message = _outcome(call)
    seconds, peak = time.process_time() - began, _memory("VmHWM")
    found = [*events]
    verdict = Verdict(ending, message, seconds, (peak - before) / 2**20, found)
    sender.send(asdict(verdict))
    os._exit(0)


def _outcome(call: Callable[[], str | None]) -> tuple[str, str]:
    try:
        refusal = call()
    except ValueError as error:
        ours = _raised_in(error).startswith("triptych_")
        return ("refused" if ours else "broke"), f"{error}" if ours else traceback.format_exc()
    except BaseException:
        return "broke", traceback.format_exc()
    return ("accepted", "") if refusal is None else ("refused", refusal)


def _raised_in(error: BaseException) -> str:
    """The module that raised it: `run_main` shows a person what ours raised, in one line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""


def _memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/self/status: must have {name}")


class _Eyes:
    """The audit hook: notes what runs code, talks, or touches what is not the child's own."""

    def __init__(self, folder: Path, events: list[str]) -> None:
        self._folder, self._events = os.path.realpath(folder), events

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and "git" in str(arguments[0]):
            return  # the averager notes the revision of its own code
        if event in RUNS or event in TALKS or event == "pickle.find_class":
            self._note(event, arguments)
        elif event in ("exec", "compile"):
            if not _is_template(arguments) and CANARY in _code_text(arguments[0]):
                self._note(event, ("the canary's code",))
        elif event == "open":
            path, mode, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if flags else False
            writes = writes or (isinstance(mode, str) and bool(set(mode) & set("wax+")))
            self._look_at(event, path, writes)
        elif event in WRITES:
            # A link or a new name is made where the second path says.
            second = event in ("os.link", "os.symlink", "os.rename")
            self._look_at(event, arguments[1 if second else 0], True)

    def _look_at(self, event: str, path: Any, writes: bool) -> None:
        if not isinstance(path, str | bytes):
            return
        real = os.path.realpath(os.fsdecode(path))
        if CANARY in real:
            self._note(event, (real,))
        inside = real.startswith(self._folder + os.sep) or real == self._folder
        if writes and not inside and not real.startswith(("/dev/", "/proc/self/", "/dev/shm")):
            self._note(event, (real, "is outside"))

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if len(self._events) < 20:
            self._events.append(f"{event}{arguments!r}"[:300])


def _is_template(arguments: tuple[Any, ...]) -> bool:
    """Whether it is what Jinja makes of a chat template, whose sandbox is looked at by the rest."""
    return "<template>" in (getattr(arguments[0], "co_filename", ""), *arguments[1:])


def _code_text(code: Any) -> str:
    """The constants and names of what is run, or its source."""
    if isinstance(code, bytes | bytearray):
        return code[:100_000].decode("latin-1")
    if isinstance(code, str):
        return code[:100_000]
    return f"{getattr(code, 'co_filename', '')}{getattr(code, 'co_consts', '')}"[:100_000]
