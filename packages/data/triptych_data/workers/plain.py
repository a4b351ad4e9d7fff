"""How the processes of a plain pool begin and end; training has its own, see `pool.py`."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait


def begin_worker() -> None:
    """Leave Ctrl-C to the parent, end when the parent dies, and keep to one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in worker processes only"
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
