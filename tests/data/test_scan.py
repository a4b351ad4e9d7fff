import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.data.chats import chat, encoded_image, make_shards
from triptych_data.sample import dump_json
from triptych_data.shards import scan
from triptych_data.shards.index import index_paths, read_index, write_index
from triptych_data.shards.reader import Shards
from triptych_data.shards.scan import build_index, index_or_verify, index_shards
from triptych_data.shards.verify import verify_shards
from triptych_data.storage.open import Storage

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def write_tar(path: Path, members: list[tuple[str, bytes | None]], tar_format: int = 1) -> Path:
    """Members with content, and directories for those without."""
    with tarfile.open(path, "w", format=tar_format) as sink:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if data is None else (b"0", len(data))
            sink.addfile(info, io.BytesIO(data or b""))
    return path


def text_chat() -> bytes:
    return dump_json(chat())


def fields(shards: Shards) -> list[dict[str, bytes]]:
    """All samples as webdataset has them: by the suffixes of their members."""
    samples = []
    for index in shards.indexes:
        for row in range(index.num_samples):
            members = shards.read_members(len(samples))
            samples.append(dict(zip(index.names(row), map(bytes, members), strict=True)))
    return samples


LAYOUTS = {
    "captions": {"jpg": encoded_image(), "txt": b"a cat"},
    "classes": {"png": encoded_image(kind="PNG"), "cls": b"7"},
    "records": {"webp": encoded_image(kind="WEBP"), "json": b'{"caption": "a cat", "id": 3}'},
    "films": {"mp4": b"\0\0\0\x18ftyp" * 99, "json": b'{"seconds": 1}', "txt": b"a film"},
    "speech": {"wav": b"RIFF" + bytes(900), "flac": b"fLaC" + bytes(99), "txt": b"hello"},
    "pairs": {"left.png": b"left", "right.png": b"right", "0.jpg": b"0", "meta.json": b"{}"},
    "empty": {"txt": b"", "jpg": b"x"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_webdataset_writes_is_read_as_webdataset_reads_it(tmp_path, name):
    pattern = str(tmp_path / "x-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as sink:
        for i in range(8):
            extra = {"txt": str(i).encode()} if "txt" in LAYOUTS[name] else {}
            sink.write({"__key__": f"folder.v1/{name}_{i}", **LAYOUTS[name], **extra})
    tars = sorted(tmp_path.glob("*.tar"))
    for _ in index_shards(tars, layout="members"):
        pass
    shards = Shards.open(tmp_path)
    theirs = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))
    assert [shards.keys(i) for i in range(8)] == [sample["__key__"] for sample in theirs]
    assert fields(shards) == [
        {name: data for name, data in sample.items() if not name.startswith("__")}
        for sample in theirs
    ]
    assert verify_shards(tmp_path).ok


def test_members_are_no_chats(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [("a.jpg", encoded_image()), ("a.txt", b"a cat")])
    with pytest.raises(ValueError, match=r"got a\.jpg; .* make chats .* triptych-data shard"):
        build_index(tar)
    write_index(tar, build_index(tar, "members"))
    with pytest.raises(
        ValueError, match=r"x\.tar: sample a: must be a chat .* triptych-data shard"
    ):
        Shards.open(tar).read(0)


@pytest.mark.parametrize("tar_format", FORMATS)
def test_one_pass_reads_every_byte_once(tmp_path, monkeypatch, tar_format):
    """Front to back, so that a pipe or a slow disk serves as well."""
    folder = "d" * (30 if tar_format == tarfile.USTAR_FORMAT else 300)
    members = [
        member
        for i in range(30)
        for member in [(f"{folder}/{i}.jpg", bytes(2000)), (f"{folder}/{i}.txt", b"x")]
    ]
    tar = write_tar(tmp_path / "x.tar", [(folder, None), *members], tar_format)
    read, opened = [], Path.open

    class Watched(io.BufferedReader):
        def read(self, size: int = -1) -> bytes:
            read.append((self.tell(), data := super().read(size)))
            return data

    def watch(path: Path, *args: object, **options: object) -> object:
        return Watched(io.FileIO(path)) if path == tar else opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", watch)
    index = build_index(tar, "members")
    monkeypatch.undo()
    read = [(offset, data) for offset, data in read if data]
    assert b"".join(data for _, data in read) == tar.read_bytes()
    assert [offset for offset, _ in read] == sorted(offset for offset, _ in read)
    assert index.num_samples == 30


def energon_offsets(tar: Path) -> bytes:
    """Energon's rule as we read it: where the key of regular files changes, the offset of the
    first header, in the end the offset after the last member; unsigned 64-bit little-endian.

    A key is a path up to the first dot of the file's name; files without a dot and `__meta__` have
    none. (Hidden files in folders are left out here: Energon takes the folder for their key.)
    """
    offsets, last = [], None
    with tarfile.open(tar, "r:") as archive:
        for info in archive:
            folder, slash, file = info.name.rpartition("/")
            stem, dot, _ = file.partition(".")
            skipped = info.name.startswith("__meta__/") or not (stem and dot)
            if info.isreg() and not skipped and folder + slash + stem != last:
                offsets.append(info.offset)
                last = folder + slash + stem
        offsets.append(archive.offset)
    return np.array(offsets, dtype="<u8").tobytes()


@pytest.mark.parametrize("tar_format", FORMATS)
def test_idx_is_energons_to_the_byte(tmp_path, tar_format):
    long = "n" * (60 if tar_format == tarfile.USTAR_FORMAT else 160)
    members = [
        ("README", b"about"),
        ("__meta__/info.json", b"{}"),
        ("./a", None),
        ("./a/1.jpg", b"1"),
        ("./a/1.txt", b"one"),
        (f"./v1.0/{long}.txt", b"two"),
        (".DS_Store", b"mac"),
        (f"./v1.0/{long}.left.png", b"2"),
        ("./a/3.txt", b"three"),
        ("NOTES", b"after the last"),
    ]
    tar = write_tar(tmp_path / "x.tar", members, tar_format)
    write_index(tar, build_index(tar, "members"))
    assert index_paths(tar)[0].read_bytes() == energon_offsets(tar)
    assert [Shards.open(tar).keys(i) for i in range(3)] == ["./a/1", f"./v1.0/{long}", "./a/3"]
    ours = make_shards(tmp_path).shards[0]
    assert index_paths(ours)[0].read_bytes() == energon_offsets(ours)


def test_every_byte_is_under_a_checksum(tmp_path):
    """Also files before, between and after samples, which belong to none."""
    members = [("README", b"x" * 600), ("a.txt", b"a"), ("d", None), ("b.txt", b"b"), ("END", b"e")]
    tar = write_tar(tmp_path / "x.tar", members)
    write_index(tar, build_index(tar, "members"))
    data = tar.read_bytes()
    for offset in range(0, len(data), 97):
        tar.write_bytes(data[:offset] + bytes([data[offset] ^ 16]) + data[offset + 1 :])
        assert not verify_shards([tar]).ok, offset


REFUSED = {
    "members of one sample must lie side by side, got 'a' again": [
        ("a.jpg", b"1"),
        ("b.jpg", b"1"),
        ("a.txt", b"1"),
    ],
    "a member must be there once, got a.jpg and a.JPG": [("a.jpg", b"1"), ("a.JPG", b"2")],
    "got v1.0_img.jpg; keep dots out of keys": [("v1.0_img.jpg", b"1"), ("v1.1_img.jpg", b"1")],
    "got a..jpg; keep dots out of keys": [("a..jpg", b"1")],
    "must hold a sample, got none": [("README", b"1"), ("d", None)],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_readers_would_take_differently_is_refused(tmp_path, message):
    tar = write_tar(tmp_path / "x.tar", REFUSED[message])
    with pytest.raises(ValueError) as error:
        build_index(tar, "members")
    assert str(error.value).startswith(f"{tar}: ") and message in str(error.value)


class Bomb:
    """What a pickle may do when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pyd", "pth", "pt", "PKL", "pt.0", "x.pkl"])
@pytest.mark.parametrize("layout", ["chat", "members"])
def test_pickles_are_refused_and_never_loaded(tmp_path, suffix, layout):
    bomb = pickle.dumps(Bomb(tmp_path / "boom"))
    tar = write_tar(tmp_path / "x.tar", [("a.json", text_chat()), (f"a.{suffix}", bomb)])
    with pytest.raises(
        ValueError, match=rf"sample a: .* got a\.{suffix}, a pickle, which runs code"
    ):
        build_index(tar, layout)
    assert not (tmp_path / "boom").exists()


def test_samples_are_bounded(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "x.tar", [("a.txt", bytes(5000)), ("a.jpg", bytes(5000))])
    monkeypatch.setattr(scan, "SAMPLE_LIMIT", 9000)
    with pytest.raises(ValueError, match=r"x\.tar: byte 0: a sample must have at most 9000 bytes"):
        build_index(tar, "members")


def test_fields_are_kinds_and_not_numbers(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [(f"a.f{i}.txt", b"x") for i in range(257)])
    with pytest.raises(ValueError, match=r"at most 256 kinds of members, got 257"):
        build_index(tar, "members")


@pytest.mark.parametrize(
    "text", [b"[" * 10_000, b'{"a": NaN}', b'{"messages": 1, "messages": 2}', rb'{"a": "\ud800"}']
)
def test_hostile_json_in_a_chat_is_refused(tmp_path, text):
    tar = write_tar(tmp_path / "x.tar", [("a.json", text)])
    with pytest.raises(ValueError, match=r"x\.tar: sample a: must be valid JSON"):
        build_index(tar)


def test_hostile_json_under_a_true_index_is_refused_when_read(tmp_path):
    """An index vouches for bytes, not for what they do to a reader."""
    tar = write_tar(tmp_path / "x.tar", [("a.json", text_chat())])
    good = build_index(tar)
    for text in (b"[" * 10_000, b'{"messages": NaN}'):
        write_tar(tar, [("a.json", text)])
        index = build_index(tar, "members")
        forged = type(good)(
            **{name: getattr(index, name) for name in good.__slots__ if name != "layout"},
            layout="chat",
        )
        write_index(tar, forged)
        with pytest.raises(ValueError, match=r"must fit its fingerprint"):
            Shards.open(tar)
        shards = Shards._from((tar,), (forged,), Storage())
        for read in (shards.read, shards.read_json):
            with pytest.raises(ValueError, match=r"x\.tar: sample a: must be valid JSON"):
                read(0)


def test_an_index_that_exists_is_compared(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [("a.txt", b"one"), ("a.jpg", b"1")])
    assert index_or_verify(tar, layout="members")[1]
    index, written = index_or_verify(tar)
    assert not written and index.layout == "members", "the layout is the index's"
    data = tar.read_bytes().replace(b"one", b"two")
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.tar: the shard must be as it was indexed"):
        index_or_verify(tar)
    assert index_or_verify(tar, overwrite=True, layout="members")[1]
    assert bytes(Shards.open(tar).read_members(0)[0]) == b"two"
    assert read_index(tar).layout == "members"


def test_urls_and_commands_are_not_indexed():
    with pytest.raises(ValueError, match=r"must be a local file to be indexed, got a URL"):
        index_or_verify("http://host/x.tar")


def test_workers_index_the_same(tmp_path):
    tars = [
        write_tar(tmp_path / f"{i}.tar", [(f"{i}.json", text_chat()), (f"{i}.txt", b"kept out")])
        for i in range(3)
    ]
    prints = [
        [built.fingerprint for _, (built, _) in index_shards(tars, num_workers=n, overwrite=True)]
        for n in (1, 2)
    ]
    assert prints[0] == prints[1] and len(set(prints[0])) == 3
    assert json.loads(bytes(Shards.open(tmp_path).read_members(1)[0])) == chat()
