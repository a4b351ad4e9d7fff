"""Work for the tests of worker processes: each function is what a worker runs."""

import ctypes
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

SECONDS = 30  # of hanging, far beyond any test's patience


def numbers(note, worker, num_workers):
    for i in range(worker, 10, num_workers):
        note(i)
        yield {"number": i, "worker": worker, "pid": os.getpid(), "big": torch.full((5000,), i)}


def environment(note, worker, num_workers):
    yield {
        "threads": torch.get_num_threads(),
        "python threads": threading.active_count(),
        "parallel": os.environ["TOKENIZERS_PARALLELISM"],
        "fds": len(list(Path("/proc/self/fd").iterdir())),
    }


def endless(note, worker, num_workers):
    for i in range(worker, 10**9, num_workers):
        note(i)
        yield i


def mistaken(note, worker, num_workers):
    yield 0
    raise ValueError("a.tar: must be whole, got half; restore it")


def broken(note, worker, num_workers):
    yield 0
    raise KeyError("a bug of ours")


def dying(note, worker, num_workers):
    yield 0
    note(5)
    os.kill(os.getpid(), signal.SIGKILL)


def leaving(note, worker, num_workers):
    yield 0
    os._exit(7)


def hanging(note, worker, num_workers):
    yield 0
    note(5)
    time.sleep(SECONDS)


def hanging_in_c(note, worker, num_workers):
    yield 0
    note(6)
    ctypes.PyDLL(None).sleep(SECONDS)  # holds the interpreter's lock


def stopped(note, worker, num_workers):
    yield 0
    note(7)
    os.kill(os.getpid(), signal.SIGSTOP)


@dataclass(frozen=True)
class CountAhead:
    """Writes how many items were made into a file."""

    path: str

    def __call__(self, note, worker, num_workers):
        for i in range(100):
            Path(self.path).write_text(str(i + 1))
            yield i


class Counting:
    """Yields its argument and how often it was loaded before."""

    def __reduce__(self):
        return _load_counting, ()

    def __call__(self, note, worker, num_workers, number):
        yield number


loads = 0


def _load_counting():
    global loads
    loads += 1
    assert loads == 1, "loaded again"
    return Counting()
