"""Sequence parallelism: the ranks of a group hold one packed row, each 1/N of its tokens.

All but attention works on a rank's own tokens. Attention sees the whole row, each rank 1/N of the
heads; the way there and back is an all-to-all (DeepSpeed-Ulysses, arXiv 2309.14509). It is written
here and not taken from DeepSpeed 0.19.8, whose UlyssesSPAttentionHF takes over the vision tower's
attention too, gathers only one-dimensional positions, and whose gradients are N times too large
under ZeRO-1 and 2. Here every rank stays a data-parallel rank: the gradients of a row are the sum
over its ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that hold one row: rank r of `size` has the r-th part of its tokens.

    name is that of torch's process group. The default is a rank that has its row to itself.
    """

    name: str = ""
    size: int = 1
    rank: int = 0


ALONE = SequenceGroup()


def check_heads(num_heads: int, size: int) -> None:
    """ValueError unless the query heads can be dealt to `size` ranks."""
    if num_heads % size:
        raise ValueError(
            f"parallel.sequence: must divide the model's {num_heads} attention heads, got {size}; "
            f"take one of {', '.join(str(n) for n in _divisors(num_heads))}"
        )


@torch.library.custom_op("triptych_models::exchange", mutates_args=())
def exchange(x: Tensor, sends: Sequence[int], receives: Sequence[int], group: str) -> Tensor:
    """All-to-all of rows: sends[i] of x's rows go to rank i, receives[i] come from it, in order.

    x (sum(sends), …) → (sum(receives), …). Its backward is the same the other way round. All ranks
    of the group must call it.
    """
    out = x.new_empty(sum(receives), *x.shape[1:])
    dist.all_to_all_single(
        out,
        x.contiguous(),
        list(receives),
        list(sends),
        group=_resolve_process_group(cast(Any, group)),
    )
    return out


@exchange.register_fake
def _(x: Tensor, sends: Sequence[int], receives: Sequence[int], group: str) -> Tensor:
    return x.new_empty(sum(receives), *x.shape[1:])


def _keep_splits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.splits = inputs


def _exchange_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    sends, receives, group = ctx.splits
    return exchange(grad, receives, sends, group), None, None, None


exchange.register_autograd(_exchange_back, setup_context=_keep_splits)


def tokens_to_heads(
    q: Tensor, k: Tensor, v: Tensor, group: SequenceGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of T/N tokens → 1/N of the heads of all T tokens.

    q (T/N, Hq, D), k and v (T/N, Hkv, D) → q (T, Hq/N, D), k and v (T, H/N, D). H is Hkv or, where
    N does not divide that, the smallest multiple that it divides: a key head that queries of
    several ranks look at goes to each of them, and its gradients come back as a sum. The three
    are views of one tensor.
    """
    n = group.size
    repeats = n // math.gcd(k.shape[1], n)
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    parts = [x.unflatten(1, (n, -1)).transpose(0, 1) for x in (q, k, v)]  # (N, T/N, heads/N, D)
    sent = torch.cat(parts, 2).flatten(0, 1)
    splits = [len(q)] * n
    received = exchange(sent, splits, splits, group.name)  # (T, …, D)
    q, k, v = received.split([part.shape[2] for part in parts], 1)
    return q, k, v


def heads_to_tokens(out: Tensor, group: SequenceGroup) -> Tensor:
    """1/N of the heads of all T tokens → all heads of T/N tokens: (T, H/N, D) → (T/N, H, D)."""
    n = group.size
    splits = [len(out) // n] * n
    received = exchange(out, splits, splits, group.name).unflatten(0, (n, -1))
    return received.transpose(0, 1).flatten(1, 2)


def exchange_features(
    features: Sequence[Tensor], sends: Sequence[int], receives: Sequence[int], group: SequenceGroup
) -> list[Tensor]:
    """Image features, from the ranks that computed them to those that hold their tokens.

    features: several (M, H) of one dtype, their rows in the order of the image tokens; sends and
    receives as `image_part` counts them.
    """
    stacked = torch.stack(list(features), 1)  # (M, len(features), H)
    return list(exchange(stacked, sends, receives, group.name).unbind(1))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
