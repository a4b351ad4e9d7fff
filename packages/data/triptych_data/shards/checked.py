"""What the first pass of a run has found so far, on the disk: a killed run goes on behind it."""

import json
import os
from pathlib import Path

import numpy as np

from triptych_data.shards.intake import BAD, Rejected


class Checked:
    """A table of int64 that grows, of `width` columns, and the rejected rows beside it.

    Of what a killed run wrote last only whole rows count; a row that was never written reads as
    zeros, which no checked row is.
    """

    def __init__(self, path: Path, width: int) -> None:
        self._path = path
        self._width = width
        self._bad_path = path.with_name(path.name + ".bad")
        path.touch()
        table = np.fromfile(path, dtype="<i8")
        table = table[: len(table) // width * width].reshape(-1, width)
        whole = table[:, 0] != 0
        self.count = int(np.argmin(whole)) if not whole.all() else len(table)
        bad = int((table[: self.count, 0] == BAD).sum())
        lines = self._bad_path.read_text().splitlines()[:bad] if bad else []
        if len(lines) < bad:  # the list is written first, but a crash of the machine may lose it
            self.count, lines = 0, []
        self.rejected = [Rejected(*json.loads(line)) for line in lines]
        os.truncate(path, self.count * width * 8)
        self._bad_path.write_text("".join(line + "\n" for line in lines))
        self._file = path.open("ab")
        self._bad_file = self._bad_path.open("a")

    def add(self, table: np.ndarray, rejected: list[Rejected]) -> None:
        """Append rows (n, width) and the rejected ones among them, in order."""
        self._bad_file.writelines(json.dumps(entry) + "\n" for entry in rejected)
        self._bad_file.flush()
        self._file.write(table.astype("<i8").tobytes())
        self._file.flush()
        self.rejected += rejected
        self.count += len(table)

    def table(self) -> np.ndarray:
        """All rows (count, width), mapped."""
        return np.memmap(self._path, dtype="<i8", mode="r").reshape(-1, self._width)

    def close(self) -> None:
        self._file.close()
        self._bad_file.close()
