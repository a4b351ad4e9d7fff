"""Models without memory behind them: shapes, dtypes and ops of the real ones, values none.

What their ops hold beside their outputs is said here, since fake tensors do not show it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from triptych_kernels.dispatch import assume_device


def _loss_bytes(
    hidden_states: Tensor, weight: Tensor, bias: Any, labels: Any, weights: Any, *settings: Any
) -> tuple[int, int]:
    """One chunk of logits; and the head's gradient is fp32 where it is a sum over chunks."""
    num_targets, chunk_rows = settings[1] or len(hidden_states), settings[2]
    chunks = -(-num_targets // chunk_rows)
    rows, width = -(-num_targets // chunks), weight.element_size()
    logits = rows * (weight.shape[0] + weight.shape[1]) * width
    return logits, weight.numel() * (4 - width) if chunks > 1 else 0


def _attention_backward_bytes(d_out: Tensor, q: Tensor, k: Tensor, *rest: Any) -> tuple[int, int]:
    """FlashAttention 2's fp32 sum of dq, and dk and dv for every query head before they are
    summed over those that share a key head."""
    expanded = 2 * q.numel() * q.element_size() if q.shape[1] != k.shape[1] else 0
    return 4 * q.numel() + expanded, 0


def _experts_bytes(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, *rest: Any
) -> tuple[int, int]:
    """What the experts' activations are and what they give, a row for each choice of one here."""
    (hidden, width), parts = down.shape[1:], rest[-1]
    return weights.numel() // parts * (width + hidden) * x.element_size(), 0


def _experts_backward_bytes(
    d_out: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    pre: Tensor,
    *rest: Any,
) -> tuple[int, int]:
    """Rows of d_out or x, and the gradients of all that lies between gate_up and down."""
    hidden, width = down.shape[1:]
    columns = max(hidden + 4 * width, 2 * hidden + 2 * width)
    return len(pre) * columns * x.element_size(), 0


def _exchange_bytes(x: Tensor, *rest: Any) -> tuple[int, int]:
    """A copy of what is not contiguous."""
    return 0 if x.is_contiguous() else x.numel() * x.element_size(), 0


def _exchange_crosses(x: Tensor, sends: list[int], *rest: Any) -> float:
    """All but a rank's own share."""
    return x.numel() * x.element_size() * (1 - 1 / len(sends))


def _gather_crosses(x: Tensor, size: int, group: str) -> float:
    """A rank's rows to each of the others."""
    return float(x.numel() * x.element_size() * (size - 1))


def _sum_bytes(x: Tensor, size: int, group: str) -> tuple[int, int]:
    """What came from the others, and its sum in fp32."""
    return x.numel() * (x.element_size() + 4 // size), 0


def _sum_crosses(x: Tensor, size: int, group: str) -> float:
    """All but a rank's own rows."""
    return x.numel() * x.element_size() * (1 - 1 / size)


def _nothing_on_device(x: Tensor) -> tuple[int, int]:
    """What is made lies in host memory."""
    return 0, -x.numel() * x.element_size()


# What ops hold that their outputs do not show: op -> (bytes while it runs, bytes with its outputs).
WORKSPACES = {
    "triptych::linear_cross_entropy": _loss_bytes,
    "torch_attn::_varlen_attn_backward": _attention_backward_bytes,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward_bytes,
    "triptych::moe_mlp": _experts_bytes,
    "triptych::moe_mlp_backward": _experts_backward_bytes,
    "triptych_models::exchange": _exchange_bytes,
    "triptych_models::sum_rows": _sum_bytes,
    "triptych_models::to_host": _nothing_on_device,
}
# What ops send to other ranks.
CROSSINGS = {
    "triptych_models::exchange": _exchange_crosses,
    "triptych_models::gather_rows": _gather_crosses,
    "triptych_models::sum_rows": _sum_crosses,
}
_ATTENTION = "_scaled_dot_product_flash_attention"
# Products of attention as fake tensors of the CPU take it: op -> FLOPs.
FORMULAS = {
    f"aten::{_ATTENTION}_for_cpu": flop_registry[getattr(torch.ops.aten, _ATTENTION)],
    f"aten::{_ATTENTION}_for_cpu_backward": flop_registry[
        getattr(torch.ops.aten, f"{_ATTENTION}_backward")
    ],
}


@contextmanager
def pretend(*models: nn.Module, device: str = "cuda") -> Iterator[None]:
    """Inside, the models' tensors are fake and ops take the backends they take on `device`."""
    # Of the CPU, since autograd cannot run on fake tensors of a device that is not there.
    with FakeTensorMode(allow_non_fake_inputs=True), assume_device(device):
        for model in models:
            _make_fake(model)
        # Threads of other devices are not to be started.
        with torch.autograd.set_multithreading_enabled(False):
            yield


def _make_fake(model: nn.Module) -> None:
    """Put a fake tensor in the place of each parameter and buffer; tied ones stay one."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    like = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(like, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
