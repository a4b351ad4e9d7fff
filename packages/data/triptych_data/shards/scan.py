"""The index of tars made elsewhere: one pass that reads, checks and measures every sample."""

import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from triptych_data.media.probe import MEDIA_SUFFIXES, probe_media
from triptych_data.sample import (
    check_sample,
    heard_parts,
    load_json,
    media_kinds,
    media_parts,
    text_bytes,
)
from triptych_data.shards.index import (
    IndexRows,
    Layout,
    ShardIndex,
    index_paths,
    read_index,
    write_index,
)
from triptych_data.shards.tar import DIRECTORY, END, Entry, read_entries
from triptych_data.storage.open import Location
from triptych_data.storage.remote import shown
from triptych_data.workers.ordered import in_order

PICKLES = {"pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill", "ckpt"}
"""Members that webdataset or torch would unpickle, which runs whatever code they hold."""
META = re.compile(r"__[^/]*__(/|$)")
"""Names of files about the tar, which webdataset and Energon pass over."""
FIELD = re.compile(r"([A-Za-z_][\w-]*|\d+)(\.[A-Za-z0-9_][\w-]*)*")
"""What may follow the first dot of a file's name: `jpg`, `0.jpg`, `left.png`; in `v1.0_img.jpg`
`0_img.jpg` does, and shows that the dot was part of a key."""
MOST_MEMBERS = 4096
"""Of a sample: more are no chat, and take minutes to look at."""
SAMPLE_LIMIT = 1 << 32
"""A sample is held in memory as one piece."""
MOST_SUFFIXES = 256


def build_index(tar: str | Path, layout: Layout = "chat") -> ShardIndex:
    """The index of any WebDataset tar, read once, front to back, and checked for all it can be.

    A member's key is its path up to the first dot of the file's name, and what follows is its
    field, as in webdataset. Nothing is unpacked to the disk, unpickled or executed. Raises
    ValueError with file and offset or key for a damaged or unsafe tar (`tar.walk`), pickles, a dot
    in a key, a key that comes back after another, a member held twice. In the layout "chat" also
    for a sample without `.json`, media not named `<key>.<i>.<ext>` from 0 without gaps, a JSON that
    is no chat (`sample.check_sample`), a broken medium; "members" takes any fields.
    """
    rows, seen, rest, end = IndexRows(), set[str](), b"", 0
    size = 0
    for key, group in _groups(read_entries(tar), str(tar)):
        start, span = group[0].member.start, b"".join(entry.raw for entry in group)
        if key is None:
            rest += span
            size = start + len(span)
            continue
        if key in seen:
            raise ValueError(
                f"{tar}: byte {start}: members of one sample must lie side by side, got {key!r} "
                "again after other samples; write the tar sorted by key"
            )
        seen.add(key)
        add = _add_chat if layout == "chat" else _add_members
        add(rows, key, group, span, f"{tar}: sample {key}")
        end = start + len(span)
    if not seen:
        raise ValueError(f"{tar}: a shard must hold a sample, got none; leave the file out")
    suffixes = {suffix for _, _, suffix in rows.members}
    if len(suffixes) > MOST_SUFFIXES:
        raise ValueError(
            f"{tar}: a shard must have at most {MOST_SUFFIXES} kinds of members, got "
            f"{len(suffixes)} such as {min(suffixes)}; name members by what they are, not by number"
        )
    return rows.finish(end, size, rest=rest, layout=layout)


def index_shards(
    tars: Sequence[Location],
    *,
    overwrite: bool = False,
    num_workers: int = 1,
    layout: Layout = "chat",
) -> Generator[tuple[Location, tuple[ShardIndex, bool]], None, None]:
    """`index_or_verify` for each of `tars`, in order."""
    work = partial(index_or_verify, overwrite=overwrite, layout=layout)
    yield from zip(tars, in_order(work, tars, num_workers), strict=True)


def index_or_verify(
    tar: Location, *, overwrite: bool = False, layout: Layout = "chat"
) -> tuple[ShardIndex, bool]:
    """The index of `tar` and whether it was written: one that exists is compared with the bytes.

    An index is not replaced unless `overwrite`: it may be the only witness of damage. Raises
    ValueError as `build_index`, for a URL, and when the tar is not what its index says.
    """
    if isinstance(tar, str):
        raise ValueError(
            f"{shown(tar)}: must be a local file to be indexed, got a URL; index it where it lies, "
            "and put the .idx and .columns files beside it"
        )
    if overwrite or not Path(index_paths(tar)[1]).exists():
        index = build_index(tar, layout)
        write_index(tar, index)
        return index, True
    known = read_index(tar)
    if build_index(tar, known.layout).fingerprint != known.fingerprint:
        raise ValueError(
            f"{tar}: the shard must be as it was indexed, got other bytes; restore it, or accept "
            "the change with --overwrite"
        )
    return known, False


