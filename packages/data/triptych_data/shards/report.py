"""What a run that writes shards tells: its progress, and in the end what it wrote."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from triptych_data.shards.index import read_index
from triptych_data.shards.intake import Rejected

Progress = Callable[[str, int, int], None]
"""Called with what is done ("Checking", "Writing"), how many, and of how many."""


@dataclass(slots=True)
class ShardReport:
    """What was written: the tars in order, totals, and the records that were left out."""

    shards: list[Path] = field(default_factory=list)
    num_samples: int = 0
    num_images: int = 0
    num_videos: int = 0
    num_audios: int = 0
    text_bytes: int = 0
    tar_bytes: int = 0
    skipped: list[Rejected] = field(default_factory=list)
    kept_records: int = 0
    """records that an earlier, unfinished run had checked"""
    kept_shards: int = 0
    """shards that an earlier, unfinished run had written, verified byte by byte"""

    @property
    def skipped_reasons(self) -> dict[str, int]:
        """How many records were left out for what reason, most frequent first."""
        return dict(Counter(rejected.reason for rejected in self.skipped).most_common())

    def count(self) -> None:
        """Add up what the indexes of `shards` say."""
        for index in map(read_index, self.shards):
            images, videos, audios = index.media.counts().tolist()
            self.num_samples += index.num_samples
            self.num_images += images
            self.num_videos += videos
            self.num_audios += audios
            self.text_bytes += int(index.text_bytes.sum())
            self.tar_bytes += index.tar_bytes
