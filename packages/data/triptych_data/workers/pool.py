"""Worker processes seen from the trainer: a generator runs in each, and none can hang unseen."""

import atexit
import itertools
import logging
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from typing import Any

from triptych_data.workers.server import DUMP_SIGNAL, NOTE, Work
from triptych_data.workers.transport import memory_file, receive, send

_DUMP_SECONDS = 2.0  # a worker that can write its stack at all does so in milliseconds
_log = logging.getLogger(__name__)


class Job:
    """Work for workers, sent to the server at once, so that loading it overlaps with other things.

    What cannot be loaded there raises when workers start. The server forgets it with this object.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._server: _Server | None = None
        self.place()

    def place(self) -> tuple["_Server", int]:
        """Return the server that has the work, or is about to, and the work's number there."""
        server = start_server()
        if self._server is not server:
            self._server, self._number = server, server.load(self._work)
            weakref.finalize(self, server.notes.append, ("drop", self._number))
        return server, self._number


def run_workers(
    job: Job,
    num_workers: int,
    args: tuple[Any, ...] = (),
    *,
    prefetch: int,
    timeout: float,
    where: Callable[[int], str],
    waits: Callable[[Callable[[], str]], None] = lambda says: None,
    key: str = "data",
) -> Generator[Any]:
    """Yield what the work of `job`, called with (note, w, num_workers, *args), yields in worker w:
    one item of each worker in turn.

    Before each wait `waits` is given a function that says what the worker waited for is on. `key`
    is the section of the configuration that errors name.

    Ends when the worker whose turn it is has no more. Each worker is ahead by `prefetch` items at
    most. Workers end with this iterator and with this process, whatever kills it.

    Raises a worker's ValueError as it is; ValueError that names the sample (by `where`) a worker
    was on when it gave nothing for `timeout` seconds, and logs its stack; RuntimeError for a
    worker that died or failed otherwise.
    """
    server, work = job.place()
    workers: list[_Worker] = []
    try:
        for number in range(num_workers):
            request = work, number, num_workers, args, prefetch
            workers.append(_Worker(server, number, request))
        for worker in itertools.cycle(workers):
            waits(partial(worker.says, where))
            try:
                yield worker.next_item(timeout, where, key)
            except StopIteration:
                return
    finally:
        for worker in workers:
            worker.end()


def start_server() -> "_Server":
    """Return this process's server, started if need be: it imports while the caller goes on."""
    if _Server.current is None or _Server.current.has_ended():
        _Server.current = _Server()
    return _Server.current


class _Server:
    """The trainer's end of `server.serve` in a process of its own."""

    current: "_Server | None" = None

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from triptych_data.workers.server import serve; serve({theirs.fileno()})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self._lock = threading.Lock()
        self._num_loaded = 0
        self.notes: deque[tuple[Any, ...]] = deque()
        """requests without answer, sent with the next one: the garbage collector, which may run at
        any point of another request, only adds to them"""
        atexit.register(self.close)

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def load(self, work: Work) -> int:
        """Let the server load work; returns its number without waiting."""
        with self._lock:
            with suppress(OSError):  # a server that died is noticed with the next request
                send(self._control, ("load", work))
            self._num_loaded += 1
            return self._num_loaded - 1

    def request(self, *words: Any, descriptors: tuple[int, ...] = ()) -> Any:
        """Return the answer to a request. Raises what it raised, or RuntimeError if it died."""
        with self._lock:
            try:
                while self.notes:
                    send(self._control, self.notes.popleft())
                send(self._control, words, descriptors)
                answer, _ = receive(self._control)
            except (EOFError, OSError) as error:
                raise RuntimeError(
                    "the server of data workers must live as long as the run, got its end; "
                    "see its last words above, or whether the machine ran out of memory"
                ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def has_ended(self) -> bool:
        """Whether it closed its end: it says nothing unasked, so there is nothing else to read."""
        if self._control.fileno() < 0:
            return True  # this process closed it
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        return bool(poll.poll(0)) or self._process.poll() is not None

    def close(self) -> None:
        """Let the server end, and its workers with it."""
        self._control.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)


