"""A rank's end of being watched: it starts its sentinel, and answers it from a thread."""

from __future__ import annotations

import faulthandler
import json
import linecache
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch import nn

from triptych_core.config import RunConfig
from triptych_core.faults import page, sentinel
from triptych_core.faults.heartbeat import Heartbeat
from triptych_core.faults.lineage import note_launcher
from triptych_core.faults.stop import StopRequest

_WAITING_IN = ("torch/distributed/", "deepspeed/comm/")  # collectives, by their files
_WAITING_LINES = (".wait(", "synchronize(")
_COMPILING_IN = ("torch/_dynamo/", "torch/_inductor/", "triton/compiler/")


class Watch:
    """Watches over this rank until it is closed; every rank of the job begins one together.

    Args:
        config: of the run.
        model: what is trained.
        layers: modules of it that are named.
        doing: says what is waited for, where data are.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        layers: Sequence[nn.Module],
        doing: Callable[[], str] = lambda: "",
    ) -> None:
        memory = os.memfd_create("heartbeat")
        os.ftruncate(memory, page.SIZE)
        self.heart = Heartbeat(memory)
        self.heart.follow(layers)
        names = {id(module): name for name, module in model.named_modules()}
        self.stop = StopRequest(say=dist.get_rank() == 0, told=self.heart.stop)
        self._doing, self._main = doing, threading.main_thread().ident
        self._stacks = os.memfd_create("stacks")
        faulthandler.register(sentinel.DUMP_SIGNAL, file=self._stacks, all_threads=True)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        files = {"page": memory, "socket": theirs.fileno(), "stacks": self._stacks}
        settings = _settings(config, [names[id(layer)] for layer in layers]) | files
        root = str(Path(__file__).parents[2])
        code = (
            f"import json, sys; sys.path.insert(0, {root!r})\n"
            "from triptych_core.faults.sentinel import main; main(json.loads(sys.argv[1]))"
        )
        command = [sys.executable, "-S", "-c", code, json.dumps(settings)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=list(files.values())
        )
        theirs.close()
        os.close(memory)
        self.stop.listen()
        threading.Thread(target=self._answer, name="watch", daemon=True).start()

    def close(self) -> None:
        """The run is over: nothing is watched any more."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._process.wait(10)
        faulthandler.unregister(sentinel.DUMP_SIGNAL)

    def _answer(self) -> None:
        while word := self._socket.recv(64).decode():
            if word == "stop":
                self.stop.ask()
            elif word == "report":
                self._socket.send(json.dumps(self._report()).encode())
            else:
                os._exit(int(word.removeprefix("exit ")))

    def _report(self) -> dict[str, Any]:
        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in frames.items()
        ]
        main = frames.get(self._main or 0)
        files = [frame.f_code.co_filename for frame in _outwards(main)]
        return {
            "waits": main is not None and _is_waiting(main),
            "compiles": any(part in file for file in files for part in _COMPILING_IN),
            "collectives": _collectives(),
            "at": "" if main is None else _place(main),
            "doing": self._doing(),
            "stacks": "\n".join(stacks)[:500_000],
        }


def _collectives() -> int:
    """How many the default group has entered on this rank; the backend counts them anyway."""
    group: Any = dist.distributed_c10d._get_default_group()
    return int(group._get_sequence_number_for_group())


def _settings(config: RunConfig, modules: list[str]) -> dict[str, Any]:
    """What the sentinel must know; every rank takes part."""
    me = (socket.gethostname(), os.getpid(), int(time.time()))
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, me)
    return {
        "rank": dist.get_rank(),
        "world_size": len(ranks),
        "pid": os.getpid(),
        "peers": [pid for host, pid, _ in ranks if host == me[0] and pid != me[1]],
        "lineage": note_launcher(),
        "folder": str(config.dir / "hang" / f"{ranks[0][2]}-{ranks[0][1]}"),
        "hang_seconds": config.hang_seconds,
        "excused": sentinel.EXCUSED,
        "grace": config.grace_seconds,
        "modules": modules,
    }


def _outwards(frame: FrameType | None) -> list[FrameType]:
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _is_waiting(frame: FrameType) -> bool:
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return any(part in frame.f_code.co_filename for part in _WAITING_IN) or any(
        part in line for part in _WAITING_LINES
    )


def _place(frame: FrameType) -> str:
    """Of a stack, the innermost line outside of torch's own files."""
    for inner in _outwards(frame):
        if "/torch/" not in inner.f_code.co_filename:
            path = Path(inner.f_code.co_filename)
            return f"{path.parent.name}/{path.name}:{inner.f_lineno} in {inner.f_code.co_name}"
    return ""
