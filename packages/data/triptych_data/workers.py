"""How worker processes are started, and how they end."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext


def worker_context() -> BaseContext:
    """Return the context in which data workers start: forked from a clean server process.

    A plain fork would copy the trainer's threads, CUDA and NCCL state, which is not safe once
    torch.distributed runs; spawn imports torch and transformers anew in each worker (~9 s of CPU).
    The server imports them once, so that a further worker takes a fraction of a second.
    """
    context = multiprocessing.get_context("forkserver")
    tokenizers = "transformers.models.auto.tokenization_auto"
    context.set_forkserver_preload(["triptych_data.loader", tokenizers])
    return context


def start_server() -> None:
    """Start the server process already, so that it imports while the caller does other things."""
    worker_context()
    forkserver.ensure_running()


def begin_worker(_worker_id: int = 0) -> None:
    """Leave Ctrl-C to the parent, end when the parent dies, and keep to one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in worker processes only"
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Wait for the parent's death. A worker's own parent is the server, which outlives a killed
    trainer as long as workers live, so that neither it nor torch's watchdog would ever notice."""
    wait([sentinel])
    os._exit(1)
