"""The process that data workers are forked from: clean of the trainer's threads, CUDA and NCCL.

It imports torch and transformers once (~5 s), loads what the workers run once, and then a worker
is a fork away. It leaves nothing behind: when the trainer dies, however it dies, it kills its
workers, also those that hang, and ends.
"""

import faulthandler
import gc
import importlib
import mmap
import os
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from triptych_data.workers.transport import LoadError, receive, send

Note = Callable[[int], None]
"""Called with the number of the sample that a worker takes up next."""
Work = Callable[..., Iterator[Any]]
"""What workers run, called with a note-taker, a worker's number, how many workers there are, and
the arguments of the run."""

DUMP_SIGNAL = signal.SIGUSR1
"""Makes a worker write the stacks of its threads to its log."""
NOTE = struct.Struct("<q")
"""How a worker's log begins: the sample it is on, -1 before the first; stacks follow."""

_PRELOADED = ("triptych_data.prepare", "transformers.models.auto.tokenization_auto")


def serve(descriptor: int) -> None:
    """Answer requests from the trainer until it is gone.

    - `("load", work)` keeps the work, also if it cannot be loaded; the first one has number 0, the
      next one 1; no answer
    - `("drop", job)` forgets the work with that number; no answer
    - `("start", job, number, num_workers, args, prefetch)` with a socket and a log file forks a
      worker and returns its process id, or raises what loading the work raised
    - `("wait", pid, seconds)` waits for a worker's end, and returns its exit code, negative if a
      signal ended it, or 0 if it takes longer
    - `("forget", pid)` collects the exit code of a worker that was killed; no answer
    """
    # The trainer's to handle: a group is told to stop, and its last batches are still wanted.
    for number in (signal.SIGINT, signal.SIGTERM, DUMP_SIGNAL):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    control = socket.socket(fileno=descriptor)
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # or the workers' collections would copy every page of what was imported
    state = _State(control)
    with suppress(EOFError, OSError):
        while True:
            answer = _answer(state, control)
            if answer is not None:
                send(control, answer)
    for pid in state.living:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _answer(state: "_State", control: socket.socket) -> Any:
    try:
        (name, *args), descriptors = receive(control)
    except LoadError as error:  # all but work is loaded anywhere
        return state.load(_portable(error.__cause__))
    try:
        return getattr(state, name)(*args, *descriptors)
    except Exception as error:
        return _portable(error)


def _portable(error: BaseException | None) -> Exception:
    """Return a user's mistake as it is, anything else with its traceback as text."""
    if type(error) is ValueError:
        return error
    return RuntimeError("".join(traceback.format_exception(error)))


class _State:
    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.living: set[int] = set()
        self.killed: set[int] = set()
        self.works: dict[int, Work | Exception] = {}
        self.num_loaded = 0

    def load(self, work: Work | Exception) -> None:
        self.works[self.num_loaded] = work
        self.num_loaded += 1
        gc.freeze()

    def drop(self, job: int) -> None:
        self.works.pop(job, None)

    def start(
        self,
        job: int,
        number: int,
        num_workers: int,
        args: tuple[Any, ...],
        prefetch: int,
        connection: int,
        log: int,
    ) -> int:
        work = self.works[job]
        if isinstance(work, Exception):
            os.close(connection)
            os.close(log)
            raise work
        pid = os.fork()
        if pid == 0:
            self.control.close()
            _run(partial(_call, work, number, num_workers, args), prefetch, connection, log)
        os.close(connection)
        os.close(log)
        self.living.add(pid)
        return pid

    def wait(self, pid: int, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while (code := self._exit_code(pid)) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return code or 0

    def forget(self, pid: int) -> None:
        self.killed.add(pid)
        # Not waited for: one that hangs in the kernel cannot die before the kernel lets it go.
        self.killed = {pid for pid in self.killed if self._exit_code(pid) is None}

    def _exit_code(self, pid: int) -> int | None:
        """Return the exit code of a worker, None while it lives; asked again it is 0."""
        if pid not in self.living:
            return 0
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            return None
        self.living.discard(pid)
        return os.waitstatus_to_exitcode(status)


def _call(
    work: Work, number: int, num_workers: int, args: tuple[Any, ...], note: Note
) -> Iterator[Any]:
    return work(note, number, num_workers, *args)


def _run(work: Callable[[Note], Iterator[Any]], prefetch: int, descriptor: int, log: int) -> None:
    """Be a worker: send `("item", value)` again and again, `("end",)` or `("error", …)` at last.

    At most `prefetch` items are under way; for each one taken the trainer sends a byte.
    """
    code = 1
    try:
        faulthandler.register(DUMP_SIGNAL, file=log, all_threads=True)
        torch.set_num_threads(1)
        notes = mmap.mmap(log, NOTE.size)
        connection = socket.socket(fileno=descriptor)
        last: tuple[Any, ...] = ("end",)
        try:
            items = work(lambda sample: NOTE.pack_into(notes, 0, sample))
            for count, item in enumerate(items):
                if count >= prefetch and not connection.recv(1):
                    return  # the trainer is gone or wants no more
                send(connection, ("item", item))
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:
            last = ("error", _portable(error))
        send(connection, last)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # never back into the server's own code
