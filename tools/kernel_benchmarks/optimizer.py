"""AdamW: float32 masters, bfloat16 gradients and bfloat16 working copies, in place.

`eager` is the formula in torch's foreach ops; `torch` its fused AdamW, which wants the gradients in
float32, and a foreach copy. Of the dtype that is asked for are the gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .op import Call, Draw, Inputs, Op, Shape, Work, found

LR, BETA1, BETA2, EPS, DECAY, STEP = 1e-4, 0.9, 0.95, 1e-8, 0.1, 10
OPTIONS = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": DECAY}


def inputs_with(states: torch.dtype) -> Callable[[Shape, Draw], Inputs]:
    def inputs(s: Shape, draw: Draw) -> Inputs:
        grads = [draw.randn(s.elements) for _ in range(s.tensors)]
        params = [draw.randn(s.elements).float() for _ in grads]
        held = {
            "params": params,
            "exp_avgs": [torch.zeros_like(p, dtype=states) for p in params],
            "exp_avg_sqs": [torch.zeros_like(p, dtype=states) for p in params],
            "copies": [p.bfloat16() for p in params],
        }
        return Inputs(grads, held)

    return inputs


def eager_adamw(
    *grads: Tensor,
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
) -> tuple[Tensor, ...]:
    wide, m, v = ([x.float() for x in some] for some in (grads, exp_avgs, exp_avg_sqs))
    torch._foreach_lerp_(m, wide, 1 - BETA1)
    torch._foreach_mul_(v, BETA2)
    torch._foreach_addcmul_(v, wide, wide, 1 - BETA2)
    roots = torch._foreach_sqrt(v)
    torch._foreach_div_(roots, (1 - BETA2**STEP) ** 0.5)
    torch._foreach_add_(roots, EPS)
    torch._foreach_mul_(params, 1 - LR * DECAY)
    torch._foreach_addcdiv_(params, m, roots, -LR / (1 - BETA1**STEP))
    if exp_avgs[0].dtype != torch.float32:
        torch._foreach_copy_(exp_avgs, m)
        torch._foreach_copy_(exp_avg_sqs, v)
    torch._foreach_copy_(copies, params)
    return *params, *copies


def torch_adamw(
    *grads: Tensor,
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
) -> tuple[Tensor, ...]:
    count = torch.full((), float(STEP), device=params[0].device)
    torch._fused_adamw_(
        params,
        [g.float() for g in grads],
        exp_avgs,
        exp_avg_sqs,
        [],
        [count] * len(params),
        amsgrad=False,
        maximize=False,
        **OPTIONS,
    )
    torch._foreach_copy_(copies, params)
    return *params, *copies


def ours_adamw() -> Call:
    adamw_ = found("triptych_kernels", "adamw_")

    def call(*grads: Tensor, params: list[Tensor], copies: list[Tensor], **states: Any) -> Any:
        moments = states["exp_avgs"], states["exp_avg_sqs"]
        adamw_(params, grads, *moments, copies=copies, step=STEP, **OPTIONS)
        return *params, *copies

    return call


def half_elements(per_element: int) -> Callable[[Shape], Work]:
    """Work of moving that many times two bytes per element."""
    return lambda s: Work(per_element * s.tensors * s.elements)


ADAMW = Op(
    dims=("tensors", "elements"),
    shapes=[(1, 2**28), (256, 2**20)],
    tiny=(3, 100),
    inputs=inputs_with(torch.float32),
    providers={
        "eager": lambda: eager_adamw,
        "torch": lambda: torch_adamw,
        "ours": ours_adamw,
    },
    forward=half_elements(14),  # 28 bytes: gradient, copy; master and two states in and out
    backward=None,
)

ADAMW_HALF_STATES = Op(
    dims=ADAMW.dims,
    shapes=ADAMW.shapes,
    tiny=ADAMW.tiny,
    inputs=inputs_with(torch.bfloat16),
    providers={"eager": lambda: eager_adamw, "ours": ours_adamw},
    forward=half_elements(10),  # 20 bytes
    backward=None,
)
