"""Which samples form which pack: a pure function of lengths, seed and position."""

from bisect import bisect_right

import numpy as np

from triptych_data.lengths import Lengths
from triptych_data.order import epoch_order
from triptych_data.packing import Packs, pack_lengths


class Plan:
    """The endless stream of packs over all epochs of `samples`; a position in it is one integer.

    Each epoch is a new order of all samples, packed; its packs follow those of the epoch before.
    Only the epochs asked for last are held. Reaching a position in a far epoch needs the number of
    packs in all epochs before it (1 s per million samples each), unless `epoch_starts` is known.
    """

    def __init__(
        self,
        samples: np.ndarray,
        lengths: Lengths,
        *,
        seed: int,
        seq_len: int,
        open_bins: int = 16,
        max_patches: int | None = None,
    ) -> None:
        assert len(samples), "an empty epoch would never end"
        self.samples = samples
        self.epoch_starts = [0]  # first position of each epoch so far known; may be restored
        self._lengths = lengths
        self._seed = seed
        self._seq_len = seq_len
        self._open_bins = open_bins
        self._max_patches = max_patches
        self._epochs: dict[int, Packs] = {}

    def pack(self, position: int) -> list[int]:
        """Return the sample ids of the pack at `position`, in the order of their documents."""
        assert position >= 0
        while self.epoch_starts[-1] <= position:
            self._packs(len(self.epoch_starts) - 1)
        epoch = bisect_right(self.epoch_starts, position) - 1
        return self._packs(epoch)[position - self.epoch_starts[epoch]].tolist()

    def epoch(self, position: int) -> int:
        """Return the epoch, from 0, to which the pack at `position` belongs."""
        self.pack(position)
        return bisect_right(self.epoch_starts, position) - 1

    def _packs(self, epoch: int) -> Packs:
        """Return an epoch's packs of sample ids, and note where the next epoch starts."""
        if epoch not in self._epochs:
            order = self.samples[epoch_order(len(self.samples), self._seed, epoch)]
            packs = pack_lengths(
                self._lengths.num_tokens[order],
                self._seq_len,
                open_bins=self._open_bins,
                patches=self._lengths.num_patches[order],
                max_patches=self._max_patches,
            )
            # Prefetching runs ahead of what a resume may ask for, but never by two epochs.
            self._epochs = {i: p for i, p in self._epochs.items() if i == epoch - 1}
            self._epochs[epoch] = Packs(order[packs.items], packs.starts)
        if epoch == len(self.epoch_starts) - 1:
            self.epoch_starts.append(self.epoch_starts[epoch] + len(self._epochs[epoch]))
        return self._epochs[epoch]
