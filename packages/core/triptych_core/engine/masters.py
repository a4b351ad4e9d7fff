"""The fp32 masters of an engine, whatever its stage, and the weights made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from triptych_core.engine.light import LightEngine
from triptych_core.optim.shards import Flat, flat_masters


def flats_of(engine: Any) -> Iterable[Flat]:
    """The flat masters of this rank, in the order of the optimizer's groups."""
    if isinstance(engine, LightEngine):
        return engine.flats()
    return flat_masters(engine.optimizer)


@contextmanager
def changed_masters(engine: Any) -> Iterator[None]:
    """While masters are changed from outside; then the weights of forward and backward follow.

    They are set as the stage's own step does it. Every rank takes part.
    """
    if engine.zero_optimization_stage() == 3 and not isinstance(engine, LightEngine):
        # Parameters that ZeRO-3 keeps whole would hide what is read into their parts.
        engine.optimizer.checkpoint_event_prologue()
    yield
    _refresh_weights(engine)


def _refresh_weights(engine: Any) -> None:
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if isinstance(engine, LightEngine):
        engine.refresh_weights()
    elif stage < 3:
        optimizer.update_lp_params()
    else:
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer.checkpoint_event_epilogue()  # gathers those that are kept whole
