"""Autocast for ops of which torch does not know that they are matrix products."""

import torch
from torch import Tensor


def lowered(x: Tensor) -> Tensor:
    """x as a product of torch takes it: under autocast in its dtype, though float64 as it is."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))
