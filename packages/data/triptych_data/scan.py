"""The index of tars made elsewhere: one pass that reads, checks and measures every sample."""

import multiprocessing
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from triptych_data.index import IndexRows, ShardIndex, index_paths, read_index, write_index
from triptych_data.probe import MEDIA_SUFFIXES, probe_media
from triptych_data.sample import check_sample, load_json, media_kinds, media_parts, text_bytes
from triptych_data.tar import Member, walk
from triptych_data.workers import begin_worker


def build_index(tar: str | Path) -> ShardIndex:
    """The index of any WebDataset tar of our samples, in one pass that also checks all it can.

    A member's key is its path up to the first dot of the file's name, as in webdataset. Raises
    ValueError with file and offset or key for a damaged tar (`tar.walk`), a key that comes back
    after another, a sample without `.json`, a member held twice, media not named `<key>.<i>.<ext>`
    from 0 without gaps, a JSON that is no chat (`sample.check_sample`), a broken medium.
    """
    rows, seen, end = IndexRows(), set[str](), 0
    with Path(tar).open("rb", buffering=0) as file:
        for key, group, end in _groups(walk(tar), str(tar)):
            if key in seen:
                raise ValueError(
                    f"{tar}: byte {group[0].start}: members of one sample must lie side by side, "
                    f"got {key!r} again after other samples; write the tar sorted by key"
                )
            seen.add(key)
            span = os.pread(file.fileno(), end - group[0].start, group[0].start)
            _add_group(rows, key, group, span, f"{tar}: sample {key}")
    if not seen:
        raise ValueError(f"{tar}: a shard must hold a sample, got none; leave the file out")
    return rows.finish(end, Path(tar).stat().st_size)


def index_shards(
    tars: Sequence[Path], *, overwrite: bool = False, num_workers: int = 1
) -> Generator[tuple[Path, tuple[ShardIndex, bool]], None, None]:
    """`index_or_verify` for each of `tars`, in order."""
    work = partial(index_or_verify, overwrite=overwrite)
    num_workers = min(num_workers, len(tars))
    if num_workers == 1:
        yield from zip(tars, map(work, tars), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=begin_worker) as pool:
        try:
            yield from zip(tars, pool.map(work, tars), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def index_or_verify(tar: str | Path, *, overwrite: bool = False) -> tuple[ShardIndex, bool]:
    """The index of `tar` and whether it was written: one that exists is compared with the bytes.

    An index is not replaced unless `overwrite`: it may be the only witness of damage. Raises
    ValueError as `build_index`, and when the tar is not what its index says.
    """
    if overwrite or not index_paths(tar)[1].exists():
        index = build_index(tar)
        write_index(tar, index)
        return index, True
    known = read_index(tar)
    if build_index(tar).fingerprint != known.fingerprint:
        raise ValueError(
            f"{tar}: the shard must be as it was indexed, got other bytes; restore it, or accept "
            "the change with --overwrite"
        )
    return known, False


def _groups(members: Iterable[Member], tar: str) -> Iterator[tuple[str, list[Member], int]]:
    """Runs of members with one key, each with the offset where the next run starts."""
    key, group = "", list[Member]()
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, _ = name.partition(".")
        if not stem or not dot:
            continue  # .DS_Store, ._x, README: no sample to webdataset either
        if group and folder + slash + stem != key:
            yield key, group, member.start
            group = []
        key = folder + slash + stem
        group.append(member)
    if group:
        yield key, group, group[-1].end


def _add_group(rows: IndexRows, key: str, group: list[Member], span: bytes, where: str) -> None:
    """Check one sample's members and add its row; `span` are its bytes in the tar."""
    start = group[0].start
    members = _sorted_members(key, group, where)
    contents = [span[m.data - start : m.data - start + m.size] for m, _, _ in members]
    record = load_json(contents[0], where)
    check_sample(record, len(members) - 1, where)
    media = [
        probe_media(content, kind, f"{where}: member {member.name}", decode=False)
        for (member, _, _), content, kind in zip(
            members[1:], contents[1:], media_kinds(record), strict=True
        )
    ]
    rows.add(
        key,
        span,
        [(member.data, member.size, suffix) for member, _, suffix in members],
        text_bytes(record),
        [media[index] for _, index in media_parts(record)],
        start,
    )


def _sorted_members(key: str, group: list[Member], where: str) -> list[tuple[Member, int, str]]:
    """(member, number, suffix) of the JSON, numbered -1, and the media; others are left out."""
    found: dict[int, tuple[Member, int, str]] = {}
    for member in group:
        rest = member.name[len(key) + 1 :]
        number, _, suffix = rest.rpartition(".")
        suffix = suffix.lower()
        if rest == "json":
            position = -1
        elif number.isdecimal() and number.isascii():
            position = int(number)
        elif suffix in MEDIA_SUFFIXES:
            raise ValueError(
                f"{where}: media must be named <key>.<i>.<ext> with i from 0, got {member.name}; "
                "rename it, and keep dots out of keys: a name is split at its first dot"
            )
        else:
            continue
        if position in found:
            raise ValueError(
                f"{where}: a member must be there once, got {found[position][0].name} and "
                f"{member.name}; write the tar anew"
            )
        found[position] = (member, position, suffix)
    members = [found[position] for position in sorted(found)]
    names = ", ".join(member.name for member in group[:4])
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
