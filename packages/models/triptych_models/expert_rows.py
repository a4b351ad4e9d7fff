"""Rows of a group's ranks: all of them on every rank, and sums over ranks of each one's own.

Each is the other's backward. Sizes are known beforehand, so nothing here waits for the device.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


@torch.library.custom_op("triptych_models::gather_rows", mutates_args=())
def gather_rows(x: Tensor, size: int, group: str) -> Tensor:
    """x (T, …), as many on each of the `size` ranks → (size * T, …), rank after rank.

    Its gradient is summed over the ranks. All ranks of the group must call it.
    """
    out = x.new_empty(size * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=_ranks(group))
    return out


@torch.library.custom_op("triptych_models::sum_rows", mutates_args=())
def sum_rows(x: Tensor, size: int, group: str) -> Tensor:
    """x (size * T, …): for each rank its T rows → (T, …), this rank's, summed over the ranks.

    In fp32 or wider in the order of ranks, rounded once: the same bits each time. All ranks of the
    group must call it.
    """
    came = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(came, x.contiguous(), group=_ranks(group))
    wide = torch.promote_types(x.dtype, torch.float32)
    return came.unflatten(0, (size, -1)).sum(0, dtype=wide).to(x.dtype)


def largest(count: int, device: torch.device, group: str) -> int:
    """The largest count of a group's ranks; the host waits for it."""
    found = torch.tensor(count, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_ranks(group))
    return int(found)


@gather_rows.register_fake
def _(x: Tensor, size: int, group: str) -> Tensor:
    return x.new_empty(size * len(x), *x.shape[1:])


@sum_rows.register_fake
def _(x: Tensor, size: int, group: str) -> Tensor:
    return x.new_empty(len(x) // size, *x.shape[1:])


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.group = inputs


def _sum_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return sum_rows(grad, *ctx.group), None, None


def _gather_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return gather_rows(grad, *ctx.group), None, None


gather_rows.register_autograd(_sum_back, setup_context=_keep_group)
sum_rows.register_autograd(_gather_back, setup_context=_keep_group)


def _ranks(group: str) -> Any:
    return _resolve_process_group(cast("dist.GroupName", group))
