"""Schedules, against the formulas in closed form."""

import itertools
import math

import pytest

from triptych_core.config import ScheduleConfig
from triptych_core.optim.schedule import lr_scale


def scales(steps: int = 100, **settings) -> list[float]:
    config = ScheduleConfig(**settings)
    return [lr_scale(config, step, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_warmup_rises_linearly_to_one(kind):
    values = scales(kind=kind, warmup_steps=10, decay_steps=20)
    assert values[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_falling_shapes_end_exactly_at_min_ratio(kind):
    values = scales(kind=kind, warmup_steps=10, decay_steps=20, min_ratio=0.1)
    assert values[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))


def test_cosine_is_half_way_in_the_middle():
    assert scales(kind="cosine")[49] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))


def test_wsd_is_flat_then_linear():
    values = scales(kind="wsd", warmup_steps=10, decay_steps=20)
    assert values[9:80] == [1.0] * 71
    assert values[89] == pytest.approx(0.5)


def test_constant_without_warmup_is_one():
    assert set(scales(kind="constant")) == {1.0}
