"""Folders of runs from elsewhere: checkpoints to go on from, records to draw a report of."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.hostile.case import Case, Payload, canary
from triptych_core.checkpoint.folders import make_room, unfinished_folder
from triptych_core.checkpoint.manifest import FILE, _digest
from triptych_core.checkpoint.payload import Stretch
from triptych_core.checkpoint.save import Snapshot, finish, write_share

STATE = {
    "step": 3,
    "world_size": 2,
    "data": {},
    "trainable_parameters": {"layer.weight": "(3, 4)", "layer.bias": "(3,)"},
    "frozen_parameters": {},
    "buffers": {},
}
RANK = "rank-00000.safetensors"


def run_cases() -> Iterator[Case]:
    for name, change in CHANGES.items():
        yield Case(f"checkpoint-{name}", _checkpoint(change), ("resume", "average"))
    for name, lines in {
        "markup": {"answer": "</script><img src=x onerror=TRIPTYCH()>"},
        "deep": None,
    }.items():
        yield Case(f"report-{name}", partial(_run, lines), ("report",), inert=True)


def _checkpoint(change: Callable[[Path], None]) -> Callable[[Path], Path]:
    """A run with one checkpoint, changed by who also set the manifest right."""

    def make(folder: Path) -> Path:
        run = folder / "run"
        unfinished = unfinished_folder(run, 3)
        make_room(unfinished, 1)
        stretches = [
            Stretch("layer.weight", "master", 0, torch.zeros(12)),
            Stretch("layer.bias", "master", 0, torch.zeros(3)),
        ]
        snapshot = Snapshot(unfinished, 0, stretches, {}, b"generators", dict(STATE), 2)
        change(finish(snapshot, write_share(snapshot)))
        return run

    return make


def _manifest(path: Path, **records: dict[str, Any]) -> None:
    """Records beside those that are there, under a checksum that fits."""
    import hashlib

    files = json.loads((path / FILE).read_bytes())["files"]
    for name in files:
        data = (path / name).read_bytes()
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    files |= records
    (path / FILE).write_text(json.dumps({"files": files, "sha256": _digest(files)}))


def _with_file(name: str, data: Callable[[], bytes], path: Path) -> None:
    (path / name).write_bytes(data())
    _manifest(path)


def _with_state(change: dict[str, Any], path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    _with_file("state.json", lambda: json.dumps(state | change).encode(), path)


def _with_record(name: Callable[[], str], record: Any, path: Path) -> None:
    _manifest(path, **{name(): record})


def _linked(path: Path) -> None:
    (path / RANK).unlink()
    (path / RANK).symlink_to("/etc/passwd")
    _manifest(path)


def _header(entries: dict[str, Any]) -> bytes:
    text = json.dumps({"__metadata__": {"scalars": "{}"}, **entries}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


_F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
_SHA = {"bytes": 0, "sha256": "0" * 64}
CHANGES: dict[str, Callable[[Path], None]] = {
    "manifest-leads-out": partial(_with_record, lambda: "../../../../etc/passwd", _SHA),
    "manifest-leads-away": partial(_with_record, canary, _SHA),
    "manifest-of-a-device": partial(_with_record, lambda: "/dev/zero", {**_SHA, "bytes": 0}),
    "manifest-negative": partial(_with_record, lambda: RANK, {**_SHA, "bytes": -1}),
    "manifest-of-numbers": partial(_with_record, lambda: RANK, 7),
    "manifest-deep": lambda path: (path / FILE).write_text("[" * 10_000) and None,
    "manifest-a-pickle": lambda path: (path / FILE).write_bytes(pickle.dumps(Payload())) and None,
    "rank-a-pickle": partial(_with_file, RANK, lambda: pickle.dumps(Payload())),
    "rank-header-of-2-to-the-63": partial(_with_file, RANK, lambda: (2**63).to_bytes(8, "little")),
    "rank-header-deep": partial(
        _with_file, RANK, lambda: (20_000).to_bytes(8, "little") + b"[" * 20_000
    ),
    "rank-shape-of-exabytes": partial(
        _with_file, RANK, lambda: _header({"layer.weight|master|0": {**_F32, "shape": [1 << 60]}})
    ),
    "rank-names-no-place": partial(_with_file, RANK, lambda: _header({"layer.weight": _F32})),
    "rank-begins-at-text": partial(
        _with_file, RANK, lambda: _header({"layer.weight|master|os.system": _F32})
    ),
    "rank-begins-below-zero": partial(
        _with_file, RANK, lambda: _header({"layer.weight|master|-8": _F32})
    ),
    "rank-linked-away": _linked,
    "state-deep": partial(_with_file, "state.json", lambda: b"[" * 10_000),
    "state-of-numbers": partial(_with_file, "state.json", lambda: b"[1, 2]"),
    "state-empty": partial(_with_file, "state.json", lambda: b"{}"),
    "state-step-of-text": partial(_with_state, {"step": "os.system"}),
    "state-step-not-a-number": partial(_with_state, {"step": float("nan")}),
    "state-shapes-of-text": partial(
        _with_state, {"trainable_parameters": {"layer.weight": "(os.system,)"}}
    ),
}


def _run(change: dict[str, Any] | None, folder: Path) -> Path:
    """A run with a question, its answer and a configuration that would be markup."""
    run = folder / "run"
    run.mkdir()
    line = {"step": 1, "loss": 2.0, "lr": 0.1}
    text = json.dumps(line) if change is not None else "[" * 10_000
    (run / "metrics.jsonl").write_text(text + "\n")
    evil = "</script><img src=x onerror=TRIPTYCH()>"
    (run / "config.yaml").write_text(f"run: {{name: '{evil}'}}\n")
    (run / "run.json").write_text(json.dumps({"command": evil, "versions": {"torch": evil}}))
    example = {
        "question": evil,
        "expected": evil,
        "answer": evil,
        "kind": evil,
        "images": [evil],
        "key": evil,
    }
    record = {"step": 1, "loss": 1.0, "score": 0.5, "examples": [example], "kinds": {evil: 0.5}}
    (run / "evaluation.jsonl").write_text(json.dumps(record) + "\n")
    return run
