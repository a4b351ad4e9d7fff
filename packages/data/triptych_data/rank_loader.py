"""What all loaders of a rank are: endless batches by workers, resumed by one integer."""

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, Protocol

from triptych_data.batch import Batch
from triptych_data.faults import Faults
from triptych_data.resume import differences, in_words
from triptych_data.shards.reader import Shards
from triptych_data.workers.pool import Job, run_workers
from triptych_data.workers.server import Work

_log = logging.getLogger(__name__)


class Settings(Protocol):
    """What a configuration of data says about its reading."""

    num_workers: int
    prefetch: int
    timeout_s: float
    max_bad_rate: float
    resume_anyway: bool


class RankLoader:
    """The batches of one rank out of an order of samples that all ranks share.

    `position` counts the samples that all ranks have consumed; it may be set, also while
    iterating. Batches prepared ahead do not count. A loader says in `identity` what its order
    depends on.

    Args:
        config: how it is read.
        shards: what is read, for names of samples.
        stream: this rank's batches from a position on.
    """

    def __init__(self, config: Settings, shards: Shards, stream: Work) -> None:
        self.position = 0
        self.shards = shards
        self._key = getattr(config, "KEY", "data")
        self.faults = Faults(config.max_bad_rate, self._key)
        self._config = config
        self._overridden: list[dict[str, Any]] = []
        self._stream = stream
        self._job = Job(stream) if config.num_workers else None
        self._says: Callable[[], str] | None = None  # what the worker waited for is on
        self._sample = -1  # that this process itself is on

    def identity(self) -> dict[str, Any]:
        """What gives a position its meaning: `plan`, and maybe more."""
        raise NotImplementedError

    def changes(self, state: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """What a saved state depends on otherwise, by name."""
        return differences(state.get("plan", {}), self.identity()["plan"])

    def next_begin(self, position: int) -> int:
        """The first position from there on at which a batch may begin."""
        return position

    def where(self, sample: int) -> str:
        """File and key of one of a batch's `sample_ids`, for people."""
        return self.shards.where(sample)

    @property
    def has_workers(self) -> bool:
        """Whether other processes prepare the batches."""
        return self._job is not None

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches from `position` on, without end.

        Raises ValueError when too many samples fail, a shard is lost, or a worker hangs;
        RuntimeError when a worker dies.
        """
        while True:
            expected = self.position
            with closing(self._batches_from(expected)) as batches:
                for batch in batches:
                    if self.position != expected:
                        break  # the position was set: start anew from there
                    holes = batch["holes"]
                    self.faults.add(len(batch["sample_keys"]) + len(holes), holes)
                    self.position = expected = batch["place"].next_position
                    yield batch

    def doing(self) -> str:
        """What is being read now, for people; may be asked from another thread."""
        if self._says is not None:
            return self._says()
        return f"reading {self.shards.where(self._sample)}" if self._sample >= 0 else ""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs: the position, and what gives it its meaning."""
        state = {"position": self.position, **self.identity()}
        return state | ({"resumed_anyway": self._overridden} if self._overridden else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the number of ranks and workers may have changed since.

        With `data.resume_anyway` what differs is logged, and kept in the state from then on.

        Raises ValueError otherwise, if the order is not the one the state was saved with.
        """
        changed = self.changes(state)
        if changed and not self._config.resume_anyway:
            raise ValueError(
                f"checkpoint data state: {in_words(changed)}; restore what has changed, start the "
                f"data anew in another run.dir, or go on with {self._key}.resume_anyway=true"
            )
        self._overridden = list(state.get("resumed_anyway", []))
        self.position = state["position"]
        if changed:
            _log.warning("%s.resume_anyway: goes on although %s", self._key, in_words(changed))
            self._overridden.append({"position": self.position, "changed": changed})
            self.position = self.next_begin(self.position)

    def _batches_from(self, position: int) -> Generator[Batch]:
        inline = self._stream(self._take_note, 0, 1, position)
        if self._job is None:
            yield from inline
        else:
            # The first one is made here, or it would wait 3 s for a server that still imports.
            first = next(inline)
            yield first
            yield from run_workers(
                self._job,
                self._config.num_workers,
                (first["place"].next_position,),
                prefetch=self._config.prefetch,
                timeout=self._config.timeout_s,
                where=self.shards.where,
                waits=self._wait_for,
                key=self._key,
            )

    def _take_note(self, sample: int) -> None:
        self._sample = sample

    def _wait_for(self, says: Callable[[], str]) -> None:
        self._says = says
