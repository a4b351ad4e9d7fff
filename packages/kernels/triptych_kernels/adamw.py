"""AdamW on many tensors at once, with bfloat16 working copies and, if wanted, bfloat16 states.

p <- (1 - lr wd) p;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), as torch.optim.AdamW computes it.
A bfloat16 state is rounded stochastically, to one of its two neighbours with the odds that make
the mean right: rounded to the nearest, v would stand still where 1 - b2 is below half a step of
bfloat16 (1/256), and so would m near its end.

Bytes per element with a bfloat16 gradient, a copy and float32 states: 2 + 8 + 8 + 8 + 2 = 28; with
bfloat16 states 20.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import choose, is_traced

_PIECE = 1 << 22  # elements that the reference works on at once: its temporaries are that large


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    copies: Sequence[Tensor | None] | None = None,
    grad_scale: Tensor | None = None,
    seed: int = 0,
    backend: str | None = None,
) -> None:
    """Make one step of AdamW on N parameters, in place; on CUDA in one launch.

    params: N of any shapes (...), float32; grads: of the same sizes, bfloat16 or float32; exp_avgs,
    exp_avg_sqs: the moments, of the same shapes, all float32 or all bfloat16; copies: for each
    parameter a bfloat16 tensor that gets its new value, or None; grad_scale () float32: what
    gradients are multiplied by first, read on the device only; where it is not finite, nothing
    changes (gradients that overflowed have no norm to be clipped by). step: 1 for the first. seed:
    of the stochastic rounding of bfloat16 states; the same seed gives the same bits. All on one
    device; params, states and copies contiguous. -> None

    Raises ValueError naming the index of a tensor that does not fit.
    """
    if not params:
        return
    copies = [None] * len(params) if copies is None else copies
    _check(params, grads, exp_avgs, exp_avg_sqs, copies, step)
    if grad_scale is not None:
        _check_scale(grad_scale, params[0].device)
    half_states = exp_avgs[0].dtype == torch.bfloat16
    needs = ("bfloat16 states",) if half_states else ()
    name = choose("adamw", params[0].view(-1), backend, needs)
    options = [lr, beta1, beta2, eps, weight_decay]
    if is_traced(params[0]):
        held = [i for i, copy in enumerate(copies) if copy is not None]
        given = [copy for copy in copies if copy is not None]
        rows = [list(x) for x in (params, grads, exp_avgs, exp_avg_sqs)]
        _adamw(*rows, given, held, options, step, grad_scale, seed, name)
    else:
        _run(
            *(params, grads, exp_avgs, exp_avg_sqs, copies),
            options=options,
            step=step,
            grad_scale=grad_scale,
            seed=seed,
            name=name,
        )


def adamw_ref(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    copies: Sequence[Tensor | None] | None = None,
    grad_scale: Tensor | None = None,
    seed: int = 0,
) -> None:
    """`adamw_` in plain torch, in place, piece by piece; computes in the parameters' dtype."""
    if grad_scale is not None and not grad_scale.isfinite():
        return
    root = math.sqrt(1 - beta2**step)
    generator = torch.Generator(params[0].device).manual_seed(seed)
    copies = [None] * len(params) if copies is None else copies
    for row in zip(params, grads, exp_avgs, exp_avg_sqs, copies, strict=True):
        for p, g, exp_avg, exp_avg_sq, copy in _pieces(row):
            g = g.to(p.dtype) if grad_scale is None else g.to(p.dtype) * grad_scale.to(p.dtype)
            m = exp_avg.to(p.dtype).lerp(g, 1 - beta1)
            v = exp_avg_sq.to(p.dtype).mul(beta2).addcmul(g, g, value=1 - beta2)
            p.mul_(1 - lr * weight_decay)
            p.addcdiv_(m, (v.sqrt() / root).add_(eps), value=-lr / (1 - beta1**step))
            for state, value in ((exp_avg, m), (exp_avg_sq, v)):
                rounds = state.dtype == torch.bfloat16
                state.copy_(round_stochastically(value.float(), generator) if rounds else value)
            if copy is not None:
                copy.copy_(p)


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """x (...) float32 -> bfloat16: 16 random bits are added to the 16 that are then cut off."""
    noise = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    cut = ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isnan(), x, cut).to(torch.bfloat16)


