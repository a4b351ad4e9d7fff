"""Write shards: numbered WebDataset tars with indexes, the same bytes for any number of workers."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from triptych_data.index import IndexRows, write_index, write_whole
from triptych_data.intake import Prepared, Rejected, prepare_all, scan_lines
from triptych_data.order import epoch_order
from triptych_data.tar import END, header, padded

SHARD_SIZE = 256_000_000
OURS = re.compile(
    r"shard-\d{6,}\.tar(\.idx|\.columns|\.lengths-[0-9a-f]+\.safetensors)?|skipped\.jsonl"
)
"""Names that we write, cached lengths included, and --overwrite may remove."""
SKIPPED = "skipped.jsonl"
STAGING = ".partial"
"""Folder in the output where a run works; its files move out when all of them are whole."""


@dataclass(slots=True)
class ShardReport:
    """What `write_shards` wrote: the tars in order, totals, and the lines that were left out."""

    shards: list[Path] = field(default_factory=list)
    num_samples: int = 0
    num_images: int = 0
    num_videos: int = 0
    num_audios: int = 0
    text_bytes: int = 0
    tar_bytes: int = 0
    skipped: list[Rejected] = field(default_factory=list)


def write_shards(
    input_path: str | Path,
    output_dir: str | Path,
    *,
    shard_size: int = SHARD_SIZE,
    samples_per_shard: int | None = None,
    num_workers: int = 1,
    shuffle_seed: int | None = None,
    image_root: str | Path | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ShardReport:
    """Check the chats of a JSONL file and write them, media included, as indexed shards.

    A shard is full when the next sample would take it beyond `shard_size` bytes, or at
    `samples_per_shard`. Media paths are relative to `image_root`, by default the input's folder.
    Keys number the written samples. Raises ValueError at the first bad line, or, with `skip_bad`,
    lists bad lines in `skipped.jsonl`; nothing appears in `output_dir` before all is written.
    `on_progress` is told (lines done, lines in all).
    """
    source, output = Path(input_path), Path(output_dir)
    if (
        shard_size < 1
        or num_workers < 1
        or (samples_per_shard is not None and samples_per_shard < 1)
    ):
        raise ValueError(
            "shard size, samples per shard and workers must be at least 1, got "
            f"{shard_size}, {samples_per_shard}, {num_workers}; leave out what you do not need"
        )
    lines = scan_lines(source)
    order = (
        epoch_order(len(lines), shuffle_seed, epoch=0)
        if shuffle_seed is not None
        else np.arange(len(lines))
    )
    root = Path(image_root) if image_root is not None else source.parent
    with (
        _staging(output, overwrite) as staging,
        closing(prepare_all(lines, order, root, num_workers)) as results,
        closing(_Writer(staging, shard_size, samples_per_shard)) as writer,
    ):
        skipped = []
        for done, result in enumerate(results, 1):
            if isinstance(result, Prepared):
                writer.add(result)
            elif skip_bad:
                skipped.append(result)
            else:
                raise ValueError(result.error)
            if on_progress:
                on_progress(done, len(lines))
        report = writer.finish(skipped, source)
        _publish(staging, output)
    report.shards = [output / shard.name for shard in report.shards]
    return report


@contextmanager
def _staging(output: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder to work in, gone at the end; refuses an output that holds anything."""
    output.mkdir(parents=True, exist_ok=True)
    staging = output / STAGING
    present = sorted(path.name for path in output.iterdir())
    if present and not overwrite:
        left = " (of a run that was killed or still runs)" if STAGING in present else ""
        raise ValueError(
            f"{output}: the output folder must be empty, got {len(present)} entries such as "
            f"{present[0]}{left}; name another, or replace old shards with --overwrite"
        )
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging)


def _members(key: str, sample: Prepared) -> list[bytes]:
    """The members of a sample as they lie in a tar: header, content and padding, in turns."""
    parts = []
    media = [
        (f"{i}.{info.suffix}", data)
        for i, (info, data) in enumerate(zip(sample.measures, sample.media, strict=True))
    ]
    for name, data in [("json", sample.json), *media]:
        parts += [header(f"{key}.{name}", len(data)), data, bytes(padded(len(data)) - len(data))]
    return parts


@dataclass(slots=True)
class _Writer:
    """Appends samples to the newest shard in `folder`, and begins another when it is full."""

    folder: Path
    shard_size: int
    samples_per_shard: int | None
    report: ShardReport = field(default_factory=ShardReport)
    file: BinaryIO | None = None
    rows: IndexRows = field(default_factory=IndexRows)
    end: int = 0

    def add(self, sample: Prepared) -> None:
        key = f"{self.report.num_samples:09d}"
        parts = _members(key, sample)
        span = b"".join(parts)
        file = self._shard_for(len(span))
        members, offset = [], self.end
        suffixes = ["json", *(info.suffix for info in sample.measures)]
        for suffix, head, data, padding in zip(
            suffixes, parts[::3], parts[1::3], parts[2::3], strict=True
        ):
            members.append((offset + len(head), len(data), suffix))
            offset += len(head) + len(data) + len(padding)
        self.rows.add(key, span, members, sample.text_bytes, sample.measures, self.end)
        file.write(span)
        self.end = offset
        self.report.num_samples += 1
        kinds = [info.kind for info in sample.measures]
        self.report.num_images += kinds.count("image")
        self.report.num_videos += kinds.count("video")
        self.report.num_audios += kinds.count("audio")
        self.report.text_bytes += sample.text_bytes

    def finish(self, skipped: list[Rejected], source: Path) -> ShardReport:
        """End the last shard and write the list of skipped lines."""
        self._end_shard()
        skipped = sorted(skipped)
        if not self.report.shards:
            raise ValueError(
                f"{source}: the input must hold a good line, got none; first: {skipped[0].error}"
            )
        lines = [json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in skipped]
        if lines:
            write_whole(self.folder / SKIPPED, "".join(lines).encode())
        self.report.skipped = skipped
        return self.report

    def close(self) -> None:
        if self.file:
            self.file.close()

    def _shard_for(self, size: int) -> BinaryIO:
        """The shard that takes a sample of `size` bytes: boundaries depend on the samples alone."""
        full = len(self.rows.keys) == self.samples_per_shard
        if self.file and (full or self.end + size + len(END) > self.shard_size):
            self._end_shard()
        if not self.file:
            path = self.folder / f"shard-{len(self.report.shards):06d}.tar"
            self.report.shards.append(path)
            self.file = path.open("xb")
            self.rows, self.end = IndexRows(), 0
        return self.file

    def _end_shard(self) -> None:
        """End the newest tar, bring it to the disk, write its index."""
        if not self.file:
            return
        self.file.write(END)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None
        size = self.end + len(END)
        self.report.tar_bytes += size
        write_index(self.report.shards[-1], self.rows.finish(self.end, size))


def _publish(staging: Path, output: Path) -> None:
    """Remove the old shards and move the new files into place, each tar after its index."""
    for path in output.iterdir():
        if OURS.fullmatch(path.name):
            path.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: (path.suffix == ".tar", path.name)):
        path.replace(output / path.name)
    descriptor = os.open(output, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
