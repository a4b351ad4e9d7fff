import bz2
import gzip
import io
import lzma
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from triptych_data.shards import tar as tar_module
from triptych_data.shards.tar import BLOCK, DIRECTORY, END, FILE, header, padded, read_entries, walk


def a_tar(path: Path, members: list[tarfile.TarInfo], tar_format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as sink:
        for info in members:
            sink.addfile(info, io.BytesIO(bytes(info.size)) if info.isreg() else None)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 5, **pax: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.pax_headers = kind, size if kind == tarfile.REGTYPE else 0, pax
    return info


def refusal(path: Path) -> str:
    messages = set()
    for read in (walk, read_entries):
        with pytest.raises(ValueError) as error:
            list(read(path))
        messages.add(str(error.value))
    assert len(messages) == 1, "both ways of reading refuse alike"
    message = messages.pop()
    assert message.startswith(f"{path}: ")
    return message


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (tarfile.FIFOTYPE, "a FIFO"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"Z", "type 'Z'"),
    ],
)
def test_what_is_no_regular_file_is_refused(tmp_path, kind, name):
    message = refusal(a_tar(tmp_path / "x.tar", [member("a.txt"), member("b.txt", kind)]))
    assert f"byte 1024: member 'b.txt' must be a regular file, got {name}; write" in message


def test_sparse_members_of_pax_are_refused(tmp_path):
    sparse = member("a.txt", **{"GNU.sparse.major": "1", "GNU.sparse.name": "a.txt"})
    message = refusal(a_tar(tmp_path / "x.tar", [sparse], tarfile.PAX_FORMAT))
    assert "got a sparse file" in message


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd.txt", "../a.txt", "b/../../a.txt", "b/..", "a\nb.txt", "a\x1b[2J.txt"],
)
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name, tar_format):
    """Also in the extended headers, which replace a harmless name."""
    for prefix in ("", "x" * 150 + "/"):
        if prefix and name.startswith("/"):
            continue
        path = a_tar(tmp_path / "x.tar", [member(prefix + name)], tar_format)
        assert "must be a path inside the tar" in refusal(path)


def test_dots_that_lead_nowhere_are_fine(tmp_path):
    names = ["./a.txt", "a..b/c..txt", "größe.txt", "a b.txt", "x/./b.txt"]
    assert [m.name for m in walk(a_tar(tmp_path / "x.tar", list(map(member, names))))] == names


def test_huge_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "MEMBER_LIMIT", 1000)
    message = refusal(a_tar(tmp_path / "x.tar", [member("a.txt", size=1001)]))
    assert "member 'a.txt' must have at most 1000 bytes, got 1001" in message
    monkeypatch.undo()
    data = bytearray(header("a.txt", 0))
    data[124:136] = b"\x80" + (1 << 60).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:]) + 8 * 32)
    (tmp_path / "y.tar").write_bytes(bytes(data) + END)
    assert f"must have at most {1 << 32} bytes, got {1 << 60}" in refusal(tmp_path / "y.tar")


def test_compressed_tars_are_named_with_what_unpacks_them(tmp_path):
    plain = a_tar(tmp_path / "x.tar", [member("a.txt")]).read_bytes()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as sink:
        sink.writestr("a.txt", "a")
    cases = {
        "gzip; unpack it with: gunzip": gzip.compress(plain),
        "bzip2; unpack it with: bunzip2": bz2.compress(plain),
        "xz; unpack it with: unxz": lzma.compress(plain),
        "zip; unpack": archive.getvalue(),
        "zstd; unpack it with: unzstd": b"\x28\xb5\x2f\xfd" + bytes(600),
    }
    for advice, data in cases.items():
        (tmp_path / "x.tar.gz").write_bytes(data)
        assert (
            f"a shard must be a plain tar, whose samples can be read one by one, got {advice}"
            in (refusal(tmp_path / "x.tar.gz"))
        )
    named = a_tar(tmp_path / "y.tar", [member("BZh9.txt")])
    assert [m.name for m in walk(named)] == ["BZh9.txt"], "a name is not a compressed tar"


def test_a_bomb_of_compression_is_not_unpacked(tmp_path):
    """1 GB of zeros in 1 MB: refused by its first bytes."""
    (tmp_path / "x.tar").write_bytes(gzip.compress(bytes(1 << 26), 1) * 16)
    start = time.monotonic()
    refusal(tmp_path / "x.tar")
    assert time.monotonic() - start < 0.5


def extended(kind: bytes, content: bytes) -> bytes:
    block = bytearray(header("x", len(content)))
    block[156:157] = kind
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    return bytes(block) + content + bytes(padded(len(content)) - len(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nonsense", "must hold key=value records"),
        (b"99 path=a\n", "must hold key=value records"),
        (b"0 path=a\n", "must hold key=value records"),
        (b"9" * 5000 + b" path=a\n", "must hold key=value records"),
        (b"11 size=-1\n", "a pax size must be a number"),
        (b"%d size=%s\n" % (5014, b"9" * 5003), "a pax size must be a number"),
        (b"13 size=1e99\n", "a pax size must be a number"),
    ],
)
def test_damaged_extended_headers_are_refused(tmp_path, content, message):
    data = extended(b"x", content) + header("a.txt", 0) + END
    (tmp_path / "x.tar").write_bytes(data)
    assert message in refusal(tmp_path / "x.tar")


def test_extended_headers_are_few_and_short(tmp_path):
    cases = {
        "an extended header must be short and whole": extended(b"L", bytes(1 << 21)),
        "a member must have few extended headers": extended(b"L", b"a" * (1 << 20)) * 5,
        "an extended header must precede a member": extended(b"L", b"a"),
    }
    for message, data in cases.items():
        (tmp_path / "x.tar").write_bytes(data + END)
        assert message in refusal(tmp_path / "x.tar")


def test_many_pax_records_take_no_time(tmp_path):
    """Quadratic reading of the largest header took minutes."""
    content = b"6 a=b\n" * ((1 << 20) // 6)
    (tmp_path / "x.tar").write_bytes(extended(b"x", content) + header("a.txt", 0) + END)
    start = time.monotonic()
    assert [m.name for m in walk(tmp_path / "x.tar")] == ["a.txt"]
    assert time.monotonic() - start < 2


def test_entries_are_every_byte_of_the_tar(tmp_path):
    members = [member("d", tarfile.DIRTYPE), member("d/" + "n" * 200, size=700), member("e.txt")]
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = a_tar(tmp_path / "x.tar", members, tar_format)
        entries = list(read_entries(path))
        assert b"".join(entry.raw for entry in entries) == path.read_bytes()
        assert [entry.kind for entry in entries] == [DIRECTORY, FILE, FILE, END]
        assert [len(entry.content) for entry in entries] == [0, 700, 5, 0]
        assert [entry.member for entry in entries if entry.kind == FILE] == list(walk(path))


def test_a_walk_may_begin_at_any_header(tmp_path):
    path = a_tar(tmp_path / "x.tar", [member(f"{i}.txt") for i in range(5)])
    members = list(walk(path))
    assert list(walk(path, members[3].start)) == members[3:]
    with pytest.raises(ValueError, match="byte 1536: "):
        list(walk(path, members[1].start + BLOCK))
