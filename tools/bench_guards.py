"""What watches over a run, switched on and off for bench_train.py, so that its cost is measured.

`guards=` is a list of these names, or empty: then not even the heartbeat is marked and no number
goes to the host between a step's backward pass and its update.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triptych_data.prepare import Place

GUARDS = ("loss", "watch", "ledger")


class _Nothing:
    """Stands where a guard does, and does nothing."""

    asks = False

    @property
    def heart(self) -> "_Nothing":
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


@dataclass(frozen=True)
class Guarded:
    """What the loop is given."""

    oversight: Any
    stream: Iterator[dict[str, Any]]
    on_step: list[Callable[[int], None]]


def read_guards(words: list[str]) -> list[str]:
    """The last word `guards=a,b`; without one the loss guard alone, as configurations begin."""
    found = [word.partition("=")[2] for word in words if word.startswith("guards=")]
    names = [name for name in (found or ["loss"])[-1].split(",") if name]
    for name in names:
        if name not in GUARDS:
            raise ValueError(f"guards: must be of {', '.join(GUARDS)}, got '{name}'; name those")
    return names


@contextmanager
def guarded(
    names: list[str], config: Any, runtime: Any, engine: Any, metrics: Any, batches: Any
) -> Iterator[Guarded]:
    """The guards of these names, wired as stages/running.py wires them."""
    from triptych_core.faults.oversight import Oversight
    from triptych_core.faults.watch import Watch
    from triptych_data.plan.ledger import Ledger

    model, watch, on_step = engine.module, None, []
    if "watch" in names:
        watch = Watch(config.run, model, model.layers(), lambda: "")
    seen = {"asked": watch.stop, "heart": watch.heart} if watch else {}
    oversight = Oversight(engine, config, metrics.note, **seen) if names else _Nothing()
    if "ledger" in names:
        ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
        ledger = Ledger(config.run.dir / "ledger", **ranks)
        batches, on_step = ledger.watch(_with_places(batches, **ranks)), [ledger.write]
    try:
        yield Guarded(oversight, batches, on_step)
    finally:
        if watch:
            watch.close()


def _with_places(batches: Any, *, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
    """Batches as a loader gives them: with their samples' names and their place in the order."""
    for number, batch in enumerate(batches):
        n = len(batch["cu_seqlens"]) - 1
        begin = (number * world_size + rank) * n
        place = Place(begin, begin + n, (number + 1) * world_size * n, 0)
        ids = list(range(begin, begin + n))
        keys = [f"{sample:012d}" for sample in ids]
        yield batch | {"sample_keys": keys, "sample_ids": ids, "holes": [], "place": place}
