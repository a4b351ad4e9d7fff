"""Weights whose headers lie, whose indexes lead out, or that run when they are loaded."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.hostile.case import Case, Payload, canary
from tests.tiny import SHIPPED

BOTH = ("model", "average")
F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def weight_cases() -> Iterator[Case]:
    for name, data in {
        "header-of-2-to-the-63": lambda: (2**63).to_bytes(8, "little") + bytes(100),
        "header-of-90-MiB": lambda: (
            (90 << 20).to_bytes(8, "little") + b"{" + b" " * ((90 << 20) - 2) + b"}"
        ),
        "header-deep": lambda: _file(b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
        "overlap": lambda: _stored({"a": F32, "b": {**F32, "data_offsets": [8, 24]}}, 24),
        "beyond-the-end": lambda: _stored(
            {"a": {**F32, "data_offsets": [1 << 40, (1 << 40) + 16]}}, 16
        ),
        "backwards": lambda: _stored({"a": {**F32, "data_offsets": [16, 0]}}, 16),
        "negative": lambda: _stored({"a": {**F32, "data_offsets": [-16, 0]}}, 16),
        "shape-overflows": lambda: _stored({"a": {**F32, "shape": [1 << 62, 4, 4]}}, 16),
        "shape-negative": lambda: _stored({"a": {**F32, "shape": [-2, -2]}}, 16),
        "shape-not-a-number": lambda: _file(
            b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}'
        ),
        "shape-of-text": lambda: _stored({"a": {**F32, "shape": ["4"]}}, 16),
        "shape-1e400": lambda: _file(
            b'{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 16]}}'
        ),
        "dtype-unknown": lambda: _stored({"a": {**F32, "dtype": "__import__"}}, 16),
        "offsets-of-three": lambda: _stored({"a": {**F32, "data_offsets": [0, 8, 16]}}, 16),
        "no-dictionary": lambda: _file(b"[1, 2]"),
        "name-twice": lambda: _file(b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2)),
        "metadata-no-text": lambda: _stored({"__metadata__": {"a": [1]}, "a": F32}, 16),
        "a-pickle": lambda: pickle.dumps(Payload()),
        "empty": lambda: b"",
    }.items():
        yield Case(f"weights-{name}", _folder("model.safetensors", data), BOTH)
    for name, target in {
        "parent": lambda: "../../secret.safetensors",
        "absolute": canary,
        "device": lambda: "/dev/zero",
        "number": lambda: 7,
    }.items():
        yield Case(f"weights-index-{name}", _indexed(target), BOTH)
    yield Case(
        "weights-index-deep", _folder("model.safetensors.index.json", lambda: b"[" * 10_000), BOTH
    )
    for name, data in {
        "shell": lambda: _zipped(Payload()),
        "eval": lambda: _raw(f"cbuiltins\neval\n(V open({canary()!r}, 'w')\ntR."),
        "build": lambda: _raw(f"cos\nsystem\n(Vtouch {canary()}\ntR."),
        "torch-global": lambda: _raw("ctorch.hub\nload\n(Vevil/kernel\nVmodel\ntR."),
        "zip-bomb": _zip_bomb,
        "legacy": lambda: pickle.dumps(Payload(), protocol=2),
        "storage-of-exabytes": lambda: _lying_storage(),
    }.items():
        yield Case(f"pytorch-{name}", _folder("pytorch_model.bin", data), ("average",))
    yield Case("universal-pickle", _universal, ("average",))


def _file(text: bytes, data: bytes = bytes(16)) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def _stored(header: dict, size: int) -> bytes:
    return _file(json.dumps(header).encode(), bytes(size))


def _folder(name: str, data: Callable[[], bytes]) -> Callable[[Path], Path]:
    """The tiny model's folder with that file for weights, beside a sound one."""

    def make(folder: Path) -> Path:
        for each in ("input", "other"):
            shutil.copytree(SHIPPED, folder / each)
        (folder / "input" / name).write_bytes(data())
        save_file({"a": torch.zeros(4)}, folder / "other/model.safetensors")
        return folder / "input"

    return make


def _indexed(target: Callable[[], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_file({"a": torch.zeros(4)}, folder / "secret.safetensors")
        inside = folder / "models/here"
        inside.mkdir(parents=True)
        index = json.dumps({"weight_map": {"a": target()}}).encode()
        return _folder("model.safetensors.index.json", lambda: index)(inside)

    return make


def _zipped(value: object) -> bytes:
    file = io.BytesIO()
    torch.save({"a": value}, file)
    return file.getvalue()


def _raw(program: str) -> bytes:
    """A zip of torch.save whose pickle is that program."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def _zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"(" * (1 << 28))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def _lying_storage() -> bytes:
    """A tensor of 2^60 elements over a storage of four."""
    file = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, file)
    return file.getvalue().replace(b"K\x04", b"K\x7f")


def _universal(folder: Path) -> Path:
    path = folder / "input"
    (path / "zero/a").mkdir(parents=True)
    (path / "zero/a/fp32.pt").write_bytes(_zipped(Payload()))
    shutil.copytree(SHIPPED, folder / "other")
    save_file({"a": torch.zeros(4)}, folder / "other/model.safetensors")
    return path
