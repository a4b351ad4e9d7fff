"""What each input counts in an average of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

# A learning rate's decay: from 1 at the start to 0 at the end.
CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "minus-sqrt": lambda t: 1 - math.sqrt(t),
}


def uniform(number: int) -> list[float]:
    """The same for each."""
    return [1 / number] * number


def weighted(
    weights: Sequence[float], number: int, normalize: bool, sums_to_one: bool = True
) -> list[float]:
    """The weights as given; divided by their sum if asked for.

    Raises:
        ValueError: there are more or fewer than inputs, one is not finite, or their sum is not 1
            where it must be.
    """
    if len(weights) != number:
        raise ValueError(
            f"--weights: must be one number for each of {number} inputs, got {len(weights)}; "
            "separate them by commas"
        )
    total = math.fsum(weights)
    if not math.isfinite(total) or (normalize and total == 0):
        raise ValueError(f"--weights: must be finite with a sum, got {total}; give others")
    if normalize:
        return [weight / total for weight in weights]
    if sums_to_one and abs(total - 1) > 1e-6:
        raise ValueError(f"--weights: must add up to 1, got {total:g}; add --normalize")
    return list(weights)


def ema(decay: float, number: int) -> list[float]:
    """Those of `average = decay * average + (1 - decay) * next`, begun with the oldest."""
    later = [(1 - decay) * decay ** (number - 1 - k) for k in range(1, number)]
    return [decay ** (number - 1), *later]


def window(curve: str, steps: Sequence[int]) -> list[float]:
    """Those by which checkpoints of a constant learning rate stand for a decay over their window.

    The update between two checkpoints counts as much as the curve is high where it begins; so a
    checkpoint's coefficient is the curve's fall over the stretch that ends at it (Warmup-Stable and
    Merge, arXiv 2507.17634). Linear over equal distances is the uniform average.

    Args:
        curve: a key of CURVES.
        steps: of the checkpoints, rising; their numbers if they are not known.
    """
    if len(steps) == 1:
        return [1.0]
    # The window begins one mean distance before its first checkpoint.
    length = (steps[-1] - steps[0]) * len(steps) / (len(steps) - 1)
    heights = [CURVES[curve](1 - (steps[-1] - step) / length) for step in steps]
    return [before - after for before, after in zip([1.0, *heights], heights, strict=False)]
