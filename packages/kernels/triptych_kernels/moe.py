"""Mixture of experts: y_t = sum_j w_tj * down_e (silu(gate_e x_t) * up_e x_t), with e = experts_tj.

Tokens are sorted by expert, so that each projection is one grouped matrix product. What waits for
the backward is x, the pre-activation H = [gate_e x; up_e x] and the routing: neither the gathered
copies of x nor what the down projection gave. The gradient of w_tj needs only <dy_t, y_tj>, and
with dA = down_e^T dy_t, which the backward computes anyway, that is <dA, silu(gate) * up>
(SonicMoE, Guo et al., arXiv 2512.14080).
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from . import moe_passes as passes
from .autocast import lowered
from .autograd import first_order
from .dispatch import choose, is_traced
from .moe_by_expert import by_expert
from .moe_passes import Part

WHOLE: Part = 0, 1


def moe_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    *,
    part: Part = WHOLE,
    backend: str | None = None,
) -> Tensor:
    """Send each token through its experts' SwiGLU blocks and add up what they give.

    x: (T, H); gate_up: (E, 2F, H), an expert's gate above its up projection; down: (E, H, F), all
    of one dtype; weights: (T, k), floating; experts: (T, k) integers in 0..E-1 (see `route`).
    Returns (T, H) in x's dtype. silu is rounded before the product, as transformers does; the sum
    over a token's experts is float32 and rounded once. Experts without a token get zero gradients.
    Bit-equal when repeated. Saved for the backward: T * k * 2F elements beside the arguments.

    part (rank, size): the stacks are the rank-th of `size` equal parts of all experts in order
    (expert parallelism). experts may then name any of size * E; what falls on other parts adds
    nothing, costs nothing, and gets no gradient. The host waits once for how many rows there are.

    The grouped products need H and F to be multiples of 16 bytes, and on CUDA bfloat16; other
    tensors take the reference, a loop over the experts that on CUDA waits for the device. Under
    torch.compile the op is one node either way.

    Raises ValueError for shapes or dtypes that do not fit, and on the CPU for an expert that does
    not exist (on CUDA that trips a device-side assertion).
    """
    x, gate_up, down = lowered(x), lowered(gate_up), lowered(down)
    _check(x, gate_up, down, weights, experts)
    # H decides and so does F; both widths are asked about, and a request is refused by either.
    names = {choose("moe_mlp", x, backend), choose("moe_mlp", down, backend)}
    if "reference" in names:
        return by_expert(x, gate_up, down, weights, experts, part)
    name = names.pop()
    if is_traced(x):
        return _moe_mlp(x, gate_up, down, weights, experts, name, *part)[0]
    return _MoEMLP.apply(x, gate_up, down, weights, experts, name, part)


def moe_mlp_ref(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    *,
    part: Part = WHOLE,
) -> Tensor:
    """`moe_mlp` in plain torch, one expert after the other."""
    return by_expert(x, gate_up, down, weights, experts, part)


class _MoEMLP(torch.autograd.Function):
    """The eager path: the same code as the custom op's, without its cost per call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        experts: Tensor,
        name: str,
        part: Part,
    ) -> Tensor:
        y, pre, plan = passes.forward(x, gate_up, down, weights, experts, name, part)
        ctx.save_for_backward(x, gate_up, down, weights, pre, *plan)
        ctx.name = name
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, weights, pre, *rest = ctx.saved_tensors
        wants = ctx.needs_input_grad[:4]
        plan = passes.Plan(*rest)
        grads = passes.backward(dy, x, gate_up, down, weights, pre, plan, ctx.name, wants)
        return (*grads, None, None, None)


@torch.library.custom_op("triptych::moe_mlp", mutates_args=())
def _moe_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    name: str,
    rank: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> y (T, H); for the backward the pre-activation and the three tensors of the plan."""
    y, pre, plan = passes.forward(x, gate_up, down, weights, experts, name, (rank, size))
    return y, pre, *plan


@_moe_mlp.register_fake
def _(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    name: str,
    rank: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows: Any = experts.shape[0] * experts.shape[1] // size
    if size > 1:
        with suppress(DynamicOutputShapeException):  # of a plan, which takes loads to be even
            num_rows = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(x.shape),
        x.new_empty(num_rows, gate_up.shape[1]),
        experts.new_empty(num_rows, dtype=torch.int64),
        experts.new_empty(experts.shape, dtype=torch.int64),
        experts.new_empty(gate_up.shape[0], dtype=torch.int32),
    )


@torch.library.custom_op("triptych::moe_mlp_backward", mutates_args=())
def _moe_mlp_backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    pre: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    name: str,
    wants: Sequence[bool],
) -> list[Tensor]:
    """-> the gradients that are wanted of x, gate_up, down and weights, in this order."""
    plan = passes.Plan(order, slots, offsets)
    grads = passes.backward(dy, x, gate_up, down, weights, pre, plan, name, wants)
    return [grad for grad in grads if grad is not None]


@_moe_mlp_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    pre: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    name: str,
    wants: Sequence[bool],
) -> list[Tensor]:
    like = (x, gate_up, down, weights)
    return [t.new_empty(t.shape) for t, wanted in zip(like, wants, strict=True) if wanted]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate_up, down, weights, _, ctx.name, *_ = inputs
    ctx.save_for_backward(x, gate_up, down, weights, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    wants = list(ctx.needs_input_grad[:4])
    grads = iter(_moe_mlp_backward(dy, *ctx.saved_tensors, ctx.name, wants))
    return (*(next(grads) if wanted else None for wanted in wants), None, None, None, None)


_moe_mlp.register_autograd(_differentiate, setup_context=_save)


def _check(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (x, gate_up, down, weights, experts)]
    fits = (
        [len(shape) for shape in shapes] == [2, 3, 3, 2, 2]
        and gate_up.shape[0] == down.shape[0]
        and gate_up.shape[1] == 2 * down.shape[2]
        and gate_up.shape[2] == down.shape[1] == x.shape[1]
        and weights.shape == experts.shape
        and len(experts) == len(x)
    )
    if not fits:
        raise ValueError(
            f"moe_mlp: x, gate_up, down, weights, experts must be (T, H), (E, 2F, H), (E, H, F), "
            f"(T, k), (T, k), got {', '.join(map(str, shapes))}; flatten the batch, and put each "
            f"expert's gate above its up projection"
        )
    if not x.dtype == gate_up.dtype == down.dtype or experts.dtype.is_floating_point:
        raise ValueError(
            f"moe_mlp: x, gate_up and down must be of one dtype and experts integers, got "
            f"{x.dtype}, {gate_up.dtype}, {down.dtype} and {experts.dtype}; convert them"
        )
