"""Which samples a split holds: two splits that share one are no two splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triptych_data.sample import RawSample


def check_disjoint(dev: Sequence[str], test: Sequence[str]) -> None:
    """Raise ValueError if a sample of dev is in test: what is asked and its media, byte for byte.

    Keys do not tell: every writer begins at 0. Both splits are read once.
    """
    from triptych_data.shards.reader import Shards

    dev_shards, test_shards = Shards.open(dev), Shards.open(test)
    in_dev = dict(zip((i.fingerprint for i in dev_shards.indexes), dev_shards.paths, strict=True))
    for index, path in zip(test_shards.indexes, test_shards.paths, strict=True):
        if index.fingerprint in in_dev:
            raise ValueError(
                f"--test: must hold no shard of --dev, got {path}, which is "
                f"{in_dev[index.fingerprint]}; choose on one split and report on another"
            )
    known = {_digest(sample): sample.where for sample in dev_shards}
    shared = [
        (sample.where, known[digest])
        for sample in test_shards
        if (digest := _digest(sample)) in known
    ]
    if shared:
        raise ValueError(
            f"--test: must share no sample with --dev, got {len(shared)} shared, the first "
            f"{shared[0][0]}, which is {shared[0][1]}; take them out of one"
        )


def identity_of_shards(paths: Sequence[str]) -> str:
    """Of their indexes, which hold checksums of all bytes."""
    from triptych_data.shards.reader import Shards

    return Shards.open(paths).fingerprint


def identity_of_model(path: Path) -> str:
    """Of a folder's files: the contents of small ones, size and time of weights."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if not file.is_file():
            continue
        stat = file.stat()
        small = stat.st_size < 1 << 24 and file.suffix != ".safetensors"
        what = file.read_bytes() if small else f"{stat.st_size} {stat.st_mtime_ns}".encode()
        digest.update(f"{file.name} {len(what)} ".encode() + what)
    return digest.hexdigest()


def _digest(sample: RawSample) -> bytes:
    """Of the chat, or text, and the media; other fields may say to which split it belongs."""
    asked = sample.json.get("messages", sample.json.get("text"))
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for medium in sample.media:
        digest.update(hashlib.sha256(medium).digest())
    return digest.digest()
