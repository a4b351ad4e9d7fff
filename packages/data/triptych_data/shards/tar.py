"""The tar container: headers that are the same bytes on every run, a walk that notices damage.

Python's `tarfile` takes a broken header in the middle for the end of the archive, and readers built
on it lose the rest in silence; here it is an error with the file and the offset.
Formats: POSIX.1-1988 ustar (written), plus GNU long names and pax headers (read). Nothing is ever
extracted; what an extractor could be harmed by is refused all the same, so that no index vouches
for it: links, devices, names that lead out of a folder, compressed archives.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

BLOCK = 512
END = bytes(2 * BLOCK)
"""Two zero blocks end an archive."""
FILE, DIRECTORY = b"0", b"5"
EXTENSIONS = (b"x", b"g", b"L", b"K")
"""pax header of one member, pax header of all that follow, GNU long name, GNU long link name."""
EXTENSION_LIMIT = 1 << 20
"""An extended header beyond 1 MiB is damage, not a name."""
MEMBER_LIMIT = 1 << 32
"""A member beyond 4 GiB, or an end marker as long, is no training sample: it is read as one."""
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
OTHER_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"S": "a sparse file",
    b"M": "a piece of a file in several volumes",
    b"V": "a volume label",
}
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
    b"PK\3\4": ("zip", "unzip, then tar --sort=name -cf"),
}
"""First bytes of what is often called a tar, its name, and what turns it into one."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar; `start` is the offset of its first header, `data` of its content."""

    name: str
    start: int
    data: int
    size: int

    @property
    def end(self) -> int:
        """Offset of the block after the content: where the next member's header starts."""
        return self.data + padded(self.size)


