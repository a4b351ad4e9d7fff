"""The tar container: headers that are the same bytes on every run, a walk that notices damage.

Python's `tarfile` takes a broken header in the middle for the end of the archive, and readers built
on it lose the rest in silence; here it is an error with the file and the offset.
Formats: POSIX.1-1988 ustar (written), plus GNU long names and pax headers (read).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
END = bytes(2 * BLOCK)
"""Two zero blocks end an archive."""
FILE, DIRECTORY = b"0", b"5"
EXTENSIONS = (b"x", b"g", b"L", b"K")
"""pax header of one member, pax header of all that follow, GNU long name, GNU long link name."""
EXTENSION_LIMIT = 1 << 20
"""An extended header beyond 1 MiB is damage, not a name."""


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


def walk(path: str | Path) -> Iterator[Member]:
    """The regular files of a tar in order; directories are passed over.

    Raises ValueError with file and offset for a header whose checksum is wrong, a member or end
    marker that is cut off, bytes after the end, and members that are links or special files.
    """
    with Path(path).open("rb") as file:
        tar = _Tar(path, file, os.fstat(file.fileno()).st_size)
        offset = 0
        while entry := tar.entry(offset):
            member, kind = entry
            if member.end > tar.size:
                raise tar.damage(
                    member.start,
                    f"member {member.name} must end by byte {member.end}",
                    f"a file of {tar.size} bytes",
                )
            if kind == FILE:
                yield member
            offset = member.end


@dataclass(frozen=True, slots=True)
class _Tar:
    path: str | Path
    file: BinaryIO
    size: int

    def entry(self, start: int) -> tuple[Member, bytes] | None:
        """The file or directory whose (extended) header is at `start`; None at the end marker."""
        offset, fields = start, dict[str, str]()
        while (block := self.block(offset)) and (kind := block[156:157]) in EXTENSIONS:
            content, offset = self.extension(block, offset)
            if kind == b"x":
                fields |= self.pax_fields(content, start)
            elif kind == b"L":
                fields["path"] = _text(content)
        if block is None:
            if offset != start:
                raise self.damage(start, "an extended header must precede a member", "the end")
            return None
        name = fields.get("path") or _block_name(block)
        size = int(fields["size"]) if "size" in fields else self.number(block, offset)
        if kind in (b"\0", b"7"):  # the types of old tars and of contiguous files
            kind = DIRECTORY if name.endswith("/") else FILE
        if kind not in (FILE, DIRECTORY) or any(field.startswith("GNU.sparse") for field in fields):
            raise self.damage(
                offset,
                f"member {name} must be a regular file",
                f"type {kind.decode('latin-1')!r}",
                "write the tar without links, sparse and special files (tar -h --hard-dereference)",
            )
        return Member(name, start, offset + BLOCK, size if kind == FILE else 0), kind

    def block(self, offset: int) -> bytes | None:
        """The header block at `offset`, its checksum verified; None for the end marker."""
        self.file.seek(offset)
        block = self.file.read(BLOCK)
        if len(block) < BLOCK:
            raise self.damage(offset, "a tar must end in two zero blocks", "the end of the file")
        if not any(block):
            self.check_end(offset)
            return None
        digits = block[148:156].strip(b" \0")
        unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
        signed = unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        stored = int(digits, 8) if digits and not digits.strip(b"01234567") else -1
        if stored not in (unsigned, signed):
            raise self.damage(offset, f"the header's checksum must be {unsigned:o}", repr(digits))
        return block

    def check_end(self, offset: int) -> None:
        """All must be zero from the end marker on; else a wiped header hides the members after."""
        if self.size - offset < len(END):
            raise self.damage(offset, "a tar must end in two zero blocks", "one")
        self.file.seek(offset)
        while chunk := self.file.read(1 << 20):
            if any(chunk):
                raise self.damage(
                    offset,
                    "only zeros may follow the end marker",
                    "more data",
                    "if these are tars put one behind another, index each by itself; "
                    "otherwise restore the file",
                )

    def extension(self, block: bytes, offset: int) -> tuple[bytes, int]:
        """The content of an extended header and the offset of the block after it."""
        size = self.number(block, offset)
        if size > EXTENSION_LIMIT or offset + BLOCK + size > self.size:
            raise self.damage(offset, "an extended header must be short and whole", f"{size} bytes")
        self.file.seek(offset + BLOCK)
        return self.file.read(size), offset + BLOCK + padded(size)

    def pax_fields(self, content: bytes, offset: int) -> dict[str, str]:
        """The `length key=value` records of a pax header (POSIX.1-2001)."""
        fields = {}
        while content:
            digits, _, _ = content.partition(b" ")
            length = int(digits) if digits.isdigit() else 0
            record, content = content[len(digits) + 1 : length], content[length:]
            key, equals, value = record.partition(b"=")
            if not equals or not value.endswith(b"\n"):
                raise self.damage(offset, "a pax header must hold key=value records", repr(record))
            fields[_text(key)] = _text(value[:-1])
        if not fields.get("size", "0").isdecimal():
            raise self.damage(offset, "a pax size must be a number", repr(fields["size"]))
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
