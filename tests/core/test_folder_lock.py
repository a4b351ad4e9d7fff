"""A folder is of one run at a time, and of none whose process is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from triptych_core.faults.folder_lock import hold, release


def hold_and_wait(folder: Path, told: Connection) -> None:
    hold(folder, 0, told.send)
    told.send("held")
    signal.pause()


def test_a_folder_that_is_held_is_waited_for_and_then_refused(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    other = context.Process(target=hold_and_wait, args=(tmp_path, theirs))
    other.start()
    assert ours.recv() == "held"
    said: list[str] = []
    message = f"run.dir: must be of no other run, got {tmp_path}, which process {other.pid} on "
    with pytest.raises(ValueError, match=message):
        hold(tmp_path, 0.5, said.append)
    assert len(said) == 1 and f"process {other.pid}" in said[0]

    assert other.pid is not None
    os.kill(other.pid, signal.SIGKILL)
    hold(tmp_path, 10, said.append)
    hold(tmp_path, 0, said.append)  # ours already
    other.join()


def test_what_is_released_is_others_and_children_hold_nothing(tmp_path: Path) -> None:
    hold(tmp_path, 0, print)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=signal.pause)  # has the file open, too
    child.start()
    release(tmp_path)
    ours, theirs = context.Pipe()
    other = context.Process(target=hold_and_wait, args=(tmp_path, theirs))
    other.start()
    assert ours.recv() == "held"
    for process in (child, other):
        process.kill()
        process.join()