def _groups(entries: Iterable[Entry], tar: str) -> Iterator[tuple[str | None, list[Entry]]]:
    """Runs of entries with one key, the entries of no sample that follow them included.

    What comes before the first sample and the end of the tar are runs without a key.
    """
    key, group, size = None, list[Entry](), 0
    for entry in entries:
        name = entry.member.name
        mine = None if entry.kind in (DIRECTORY, END) else _key(name)
        if entry.kind == END or (mine is not None and mine != key):
            if group:
                yield key, group
            key, group, size = mine, [], 0
        group.append(entry)
        size += len(entry.raw)
        if mine is not None and len(group) > MOST_MEMBERS:
            raise ValueError(
                f"{tar}: byte {group[0].member.start}: a sample must have at most {MOST_MEMBERS} "
                f"members, got more of key {key!r}; split it"
            )
        if size > SAMPLE_LIMIT:
            raise ValueError(
                f"{tar}: byte {group[0].member.start}: a sample must have at most {SAMPLE_LIMIT} "
                f"bytes, got {size} and more; split it"
            )
    yield None, group


def _key(name: str) -> str | None:
    """The key of a member; None for .DS_Store, ._x, README, which are no samples to webdataset."""
    folder, slash, file = name.rpartition("/")
    stem, dot, _ = file.partition(".")
    return folder + slash + stem if stem and dot and not META.match(name) else None


def _add_chat(rows: IndexRows, key: str, group: list[Entry], span: bytes, where: str) -> None:
    """Check one chat's members and add its row; `span` are its bytes in the tar."""
    members = _chat_members(key, _fields(key, group, where), where)
    record = load_json(bytes(members[0][0].content), where)
    check_sample(record, len(members) - 1, where)
    parts = list(zip(media_parts(record), heard_parts(record), strict=True))
    heard = {index for (_, index), is_heard in parts if is_heard}
    media = [
        probe_media(
            bytes(entry.content),
            kind,
            f"{where}: member {entry.member.name}",
            decode=False,
            sound=number in heard,
        )
        for (entry, number, _), kind in zip(members[1:], media_kinds(record), strict=True)
    ]
    rows.add(
        key,
        span,
        [(entry.member.data, entry.member.size, suffix) for entry, _, suffix in members],
        text_bytes(record),
        [
            media[index] if is_heard else media[index]._replace(sound=None)
            for (_, index), is_heard in parts
        ],
        group[0].member.start,
    )


def _add_members(rows: IndexRows, key: str, group: list[Entry], span: bytes, where: str) -> None:
    """Add a row of any members, in the order of the tar."""
    found: dict[str, Entry] = {}
    for field, entry in _fields(key, group, where):
        if field in found:
            raise _twice(found[field], entry, where)
        found[field] = entry
    members = [(entry.member.data, entry.member.size, field) for field, entry in found.items()]
    rows.add(key, span, members, 0, [], group[0].member.start)


def _fields(key: str, group: list[Entry], where: str) -> list[tuple[str, Entry]]:
    """The members of a sample by what follows the first dot of their names, in lower case."""
    fields = []
    for entry in group:
        name = entry.member.name
        if entry.kind == DIRECTORY or _key(name) != key:
            continue
        field = name[len(key) + 1 :].lower()
        if not PICKLES.isdisjoint(field.split(".")):
            raise ValueError(
                f"{where}: members must be data, got {name}, a pickle, which runs code when it is "
                "loaded; convert it to safetensors or npy, or leave it out"
            )
        if not FIELD.fullmatch(field):
            raise ValueError(
                f"{where}: media must be named <key>.<i>.<ext>, other members <key>.<field>, got "
                f"{name}; keep dots out of keys: a name is split at its first dot"
            )
        fields.append((field, entry))
    return fields


def _twice(first: Entry, second: Entry, where: str) -> ValueError:
    return ValueError(
        f"{where}: a member must be there once, got {first.member.name} and {second.member.name}; "
        "write the tar anew"
    )


def _chat_members(
    key: str, fields: list[tuple[str, Entry]], where: str
) -> list[tuple[Entry, int, str]]:
    """(entry, number, suffix) of the JSON, numbered -1, and the media; others are left out."""
    found: dict[int, tuple[Entry, int, str]] = {}
    for field, entry in fields:
        number, _, suffix = field.rpartition(".")
        if field == "json":
            position = -1
        elif number.isdecimal() and number.isascii():
            position = int(number)
        elif suffix in MEDIA_SUFFIXES:
            raise ValueError(
                f"{where}: media must be named <key>.<i>.<ext> with i from 0, got "
                f"{entry.member.name}; rename it, keep dots out of keys (a name is split at its "
                "first dot), or make chats of these files: triptych-data shard"
            )
        else:
            continue
        if position in found:
            raise _twice(found[position][0], entry, where)
        found[position] = (entry, position, suffix)
    members = [found[position] for position in sorted(found)]
    names = ", ".join(entry.member.name for _, entry in fields[:4])
    if -1 not in found:
        raise ValueError(
            f"{where}: a sample must have a member {key}.json, got {names}; add it, and keep dots "
            "out of keys: a name is split at its first dot"
        )
    if members[-1][1] != len(members) - 2:
        raise ValueError(
            f"{where}: media must be numbered from 0 without gaps, got {names}; write the tar anew"
        )
    return members
