"""What `triptych-data shard` may be given: records that lead out, never end or unpack for ever."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hostile.case import Case, canary, writer
from tests.hostile.image_cases import png

ANSWER = {"role": "assistant", "content": "A cat."}


def data_cases() -> Iterator[Case]:
    for name, source in {
        "pipe": lambda: f"pipe:touch {canary()}",
        "metadata-server": lambda: "http://169.254.169.254/latest/meta-data/",
        "ftp": lambda: "ftp://127.0.0.1/x.jpg",
        "passwd": lambda: "file:///etc/passwd",
        "parent": lambda: "../../../../../../etc/passwd",
        "absolute": lambda: "/etc/passwd",
        "canary": canary,
        "null-byte": lambda: "a.jpg\0.png",
        "zero-device": lambda: "/dev/zero",
        "data-uri-bomb": lambda: _data_uri(png(16_000, 16_000)),
    }.items():
        yield Case(f"medium-{name}", _medium(source), ("shard",))
    yield Case("medium-symlink", _linked, ("shard",))
    yield Case("medium-fifo", _piped, ("shard",))
    for name, data in {
        "100-MiB-line.jsonl": lambda: b'{"text": "' + b"a" * (100 << 20) + b'"}\n',
        "100-MiB-without-a-line.jsonl": lambda: b"[" * (100 << 20),
        "deep.jsonl": lambda: b'{"text": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n",
        "deep.json": lambda: b"[" * 10_000 + b"]" * 10_000,
        "deep-record.json": lambda: b'[{"text": ' + b"[" * 10_000 + b"]" * 10_000 + b"}]",
        "million-digits.jsonl": lambda: b'{"text": "a", "number": ' + b"9" * 1_000_000 + b"}\n",
        "key-twice.jsonl": lambda: b'{"text": "a", "text": "b"}\n',
        "million-parts.jsonl": lambda: _parts(1_000_000),
        "open-quote.csv": lambda: b'text\n"' + b"a\n" * (50 << 20),
        "utf-16.jsonl": lambda: '{"text": "a"}\n'.encode("utf-16"),
        "noise.parquet": lambda: b"PAR1" + os.urandom(10_000) + b"PAR1",
        "footer-of-2-GiB.parquet": lambda: (
            b"PAR1" + bytes(100) + (2**31 - 1).to_bytes(4, "little") + b"PAR1"
        ),
        "noise.arrow": lambda: b"ARROW1\0\0" + os.urandom(10_000) + b"ARROW1",
        "gzip-bomb.jsonl.gz": lambda: _packed(gzip.compress),
        "bzip2-bomb.jsonl.bz2": lambda: _packed(bz2.compress),
        "xz-bomb.jsonl.xz": lambda: _packed(lzma.compress),
        "gzip-noise.jsonl.gz": lambda: b"\x1f\x8b\x08" + os.urandom(1000),
    }.items():
        yield Case(f"records-{name}", writer(name, data), ("shard",))
    yield Case("folder-saved-elsewhere", _saved_elsewhere, ("shard",))
    yield Case("folder-metadata-that-leads-out", _metadata, ("shard",))
    yield Case("preview-markup", _markup, ("shard",), inert=True)


def _medium(source: Callable[[], str]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        content = [{"type": "image", "image": source()}, {"type": "text", "text": "What is it?"}]
        record = {"messages": [{"role": "user", "content": content}, ANSWER]}
        (folder / "chats.jsonl").write_text(json.dumps(record) + "\n")
        return folder / "chats.jsonl"

    return make


def _linked(folder: Path) -> Path:
    (folder / "a.jpg").symlink_to("/etc/passwd")
    return _medium(lambda: "a.jpg")(folder)


def _piped(folder: Path) -> Path:
    os.mkfifo(folder / "a.jpg")
    return _medium(lambda: "a.jpg")(folder)


def _data_uri(data: bytes) -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(data).decode()


def _parts(count: int) -> bytes:
    content = [{"type": "image", "image": "a.jpg"}] * count
    return json.dumps({"messages": [{"role": "user", "content": content}, ANSWER]}).encode()


def _packed(compress: Callable[[bytes], bytes]) -> bytes:
    """A record of 1 GiB in a few hundred kilobytes: whole streams may stand one behind another."""
    piece = compress(b" " * (64 << 20))
    return piece * 16 + compress(b'{"text": "a"}\n')


def _saved_elsewhere(folder: Path) -> Path:
    saved = folder / "saved"
    saved.mkdir()
    state = {"_data_files": [{"filename": "../../../../../../etc/passwd"}]}
    (saved / "state.json").write_text(json.dumps(state))
    (saved / "dataset_info.json").write_text("{}")
    return saved


def _metadata(folder: Path) -> Path:
    inside = folder / "photos"
    inside.mkdir()
    record = {"file_name": "../../../../../../etc/passwd", "text": "A cat."}
    (inside / "metadata.jsonl").write_text(json.dumps(record) + "\n")
    return inside


def _markup(folder: Path) -> Path:
    record = {"text": "</pre><script>TRIPTYCH()</script><img src=x onerror=TRIPTYCH()>"}
    (folder / "a.jsonl").write_text(json.dumps(record) + "\n")
    return folder / "a.jsonl"
