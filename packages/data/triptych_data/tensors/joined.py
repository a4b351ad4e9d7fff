"""Packed rows, each joined with the batch of tensors that another loader has next."""

from collections.abc import Callable, Iterator
from typing import Any

from triptych_data.batch import Batch
from triptych_data.loader import PackLoader
from triptych_data.tensors.loader import TensorLoader

Join = Callable[[Batch, Batch], Batch]
_LABELS = ("sample_keys", "sample_ids", "sample_epochs", "holes", "place")


class JoinedLoader:
    """The rows of `rows`, each joined by `join(row, batch)` with a batch of `tensors`.

    Both are at positions of their own, kept in one state. Rows are joined in this process, as they
    are asked for; what is read, decoded and packed comes from both loaders' workers.

    Of a joined row `sample_keys` and `holes` are of both, tensors' first, `<name>/<key>`; `streams`
    holds what either loader said, of rows as "", of tensors by name, for the ledger.
    """

    def __init__(self, rows: PackLoader, tensors: TensorLoader, join: Join, *, name: str) -> None:
        self.rows = rows
        self.tensors = tensors
        self.join = join
        self.name = name
        self._read: PackLoader | TensorLoader = rows  # what is waited for
        self.plan, self.builder, self.shards = rows.plan, rows.builder, rows.shards

    def __iter__(self) -> Iterator[Batch]:
        """Yield joined rows from both positions on, without end; raises as either loader does."""
        rows, tensors = iter(self.rows), iter(self.tensors)
        while True:
            self._read = self.rows
            row = next(rows)
            self._read = self.tensors
            batch = next(tensors)
            yield self.join(row, batch) | self._labels(row, batch)

    def doing(self) -> str:
        """What is being read now, for people; may be asked from another thread."""
        return self._read.doing()

    def describe(self) -> dict[str, int]:
        """Counts for people: samples of an epoch of either."""
        return self.rows.describe() | {"tensor samples": self.tensors.describe()["samples"]}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs of both."""
        return self.rows.state_dict() | {"tensors": self.tensors.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to both saved positions. Raises ValueError as either loader does, and for a state
        without tensors."""
        if "tensors" not in state:
            raise ValueError(
                "checkpoint data state: must hold a position in tensors, got none; it was saved "
                "without generation: begin another run.dir from its export"
            )
        self.rows.load_state_dict(state)
        self.tensors.load_state_dict(state["tensors"])

    def _labels(self, row: Batch, batch: Batch) -> Batch:
        """What says of a joined row which samples are in it."""
        return {
            "sample_keys": [
                *(f"{self.name}/{key}" for key in batch["sample_keys"]),
                *row["sample_keys"],
            ],
            "holes": [*batch["holes"], *row["holes"]],
            "streams": {"": _labels_of(row), self.name: _labels_of(batch)},
        }


def _labels_of(batch: Batch) -> Batch:
    return {name: batch[name] for name in _LABELS if name in batch}