def _forget_server() -> None:
    """In a forked child: the server is the parent's, and must see the parent's end."""
    if _Server.current is not None:
        atexit.unregister(_Server.current.close)
        _Server.current._control.close()
        _Server.current = None


os.register_at_fork(after_in_child=_forget_server)


class _Worker:
    def __init__(self, server: _Server, number: int, request: tuple[Any, ...]) -> None:
        self._owner = os.getpid()
        self._server = server
        self._number = number
        self._log = memory_file()
        os.pwrite(self._log, NOTE.pack(-1), 0)
        os.lseek(self._log, NOTE.size, os.SEEK_SET)  # stacks are written behind the note
        self._notes = mmap.mmap(self._log, NOTE.size)
        self._connection, theirs = socket.socketpair()
        self._pid: int | None = None
        try:
            files = theirs.fileno(), self._log
            self._pid = server.request("start", *request, descriptors=files)
        except BaseException:
            self.end()
            raise
        finally:
            theirs.close()

    def next_item(self, timeout: float, where: Callable[[int], str], key: str) -> Any:
        """Return the worker's next item; raises StopIteration after the last."""
        self._connection.settimeout(timeout)
        try:
            (kind, *rest), _ = receive(self._connection)
        except TimeoutError:
            raise self._hanging(timeout, where, key) from None
        except (EOFError, ConnectionResetError):
            raise self._dead(where) from None
        if kind == "end":
            raise StopIteration
        if kind == "error":
            raise rest[0]
        with suppress(BrokenPipeError, ConnectionResetError):  # it may have sent its last item
            self._connection.send(b".")
        return rest[0]

    def end(self) -> None:
        """Kill the worker; without its connection it would end as soon as it is done with an item.

        Asks nothing of the server: it is called where an iterator is collected as garbage.
        """
        if self._owner != os.getpid() or self._connection.fileno() < 0:
            return
        self._connection.close()
        os.close(self._log)
        # The number is the worker's own until the server, which knows when, collects its exit code.
        if self._pid is not None and not self._server.has_ended():
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._server.notes.append(("forget", self._pid))

    def says(self, where: Callable[[int], str]) -> str:
        """Which worker it is, and the sample it is on."""
        return f"data worker {self._number} {self._place(where)}"

    def _hanging(self, timeout: float, where: Callable[[int], str], key: str) -> ValueError:
        assert self._pid is not None
        place = self._place(where)
        with suppress(ProcessLookupError):
            os.kill(self._pid, DUMP_SIGNAL)
        stack = self._stack()
        _log.error("data worker %d, process %d, %s:\n%s", self._number, self._pid, place, stack)
        return ValueError(
            f"{key}.timeout_s: a data worker must give a batch within {timeout:g} s, got none from "
            f"worker {self._number} {place}; its stack was logged: look at that sample and its "
            "storage, or allow more time"
        )

    def _dead(self, where: Callable[[int], str]) -> RuntimeError:
        place = self._place(where)
        code = self._server.request("wait", self._pid, 5.0)
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return RuntimeError(
            f"data worker {self._number} must live as long as the run, got its end by {how} "
            f"{place}; SIGKILL mostly means that the machine ran out of memory"
        )

    def _place(self, where: Callable[[int], str]) -> str:
        (sample,) = NOTE.unpack_from(self._notes)
        return "before its first sample" if sample < 0 else f"on {where(sample)}"

    def _stack(self) -> str:
        """Return what the worker wrote when it was asked for its stack; it may be unable to."""
        text = b""
        deadline = time.monotonic() + _DUMP_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.05)
            before, text = text, os.pread(self._log, 1 << 20, NOTE.size)
            if text and text == before:
                break
        return text.decode(errors="replace") or "(it wrote none: stopped, or in the kernel)"
