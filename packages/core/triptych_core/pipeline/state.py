"""What a recipe's folder knows of its steps: `state.json`, and what still has to be done."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triptych_core.pipeline.contents import (
    fingerprint,
    fingerprint_output,
    is_complete,
    read_json,
)
from triptych_core.pipeline.plan import Plan, Step
from triptych_core.secrets import masked_tree, masked_words

# Sections of a stage that say how it is watched, not what it computes.
UNCOUNTED = ("log.", "plan.")

STATE_FILE = "state.json"

Record = dict[str, Any]


class State:
    """The record of every step, written whole after each change, and the last command's words."""

    def __init__(self, plan: Plan) -> None:
        self._path = plan.dir / STATE_FILE
        stored = read_json(self._path) or {}
        self.records: dict[str, Record] = stored.get("steps", {})
        self._words: list[str] = stored.get("words", [])

    def begin(self, words: Sequence[str]) -> None:
        """A command with these words has been given."""
        self._words = masked_words(words)
        self._write()

    def note(self, name: str, **facts: Any) -> None:
        """Add facts to a step's record."""
        self.records[name] = {**self.records.get(name, {}), **facts}
        self._write()

    def forget(self, name: str) -> None:
        """A step that is to be done as if for the first time."""
        self.records.pop(name, None)
        self._write()

    def _write(self) -> None:
        partial = self._path.with_name(f".{self._path.name}.partial")
        content = {"words": self._words, "steps": self.records}
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)


def last_words(folder: Path) -> list[str]:
    """Arguments and overrides of the last run in a folder."""
    return list((read_json(folder / STATE_FILE) or {}).get("words", []))


def is_done(plan: Plan, step: Step, record: Record | None) -> bool:
    """Whether the step ended well and what it made is still there and whole."""
    return record is not None and record["status"] == "done" and not missing_outputs(plan, step)


def missing_outputs(plan: Plan, step: Step) -> list[str]:
    """Outputs that are not there or not whole: of a stage, those that a later step reads."""
    names = {"run", *plan.needed[step.name]} if step.is_stage else set(step.outputs)
    return [
        name
        for name, output in step.outputs.items()
        if name in names and not is_complete(output.kind, output.path)
    ]


def changes(step: Step, record: Record, *, is_finished: bool) -> list[str]:
    """How a step differs from what was done of it, in lines that say what must hold.

    A step that was cut may be told other things: it goes on by its own rules. What it reads must
    be the same in either case. Outputs count as they were when the step ended.
    """
    lines = _changed_keys(masked_tree(step.given), record["given"]) if is_finished else []
    for name, path in step.inputs.items():
        made_of = record["inputs"].get(name)
        if made_of is None and not is_finished:
            continue
        if path.exists() and fingerprint(path) != made_of:  # what is gone is made again first
            lines.append(f"{name} must be what it was made of, got other contents in {path}")
    for name, was in record.get("outputs", {}).items() if is_finished else ():
        output = step.outputs.get(name)
        if output and fingerprint_output(output.kind, output.path) != was:
            lines.append(f"{output.path} must be what it made, got other contents")
    return lines


def fingerprints(plan: Plan, step: Step) -> dict[str, str]:
    """Of the outputs that are whole."""
    return {
        name: fingerprint_output(output.kind, output.path)
        for name, output in step.outputs.items()
        if is_complete(output.kind, output.path)
    }


def input_fingerprints(step: Step) -> dict[str, str]:
    """Of all that a step reads, taken just before it runs."""
    return {name: fingerprint(path) for name, path in step.inputs.items() if path.exists()}


@contextmanager
def locked(plan: Plan) -> Iterator[int]:
    """Hold the recipe's folder; gives the lock's descriptor, which a step's processes inherit.

    So a folder stays locked while a launcher lives whose `triptych run` was killed.

    Raises:
        ValueError: another run holds it.
    """
    plan.dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(plan.dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 64, 0).decode().strip()
            raise ValueError(
                f"{plan.dir}: must not be in use, got a run with process id {holder}; wait for it, "
                "or name another folder with --dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def aside(plan: Plan, name: str) -> Path | None:
    """Move a step's folder out of the way, to aside/NAME-N; gives where to, if there was one."""
    folder = plan.steps[name].folder
    if not folder.exists():
        return None
    place = plan.dir / "aside"
    place.mkdir(exist_ok=True)
    number = 1
    while (place / f"{name}-{number}").exists():
        number += 1
    folder.rename(place / f"{name}-{number}")
    return place / f"{name}-{number}"


def _changed_keys(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    return [
        f"{key} must be that of the finished step ({_told(old, key)}), got {_told(new, key)}"
        for key in dict.fromkeys([*old, *new])
        if not key.startswith(UNCOUNTED) and _plain(old.get(key)) != _plain(new.get(key))
    ]


def _told(given: dict[str, Any], key: str) -> str:
    return str(given[key]) if key in given else "its default"


def _plain(value: Any) -> Any:
    """As it reads after JSON."""
    return json.loads(json.dumps(value, default=str))
