"""How layers are compiled: without that optimization of torch that is wrong without a word."""

from __future__ import annotations

import torch
from torch import nn
from torch._inductor import config

from triptych_models.checkpointing import compile_forward


class Watch:
    """A pass of the compiler that changes nothing, and keeps whether sums are mixed as it runs."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.seen.append(config.triton.mix_order_reduction)

    def uuid(self) -> None:
        """None: what is compiled with it is not kept for others."""


def test_sums_of_rows_and_columns_are_not_mixed() -> None:
    watch = Watch()
    layer = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    torch._dynamo.reset()
    mixed = {"post_grad_custom_post_pass": watch, "triton.mix_order_reduction": True}
    with config.patch(mixed):
        compile_forward(layer)
        layer(torch.ones(4, 8)).sum().backward()
    assert watch.seen == [False, False]  # forward and backward
    torch._dynamo.reset()
