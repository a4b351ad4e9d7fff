"""The averages of an engine's weights in the weights' place, for a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from triptych_core.engine.masters import changed_masters, flats_of
from triptych_core.optim.ema import AVERAGE

# Elements that are exchanged at a time: what the exchange needs beside both.
_CHUNK = 1 << 24


@contextmanager
def averaged_weights(engine: Any) -> Iterator[None]:
    """While a model runs, or is exported, with the averages of its weights, where it has any.

    Masters and averages change places, and change back: to the last bit. Every rank takes part.
    """
    states = engine.optimizer.state
    pairs = [
        (flat.master, states[flat.master][AVERAGE])
        for flat in flats_of(engine)
        if AVERAGE in states.get(flat.master, {})
    ]
    if not pairs:
        yield
        return
    _exchange(engine, pairs)
    try:
        yield
    finally:
        _exchange(engine, pairs)


@torch.no_grad()
def _exchange(engine: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    with changed_masters(engine):
        for master, average in pairs:
            flats = master.detach().view(-1), average.view(-1)
            for ours, theirs in zip(*(flat.split(_CHUNK) for flat in flats), strict=True):
                kept = ours.clone()
                ours.copy_(theirs)
                theirs.copy_(kept)
