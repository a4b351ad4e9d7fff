"""The forward and the backward of `moe_mlp` over torch's grouped_mm; the op is in moe.py."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Part = tuple[int, int]  # (rank, size): of all experts in order, the rank-th of size equal parts


class Plan(NamedTuple):
    """The S choices of experts that are here, sorted by expert; a row is one, in that order."""

    order: Tensor  # (S,) int64: the choice (token * k + j) of each row
    slots: Tensor  # (T, k) int64: the row of each choice, -1 where its expert is elsewhere
    offsets: Tensor  # (E,) int32: where the rows of each expert end


def _plan(experts: Tensor, num_experts: int, part: Part) -> Plan:
    """Sort the choices by expert; the host waits only to hear how many fell on a part of them."""
    rank, size = part
    check_experts(experts, num_experts * size)
    choices = experts.reshape(-1)
    if size > 1:  # those of other parts go to the end
        choices = choices - rank * num_experts
        here = (choices >= 0) & (choices < num_experts)
        choices = torch.where(here, choices, num_experts)
    # Short keys: a radix sort passes over them byte by byte.
    key = choices.to(torch.int16 if num_experts < 2**15 - 1 else torch.int32)
    by_expert, order = torch.sort(key, stable=True)
    every = torch.arange(num_experts, dtype=key.dtype, device=key.device)
    offsets = torch.searchsorted(by_expert, every, right=True, out_int32=True)
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order), device=order.device)
    if size > 1:
        order, slots = order[: int(offsets[-1])].clone(), torch.where(here, slots, -1)
    return Plan(order, slots.view(experts.shape), offsets)


def forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    name: str,
    part: Part,
) -> tuple[Tensor, Tensor, Plan]:
    """-> y (T, H); the pre-activation (S, 2F) and the plan, for the backward."""
    plan = _plan(experts, len(gate_up), part)
    if not len(plan.order):
        return x.new_zeros(x.shape), x.new_empty(0, gate_up.shape[1]), plan
    rows = x.index_select(0, plan.order // experts.shape[1])  # (S, H)
    pre = F.grouped_mm(rows, gate_up.contiguous().mT, offs=plan.offsets)
    del rows
    given = F.grouped_mm(_activate(name, pre), down.contiguous().mT, offs=plan.offsets)
    return _combine(name, given, plan.slots, weights), pre, plan


def backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    pre: Tensor,
    plan: Plan,
    name: str,
    wants: Sequence[bool],
) -> list[Tensor | None]:
    """-> the gradients of x, gate_up, down and weights; None where `wants` is False."""
    if not len(plan.order):
        like = (x, gate_up, down, weights)
        return [t.new_zeros(t.shape) if w else None for t, w in zip(like, wants, strict=True)]
    token = plan.order // weights.shape[1]
    scale = weights.reshape(-1).index_select(0, plan.order).float()  # (S,)
    dy_rows = dy.index_select(0, token)  # (S, H)
    d_hidden = F.grouped_mm(dy_rows, down.contiguous(), offs=plan.offsets)  # without the weight
    d_pre, weighted, d_scale = _activate_backward(name, pre, d_hidden, scale)
    del d_hidden
    d_down = _weight_gradient(dy_rows, weighted, plan.offsets) if wants[2] else None
    del dy_rows, weighted
    d_gate_up = None
    if wants[1]:
        d_gate_up = _weight_gradient(d_pre, x.index_select(0, token), plan.offsets)
    d_x = None
    if wants[0]:
        d_rows = F.grouped_mm(d_pre, gate_up.contiguous(), offs=plan.offsets)
        d_x = _combine(name, d_rows, plan.slots, None)
    d_weights = None
    if wants[3]:
        d_weights = d_scale[plan.slots].masked_fill_(plan.slots < 0, 0).to(weights.dtype)
    return [d_x, d_gate_up, d_down, d_weights]


def _weight_gradient(d_out: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """Per expert d_out.T @ rows: (S, M), (S, N) -> (E, M, N), zeros for experts without rows."""
    grad = F.grouped_mm(d_out.t(), rows, offs=offsets)
    if grad.is_cuda and torch.cuda.get_device_capability(grad.device)[0] >= 10:
        # Blackwell's kernel leaves the matrices of empty groups unwritten (pytorch #172439).
        empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0
        grad.masked_fill_(empty[:, None, None], 0)
    return grad


def _activate(name: str, pre: Tensor) -> Tensor:
    """silu(gate) * up: (S, 2F) -> (S, F)."""
    gate, up = pre.chunk(2, dim=-1)
    if name == "triton":
        from .triton_ops import swiglu as kernels

        return kernels.forward(gate, up)
    return F.silu(gate) * up


def _activate_backward(
    name: str, pre: Tensor, d_hidden: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Through hidden = scale * silu(gate) * up, given the gradient without the scale.

    pre (S, 2F), d_hidden (S, F), scale (S,) float32 -> the gradient of pre (S, 2F), hidden (S, F),
    and the gradient of scale (S,) float32.
    """
    if name == "triton":
        from .triton_ops import moe as kernels

        return kernels.activate_backward(pre, d_hidden, scale)
    gate, up = (half.float() for half in pre.chunk(2, dim=-1))
    wide, column = d_hidden.float(), scale[:, None]
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    rounded = silu.to(pre.dtype).float()  # the silu that the forward used
    hidden = (rounded * up).to(pre.dtype).float()
    d_scale = (wide * hidden).sum(-1)
    wide = wide * column
    d_gate = wide * up * (sigmoid + silu * (1 - sigmoid))
    d_pre = torch.cat([d_gate.to(pre.dtype), (wide * rounded).to(pre.dtype)], dim=-1)
    return d_pre, (hidden * column).to(pre.dtype), d_scale


def _combine(name: str, rows: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
    """Back to tokens: (S, H), slots (T, k), weights (T, k) or all 1 -> (T, H), summed in float32.

    Each token gathers its rows in the order of its choices: the same bits each time. A slot of -1
    adds nothing.
    """
    if name == "triton":
        from .triton_ops import moe as kernels

        return kernels.combine(rows, slots, weights)
    total = torch.zeros(len(slots), rows.shape[1], dtype=torch.float32, device=rows.device)
    is_part = len(rows) < slots.numel()
    for j in range(slots.shape[1]):
        slot = slots[:, j]
        picked = rows.index_select(0, slot.clamp_min(0) if is_part else slot).float()
        if is_part:
            picked = picked.masked_fill_(slot[:, None] < 0, 0)
        total += picked if weights is None else picked * weights[:, j, None].float()
    return total.to(rows.dtype)


def check_experts(experts: Tensor, num_experts: int) -> None:
    """Refuse experts that do not exist; on CUDA without a sync."""
    in_range = ((experts >= 0) & (experts < num_experts)).all()
    if experts.is_cuda:
        torch._assert_async(in_range, "moe_mlp: an expert lies outside 0..E-1")
    elif not in_range:
        raise ValueError(
            f"moe_mlp: experts must lie in 0..{num_experts - 1}, got {experts.min().item()}.."
            f"{experts.max().item()}; route over as many experts as there are"
        )