def padded(size: int) -> int:
    """`size` rounded up to whole 512-byte blocks."""
    return -(-size // BLOCK) * BLOCK


def header(name: str, size: int) -> bytes:
    """The 512-byte ustar header of a regular file, with constant owner, mode and time."""
    encoded = name.encode()
    assert len(encoded) <= 100 and 0 <= size < 8**11, (name, size)
    block = bytearray(BLOCK)
    block[: len(encoded)] = encoded
    block[100:108] = b"0000644\0"
    block[108:124] = b"0000000\0" * 2  # uid, gid
    block[124:136] = b"%011o\0" % size
    block[136:148] = b"%011o\0" % 0  # mtime
    block[148:156] = b" " * 8  # the checksum counts itself as spaces
    block[156:157] = FILE
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def walk(path: str | Path, start: int = 0) -> Iterator[Member]:
    """The regular files of a tar in order, from the header at `start`; contents are not read.

    Raises ValueError with file and offset for a header whose checksum is wrong, a member or end
    marker that is cut off, bytes after the end, an archive that is compressed, and members that
    are links, sparse or special files, over MEMBER_LIMIT or named to lie outside of a folder.
    """
    for entry in _entries(path, start, with_content=False):
        if entry.kind == FILE:
            yield entry.member


def read_entries(path: str | Path) -> Iterator["Entry"]:
    """Every byte of a tar, read once and front to back: its members and, last, its end marker.

    Directories come as well. Raises as `walk`.
    """
    return _entries(path, 0, with_content=True)


class Entry(NamedTuple):
    """A piece of a tar; `raw` are its bytes from the first header to the next entry."""

    member: Member
    kind: bytes
    """FILE, DIRECTORY or END, whose member has neither name nor content"""
    raw: bytes

    @property
    def content(self) -> memoryview:
        skip = self.member.data - self.member.start
        return memoryview(self.raw)[skip : skip + self.member.size]


def _entries(path: str | Path, start: int, *, with_content: bool) -> Iterator[Entry]:
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        tar = _Tar(path, file, size)
        file.seek(start)
        while entry := tar.entry(start):
            member, kind, headers = entry
            if member.end > size:
                raise tar.damage(
                    start,
                    f"member {member.name} must end by byte {member.end}",
                    f"a file of {size} bytes",
                )
            content = b""
            if with_content:
                content = file.read(member.end - member.data)
            else:
                file.seek(member.end)
            yield Entry(member, kind, headers + content)
            start = member.end
        yield Entry(Member("", start, start, 0), END, tar.tail(start) if with_content else b"")


@dataclass(frozen=True, slots=True)
class _Tar:
    """A tar being read front to back; the file stands where the next block is."""

    path: str | Path
    file: BinaryIO
    size: int

    def entry(self, start: int) -> tuple[Member, bytes, bytes] | None:
        """The file or directory whose (extended) header is at `start`, its type and its headers.

        None at the end marker.
        """
        offset, headers, fields = start, [], dict[str, str]()
        while (block := self.block(offset)) and (kind := block[156:157]) in EXTENSIONS:
            content = self.extension(block, offset)
            headers += [block, content]
            if kind == b"x":
                fields |= self.pax_fields(content[: self.number(block, offset)], start)
            elif kind == b"L":
                fields["path"] = _text(content)
            offset += BLOCK + len(content)
            if offset - start > 4 * EXTENSION_LIMIT:
                raise self.damage(start, "a member must have few extended headers", f"{offset}")
        if block is None:
            if offset != start:
                raise self.damage(start, "an extended header must precede a member", "the end")
            return None
        name = fields.get("path") or _block_name(block)
        size = int(fields["size"]) if "size" in fields else self.number(block, offset)
        if kind in (b"\0", b"7"):  # the types of old tars and of contiguous files
            kind = DIRECTORY if name.endswith("/") else FILE
        sparse = any(field.startswith("GNU.sparse") for field in fields)
        self.refuse_unsafe(name, b"S" if sparse else kind, size, offset)
        member = Member(name, start, offset + BLOCK, size if kind == FILE else 0)
        return member, kind, b"".join([*headers, block])

    def refuse_unsafe(self, name: str, kind: bytes, size: int, offset: int) -> None:
        if kind not in (FILE, DIRECTORY):
            raise self.damage(
                offset,
                f"member {name!r} must be a regular file",
                OTHER_TYPES.get(kind, f"type {kind.decode('latin-1')!r}"),
                "write the tar without links, sparse and special files (tar -h --hard-dereference)",
            )
        if name.startswith("/") or ".." in name.split("/") or CONTROL.search(name):
            raise self.damage(
                offset,
                "a member's name must be a path inside the tar, without control characters",
                repr(name),
                "it may be meant to overwrite other files: do not unpack it; write the tar anew",
            )
        if size > MEMBER_LIMIT:
            raise self.damage(
                offset,
                f"member {name!r} must have at most {MEMBER_LIMIT} bytes",
                f"{size}",
                "split it, or leave it out",
            )

    def block(self, offset: int) -> bytes | None:
        """The header block at `offset`, its checksum verified; None for the end marker."""
        block = self.file.read(BLOCK)
        if len(block) < BLOCK:
            if offset == 0:
                self.refuse_compressed(block)
            raise self.damage(offset, "a tar must end in two zero blocks", "the end of the file")
        if not any(block):
            self.check_end(offset)
            return None
        digits = block[148:156].strip(b" \0")
        unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
        signed = unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        stored = int(digits, 8) if digits and not digits.strip(b"01234567") else -1
        if stored not in (unsigned, signed):
            if offset == 0:
                self.refuse_compressed(block)
            raise self.damage(offset, f"the header's checksum must be {unsigned:o}", repr(digits))
        return block

    def refuse_compressed(self, block: bytes) -> None:
        for magic, (name, tool) in COMPRESSED.items():
            if block.startswith(magic):
                raise ValueError(
                    f"{self.path}: a shard must be a plain tar, whose samples can be read one by "
                    f"one, got {name}; unpack it with: {tool}"
                )

    def check_end(self, offset: int) -> None:
        """All must be zero from the end marker on; else a wiped header hides the members after."""
        if self.size - offset < len(END):
            raise self.damage(offset, "a tar must end in two zero blocks", "one")
        if self.size - offset > MEMBER_LIMIT:
            raise self.damage(offset, "the end marker must be short", f"{self.size - offset} bytes")
        while chunk := self.file.read(1 << 20):
            if any(chunk):
                raise self.damage(
                    offset,
                    "only zeros may follow the end marker",
                    "more data",
                    "if these are tars put one behind another, index each by itself; "
                    "otherwise restore the file",
                )

    def tail(self, offset: int) -> bytes:
        """The end marker, which `check_end` found to be zeros, once more."""
        return bytes(self.size - offset)

    def extension(self, block: bytes, offset: int) -> bytes:
        """The content of an extended header, with its padding."""
        size = self.number(block, offset)
        if size > EXTENSION_LIMIT or offset + BLOCK + padded(size) > self.size:
            raise self.damage(offset, "an extended header must be short and whole", f"{size} bytes")
        return self.file.read(padded(size))

    def pax_fields(self, content: bytes, offset: int) -> dict[str, str]:
        """The `length key=value` records of a pax header (POSIX.1-2001)."""
        fields, start = {}, 0
        while start < len(content):
            digits = content[start : start + 8].partition(b" ")[0]
            end = start + int(digits) if digits.isdigit() else start
            record = content[start + len(digits) + 1 : end]
            key, equals, value = record.partition(b"=")
            if not equals or not value.endswith(b"\n") or end > len(content):
                got = repr(content[start:][:80])
                raise self.damage(offset, "a pax header must hold key=value records", got)
            fields[_text(key)] = _text(value[:-1])
            start = end
        if not re.fullmatch("[0-9]{1,19}", fields.get("size", "0")):
            raise self.damage(offset, "a pax size must be a number", repr(fields["size"][:80]))
        return fields

    def number(self, block: bytes, offset: int) -> int:
        """A header's size field: octal digits, or GNU's base 256 for sizes of 8 GiB and more."""
        field = block[124:136]
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.strip(b" \0")
        if digits.strip(b"01234567"):
            raise self.damage(offset, "a member's size must be an octal number", repr(digits))
        return int(digits or b"0", 8)

    def damage(
        self, offset: int, must: str, got: str, do: str = "the file is damaged: restore it"
    ) -> ValueError:
        return ValueError(f"{self.path}: byte {offset}: {must}, got {got}; {do}")


def _block_name(block: bytes) -> str:
    name = _text(block[:100])
    posix = block[257:263] == b"ustar\0"  # GNU's old format keeps other things in the prefix field
    prefix = _text(block[345:500]) if posix else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
