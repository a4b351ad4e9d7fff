"""Documents longer than a pack, cut into pieces of a pack's length, which are planned as samples.

A document of L tokens becomes ceil((L - 1) / seq_len) pieces, in order: tokens 0 to seq_len - 1,
the next seq_len, and so on; its last token, which only is a target, makes none of its own. Targets
are those of the whole document, so that none is lost where it is cut. A piece does not see the ones
before it: its attention and positions begin anew.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from triptych_data.plan.lengths import Lengths  # which imports torch


class Pieces(NamedTuple):
    """The pieces of N samples, numbered through: one of each, but several of a long document."""

    starts: np.ndarray
    """(N + 1,) int64, the first piece of each sample"""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, piece: int) -> tuple[int, int]:
        """The sample of a piece, and the piece's number in it from 0."""
        sample = int(np.searchsorted(self.starts, piece, side="right")) - 1
        return sample, piece - int(self.starts[sample])


def is_document(lengths: "Lengths") -> np.ndarray:
    """Which samples are plain text, (N,) bool: every token of theirs but the first is a target,
    while a chat begins with tokens that only its template makes, and a medium's are none."""
    return (lengths.num_tokens > 0) & (lengths.num_targets == lengths.num_tokens - 1)


def cut_documents(lengths: "Lengths", seq_len: int) -> tuple[Pieces, "Lengths"]:
    """Return the pieces of all samples under a pack's length, and how long each piece is."""
    tokens = lengths.num_tokens.astype(np.int64)
    long = is_document(lengths) & (tokens > seq_len)
    counts = np.where(long, -(-(tokens - 1) // seq_len), 1)
    pieces = Pieces(np.concatenate([[0], np.cumsum(counts)]))
    if not long.any():
        return pieces, lengths
    sample = np.repeat(np.arange(len(tokens)), counts)
    before = (np.arange(len(sample)) - pieces.starts[sample]) * seq_len
    cut = type(lengths)(*(column[sample] for column in lengths))
    of_long = long[sample]
    cut.num_tokens[of_long] = np.minimum(seq_len, tokens[sample] - before)[of_long]
    cut.num_targets[of_long] = np.minimum(seq_len, tokens[sample] - 1 - before)[of_long]
    return pieces, cut
