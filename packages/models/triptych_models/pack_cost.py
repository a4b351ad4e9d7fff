"""What a model's work on a packed row grows with, as ratios that rows can be compared by."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

_MANY = 1 << 30
_FRAMES = 3000
_LENGTH = 4096  # of documents and images: with them ratios keep four digits


def pack_cost(
    flops: Callable[[Mapping[str, Any]], float], *, images: bool, sound: bool = False
) -> dict[str, float]:
    """Ratios of a model's `flops` in units of a squared document length.

    A row costs the sum of l·(l + linear) over documents of l tokens, `target` a target, `audio` a
    frame of a recording of 30 seconds, and `vision` times the sum of p·(p + vision_linear) over
    images of p patches. They are read off
    `flops`, so that frozen parts, shared key heads and active experts are in them.
    """

    def of(bounds: list[int], targets: int = 0, side: int = 0, **more: Any) -> float:
        grids = [(1, side, side)] if side else []
        batch = {"cu_seqlens": bounds, "num_targets": targets, "image_grid_thw": grids}
        return flops(batch | more)

    n = _LENGTH
    row = of([0, n])
    halved = of([0, n // 2, n])
    # Without softmax attention nothing grows with pairs: a token costs as much as many of them.
    pair = (row - halved) / (n * n / 2) or row / n / _MANY
    found = {
        "linear": round(row / pair / n - n),
        "target": round((of([0, n], targets=n) - row) / pair / n),
        "vision": 0.0,
        "vision_linear": 0,
    }
    if sound:
        heard = of([0, n], audio_lengths=torch.tensor([_FRAMES])) - row
        found["audio"] = round(heard / _FRAMES / pair)
    if images:
        small, large = 32, 64
        per_patch = {side: (of([0, n], side=side) - row) / side**2 for side in (small, large)}
        slope = (per_patch[large] - per_patch[small]) / (large**2 - small**2)
        found["vision"] = round(slope / pair, 4)
        found["vision_linear"] = round(per_patch[small] / slope) - small**2
    return found
