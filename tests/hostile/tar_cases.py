"""Tars and shards: what would leave the folder, run, or lie about where things are."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from tests.hostile.case import Case, Payload, canary, write_tar, writer
from triptych_data.shards import index as index_module
from triptych_data.shards.index import index_paths, read_index, write_index
from triptych_data.shards.write import write_shards

CHAT = json.dumps(
    {
        "messages": [
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": "A cat."},
        ]
    }
).encode()
SCAN = ("index", "shard")


def tar_cases() -> Iterator[Case]:
    for name, change in {
        "traversal": {"name": "../../escaped.json"},
        "absolute": {"name": "/tmp/escaped.json"},
        "control-characters": {"name": "a\n\x1b[2J.json"},
        "symlink": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        "hard-link": {"type": tarfile.LNKTYPE, "linkname": "../../../etc/passwd"},
        "character-device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
        "block-device": {"type": tarfile.BLKTYPE, "devmajor": 8},
        "fifo": {"type": tarfile.FIFOTYPE},
        "sparse": {"type": b"S"},
        "long-name": {"name": "a" * 70_000 + ".json"},
        "pax-size": {"pax_headers": {"size": "9" * 18}},
        "pax-negative-size": {"pax_headers": {"size": "-512"}},
    }.items():
        yield Case(f"tar-{name}", _with_member(change), SCAN)
    for name, data in {
        "size-of-2-to-the-63": lambda: _sized(b"\x80" + (2**63).to_bytes(11, "big")),
        "size-negative": lambda: _sized(b"\xff" * 12),
        "size-over-the-end": lambda: _sized(b"77777777777\0"),
        "endless-headers": _endless,
        "hidden-behind-zeros": _hidden,
        "gzip-in-a-tar's-name": lambda: gzip.compress(_hidden()),
        "many-members": _many,
        "huge-pax": _huge_pax,
    }.items():
        yield Case(f"tar-{name}", writer("a.tar", data), SCAN)
    for suffix, data in PICKLES.items():
        yield Case(f"pickle.{suffix}", _with_pickle(suffix, data), SCAN, inert=True)


def index_cases() -> Iterator[Case]:
    doors = ("read", "verify", "preview")
    for name, lie in LIES.items():
        yield Case(f"index-{name}", _lying(lie), doors)


def _with_member(change: dict) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        info = tarfile.TarInfo("b.json")
        for key, value in change.items():
            setattr(info, key, value)
        return write_tar(
            folder / "a.tar", [("a.json", CHAT), (info, b"" if info.type != b"0" else CHAT)]
        )

    return make


def _with_pickle(suffix: str, data: Callable[[], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return write_tar(folder / "a.tar", [("a.json", CHAT), (f"a.{suffix}", data())])

    return make


def _pickle() -> bytes:
    return pickle.dumps(Payload())


def _numpy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Payload()], dtype=object), allow_pickle=True)
    return file.getvalue()


def _torch() -> bytes:
    file = io.BytesIO()
    torch.save({"weight": Payload()}, file)
    return file.getvalue()


def _zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../escaped.py", f"open({canary()!r}, 'w')")
    return file.getvalue()


PICKLES = {
    **dict.fromkeys(("pyd", "pkl", "pickle", "joblib", "dill", "ten", "mp", "bin"), _pickle),
    **dict.fromkeys(("pth", "pt", "ckpt"), _torch),
    **dict.fromkeys(("npy", "npz"), _numpy),
    "zip": _zipped,
    "py": lambda: f"open({canary()!r}, 'w')".encode(),
}


def _tar_bytes(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _sized(field: bytes) -> bytes:
    """A tar whose first header says another size, its checksum set right."""
    block = bytearray(_tar_bytes(("a.json", CHAT)))
    block[124:136] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


def _endless() -> bytes:
    """100,000 extended headers one behind another, for no member."""
    info = tarfile.TarInfo("x")
    record = info.create_pax_header({**info.get_info(), "pax_headers": {"a": "b"}}, "utf-8")
    return tarfile.TarInfo.create_pax_global_header({"a": "b"}) * 100_000 + record


def _hidden() -> bytes:
    return _tar_bytes(("a.json", CHAT)) + _tar_bytes(("../../b.json", CHAT))


def _many() -> bytes:
    """One sample of 100,000 members."""
    header = bytearray(_tar_bytes(("a.00000.jpg", b""))[:512])
    blocks = [_tar_bytes(("a.json", CHAT))[:1024]]
    for number in range(100_000):
        header[:11] = b"a.%05d.jpg" % number
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        blocks.append(bytes(header))
    return b"".join(blocks) + bytes(1024)


def _huge_pax() -> bytes:
    """An extended header of 64 MiB."""
    info = tarfile.TarInfo("a.json")
    return info.tobuf(tarfile.PAX_FORMAT)[:0] + info.create_pax_header(
        {**info.get_info(), "comment": "x" * (64 << 20)}, "utf-8"
    )


def _edit(**changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Columns that were changed by who also set the fingerprint right."""

    def lie(tar: Path) -> None:
        index = read_index(tar)
        new = {key: change(getattr(index, key)) for key, change in changes.items()}
        arrays = {key: new.get(key, getattr(index, key)) for key in index_module.DTYPES}
        facts = index_module._Facts(
            *(new.get(name, getattr(index, name)) for name in index_module._Facts._fields)
        )
        write_index(tar, replace(index_module._sealed(arrays, facts)))

    return lie


def _columns(data: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda tar: index_paths(tar)[1].write_bytes(data()) and None


LIES: dict[str, Callable[[Path], None]] = {
    "offsets-outside": _edit(member_offset=lambda a: a + (1 << 40)),
    "offsets-negative": _edit(member_offset=lambda a: a - (1 << 20)),
    "sizes-of-exabytes": _edit(member_size=lambda a: a + (1 << 60)),
    "samples-beyond-the-end": _edit(
        sample_start=lambda a: a * (1 << 30), tar_bytes=lambda n: n << 40
    ),
    "tar-of-2-to-the-62": _edit(tar_bytes=lambda n: 1 << 62),
    "suffixes-that-lead-out": _edit(suffixes=lambda s: ("../../escaped",) * len(s)),
    "media-without-end": _edit(media_start=lambda a: a + (1 << 40)),
    "other-hashes": _edit(sample_hash=lambda a: a ^ np.uint64(1)),
    "columns-a-pickle": _columns(_pickle),
    "columns-of-2-to-the-63": _columns(lambda: (2**63).to_bytes(8, "little") + b"{}"),
    "columns-deep": _columns(
        lambda: save({"a": np.zeros(1)}, metadata={"triptych": "[" * 10_000 + "]" * 10_000})
    ),
    "columns-claim-exabytes": _columns(
        lambda: _header(
            {"key_bytes": {"dtype": "U8", "shape": [1 << 60], "data_offsets": [0, 1 << 60]}}
        )
    ),
    "idx-of-garbage": lambda tar: index_paths(tar)[0].write_bytes(b"\xff" * 80) and None,
    "idx-empty": lambda tar: index_paths(tar)[0].write_bytes(b"") and None,
}


def _header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def _lying(lie: Callable[[Path], None]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "chats.jsonl").write_bytes(b"\n".join([CHAT] * 4) + b"\n")
        write_shards(folder / "chats.jsonl", folder / "shards", num_workers=1)
        (tar,) = (folder / "shards").glob("*.tar")
        lie(tar)
        return tar

    return make
