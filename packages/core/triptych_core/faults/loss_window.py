"""Whether a step's loss and gradient norm are like those before: on the device, from end to end.

A step is judged by the median and the median absolute deviation (Hampel 1974) of the last steps
that were taken. What was left out never enters the window, so that one value that is no number, or
a thousand times too large, moves nothing: a mean and a standard deviation would pass a second spike
after the first, and one NaN among 128 would end the judging.

Some 15 launches on 2 x 128 numbers a step, none of which the host waits for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAD_TO_SIGMA = 1.4826  # of a normal distribution
MIN_SPREAD = 0.05  # of the median: where nothing varies, everything would be a spike


class LossWindow:
    """The last `size` pairs of loss and gradient norm that were taken.

    Args:
        size: pairs.
        sigma: deviations above the median that make a spike.
        min_steps: pairs before there are spikes.
        device: where the pairs are, and stay.
    """

    def __init__(self, size: int, sigma: float, min_steps: int, device: torch.device) -> None:
        self._sigma, self._min_steps = sigma, min(min_steps, size)
        self._values = torch.full((2, size), torch.nan, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)  # ever taken

    @torch.no_grad()
    def limits(self) -> Tensor:
        """Above which loss and norm are spikes, (2,) fp32; infinite while too few were taken."""
        size = self._values.shape[1]
        held = self._count.clamp(max=size)
        middle = ((held - 1).clamp(min=0) // 2).expand(2, 1)
        median = self._values.sort(dim=1).values.gather(1, middle)  # (2, 1): NaN sorts last
        spread = (self._values - median).abs().sort(dim=1).values.gather(1, middle)
        spread = torch.maximum(MAD_TO_SIGMA * spread, MIN_SPREAD * median.abs())
        limit = (median + self._sigma * spread).squeeze(1)
        return torch.where(held >= self._min_steps, limit, torch.inf)

    @torch.no_grad()
    def add(self, pair: Tensor, is_taken: Tensor) -> None:
        """Keep a pair, (2,) fp32, in the oldest one's place, where `is_taken`, () bool."""
        place = (self._count % self._values.shape[1]).expand(2, 1)
        kept = torch.where(is_taken, pair[:, None], self._values.gather(1, place))
        self._values.scatter_(1, place, kept)
        self._count += is_taken

    def state_dict(self) -> dict[str, Any]:
        """What it holds, oldest first; waits for the device."""
        count, size = int(self._count), self._values.shape[1]
        order = torch.arange(max(0, count - size), count) % size
        losses, norms = self._values.cpu()[:, order].tolist()
        return {"losses": losses, "grad_norms": norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved window, of any size: the newest are kept."""
        size = self._values.shape[1]
        pairs = torch.tensor([state["losses"], state["grad_norms"]])[:, -size:]
        self._values.fill_(torch.nan)
        self._values[:, : pairs.shape[1]] = pairs.to(self._values.device)
        # Where the next one goes: behind the newest, or over the oldest.
        self._count.fill_(pairs.shape[1])
