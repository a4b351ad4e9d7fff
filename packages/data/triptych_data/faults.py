"""Samples that fail during a run: a hole in their pack, counted, and a limit to how many."""

import logging
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

WINDOW = 10_000
"""The rate of holes is taken over this many samples, the last ones of a rank."""
_FEWEST = 100  # below that many samples a rate says little
_LOGGED = 10  # holes of one source and reason that are logged; a ledger has them all
_log = logging.getLogger(__name__)


class Hole(NamedTuple):
    """A planned sample that its batch had to do without."""

    key: str
    source: str
    reason: str
    message: str
    sample: int
    """its number, as in the plan"""


class BadSample(ValueError):
    """A sample that cannot be used, and in two words why; what counts holes goes by `reason`."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


def reason_of(error: BaseException) -> str:
    """Return the reason that an error, or the one it was raised from, gives for a hole."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BadSample):
            return cause.reason
        cause = cause.__cause__
    return "refused" if isinstance(error, ValueError) else f"failed by {type(error).__name__}"


class Faults:
    """Counts one rank's holes by (source, reason), and stops the run when they are too many.

    key: the section of the configuration that says how many may be.
    """

    def __init__(self, max_bad_rate: float, key: str = "data") -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._max_bad_rate, self._key = max_bad_rate, key
        self._recent: deque[tuple[int, int]] = deque()  # (samples, holes) of each batch
        self._samples = self._holes = 0  # in _recent

    def add(self, num_samples: int, holes: Sequence[Hole]) -> None:
        """Count a batch of `num_samples` planned samples, of which `holes` are missing.

        Raises ValueError if more than `max_bad_rate` of the last 10,000 samples were bad, once 100
        have been seen; at once if the rate is 0.
        """
        for hole in holes:
            self._count(hole)
        self._recent.append((num_samples, len(holes)))
        self._samples += num_samples
        self._holes += len(holes)
        while self._samples - self._recent[0][0] >= WINDOW:
            samples, bad = self._recent.popleft()
            self._samples -= samples
            self._holes -= bad
        seen_enough = self._samples >= _FEWEST or self._max_bad_rate == 0
        if holes and seen_enough and self._holes > self._max_bad_rate * self._samples:
            raise ValueError(
                f"{self._key}.max_bad_rate: at most {self._max_bad_rate:.4g} of samples may be "
                f"bad, got {self._holes} of the last {self._samples} ({self.summary()}); the last "
                f"one: {holes[-1].message}; repair the data, or allow more"
            )

    def summary(self) -> str:
        """All counts in words, the most frequent first."""
        return ", ".join(
            f"{count} × {reason} in {source}"
            for (source, reason), count in self.counts.most_common()
        )

    def _count(self, hole: Hole) -> None:
        kind = hole.source, hole.reason
        self.counts[kind] += 1
        if self.counts[kind] <= _LOGGED:
            _log.warning("left out (%s): %s", hole.reason, hole.message)
        if self.counts[kind] == _LOGGED:
            _log.warning("left out (%s): more in %s will not be logged", hole.reason, hole.source)