def _pieces(row: tuple[Any, ...]) -> Iterator[list[Any]]:
    flat = [None if x is None else x.reshape(-1).split(_PIECE) for x in row]
    for index in range(len(flat[0] or ())):
        yield [None if pieces is None else pieces[index] for pieces in flat]


def _run(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    options: Sequence[float],
    step: int,
    grad_scale: Tensor | None,
    seed: int,
    name: str,
) -> None:
    lr, beta1, beta2, eps, weight_decay = options
    grads = [g.contiguous() for g in grads]  # torch's too walks through memory, whatever strides
    if name == "triton":
        from .triton_ops import adamw as kernels

        constants = kernels.Constants(
            keep=1 - lr * weight_decay,
            step_size=lr / (1 - beta1**step),
            fresh1=1 - beta1,
            beta2=beta2,
            fresh2=1 - beta2,
            root=math.sqrt(1 - beta2**step),
            eps=eps,
        )
        rows = list(zip(params, grads, exp_avgs, exp_avg_sqs, copies, strict=True))
        kernels.adamw(rows, constants, grad_scale, seed)
        return
    if name == "reference":
        adamw_ref(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            step=step,
            copies=copies,
            grad_scale=grad_scale,
            seed=seed,
        )
        return
    wide = [g.to(p.dtype).view(p.shape) for p, g in zip(params, grads, strict=True)]
    torch._fused_adamw_(
        list(params),
        wide if grad_scale is None else list(torch._foreach_mul(wide, grad_scale)),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        [torch.full((), float(step), device=params[0].device)] * len(params),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        found_inf=None if grad_scale is None else (~grad_scale.isfinite()).float(),
    )
    held = [(copy, p) for copy, p in zip(copies, params, strict=True) if copy is not None]
    if held:
        torch._foreach_copy_([copy for copy, _ in held], [p for _, p in held])


@torch.library.custom_op(
    "triptych::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "copies")
)
def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    held: list[int],
    options: list[float],
    step: int,
    grad_scale: Tensor | None,
    seed: int,
    name: str,
) -> None:
    """`held`: which parameters the copies are of."""
    of = dict(zip(held, copies, strict=True))
    every = [of.get(index) for index in range(len(params))]
    _run(params, grads, exp_avgs, exp_avg_sqs, every, options, step, grad_scale, seed, name)


@_adamw.register_fake
def _(*args: object) -> None:
    return None


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    step: int,
) -> None:
    if step < 1:
        raise ValueError(f"adamw_: step must be at least 1, got {step}; the first step is 1")
    lengths = [len(x) for x in (params, grads, exp_avgs, exp_avg_sqs, copies)]
    if len(set(lengths)) != 1:
        raise ValueError(
            f"adamw_: there must be a gradient, two states and a copy or None per parameter, got "
            f"{lengths}; make the lists the same length"
        )
    device, states = params[0].device, exp_avgs[0].dtype
    floats = (torch.bfloat16, torch.float32)
    for index, (p, g, m, v, copy) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, copies, strict=True)
    ):
        _check_one(f"params[{index}]", p, p, device, (torch.float32,))
        _check_one(f"grads[{index}]", g, p, device, floats, held=False)
        _check_one(f"exp_avgs[{index}]", m, p, device, (states,) if states in floats else floats)
        _check_one(f"exp_avg_sqs[{index}]", v, p, device, (states,))
        if copy is not None:
            _check_one(f"copies[{index}]", copy, p, device, (torch.bfloat16,))


def _check_scale(scale: Tensor, device: torch.device) -> None:
    if (scale.numel(), scale.dtype, scale.device) != (1, torch.float32, device):
        raise ValueError(
            f"adamw_: grad_scale must be one float32 on {device}, got {tuple(scale.shape)} "
            f"{scale.dtype} on {scale.device}; make it there, a copy would wait for the device"
        )


def _check_one(
    where: str,
    x: Tensor,
    like: Tensor,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    held: bool = True,
) -> None:
    fits = x.dtype in dtypes and x.device == device and x.numel() == like.numel()
    if fits and (not held or x.is_contiguous()):
        return
    raise ValueError(
        f"adamw_: {where} must be {'contiguous, ' if held else ''}of {like.numel()} elements, "
        f"{' or '.join(str(d) for d in dtypes)}, on {device}, got {tuple(x.shape)} {x.dtype} on "
        f"{x.device}{'' if x.is_contiguous() else ', with gaps'}; make it so"
    )
