"""The reference of `moe_mlp`: plain torch, one expert after the other."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import is_traced
from .moe_passes import Part, check_experts
from .recompute import recomputed_gradients


def by_expert(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, part: Part = (0, 1)
) -> Tensor:
    """As `moe_mlp`. While tracing, how many tokens an expert gets is not known: one node then."""
    run = _moe_mlp_by_expert if is_traced(x) else _run
    return run(x, gate_up, down, weights, experts, *part)


def _run(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    rank: int,
    size: int,
) -> Tensor:
    check_experts(experts, len(gate_up) * size)
    first = len(gate_up) * rank
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for expert, (gate_up_e, down_e) in enumerate(zip(gate_up, down, strict=True)):
        token, choice = torch.where(experts == first + expert)
        gate, up = F.linear(x[token], gate_up_e).chunk(2, dim=-1)
        given = F.linear(F.silu(gate) * up, down_e)  # (n, H)
        scale = weights[token, choice, None].to(wide)
        y = y.index_add(0, token, given.to(wide) * scale)
    return y.to(x.dtype)


@torch.library.custom_op("triptych::moe_mlp_by_expert", mutates_args=())
def _moe_mlp_by_expert(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    rank: int,
    size: int,
) -> Tensor:
    return _run(x, gate_up, down, weights, experts, rank, size)


@_moe_mlp_by_expert.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("triptych::moe_mlp_by_expert_backward", mutates_args=())
def _moe_mlp_by_expert_backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    rank: int,
    size: int,
) -> list[Tensor]:
    """-> dx, dgate_up, ddown, dweights."""

    def forward(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        return _run(x, gate_up, down, weights, experts, rank, size)

    return recomputed_gradients(forward, (x, gate_up, down, weights), [dy])


@_moe_mlp_by_expert_backward.register_fake
def _(dy: Tensor, *inputs: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs[:4]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, rank, size = inputs
    ctx.save_for_backward(*tensors)
    ctx.part = rank, size


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return (*_moe_mlp_by_expert_backward(dy, *ctx.saved_tensors, *ctx.part), None, None, None)


_moe_mlp_by_expert.register_autograd(_differentiate, setup_context=_save)
