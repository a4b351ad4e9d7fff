"""Run a function on several gloo ranks, or a script: forked processes, so imports are paid once."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

# Forking is safe only while no OpenMP or autograd threads run in the parent.
torch.set_num_threads(1)


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180
) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks of one job; returns each rank's result.

    A rank that raises fails the caller with that rank's traceback; a job that hangs is killed.
    """
    context = multiprocessing.get_context("fork")
    port = _free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(sender, rank, world_size, port, function, args)
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, timeout)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def run_script(
    script: Path, *words: object, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """`python script words`, with its exit code and all it writes; killed where it hangs."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        files = out.fileno(), err.fileno()
        arguments = script, [*map(str, words)], *files
        process = multiprocessing.get_context("fork").Process(target=_be_script, args=arguments)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        said = [file.seek(0) or file.read() for file in (out, err)]
    return subprocess.CompletedProcess([script, *words], process.exitcode or 0, *said)


def _be_script(script: Path, words: list[str], out: int, err: int) -> None:
    """What it raises, `multiprocessing` prints and makes an exit code of, as the interpreter."""
    gc.freeze()
    for number, (name, file) in enumerate((("stdout", out), ("stderr", err)), start=1):
        os.dup2(file, number)
        setattr(sys, name, os.fdopen(number, "w", 1, closefd=False))
    sys.argv, sys.path[0] = [str(script), *words], str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    """Every rank's result; the first failure to arrive is the one raised, as it is the cause."""
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {set(range(len(pipes))) - set(results)} gave no result")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                ok, results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if not ok:
                raise RuntimeError(f"rank {rank} failed:\n{results[rank]}")
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    pipe: Connection,
    rank: int,
    world_size: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    # A third of a second for each collection over what the parent had, and a copy of its memory.
    gc.freeze()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    try:
        result = (True, function(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    # Plain pickle, not Connection.send: torch would pass tensors by a shared memory that dies
    # with this process.
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()
    sys.stdout.flush()
    # No interpreter shutdown: a peer that failed must not leave this rank waiting in a destructor.
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
