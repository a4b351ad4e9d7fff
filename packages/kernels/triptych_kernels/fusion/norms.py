"""RMSNorm, plain, zero-centred or gated, and LayerNorm."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gated_rms_norm import gated_rms_norm, gated_rms_norm_ref
from ..layer_norm import layer_norm
from ..rms_norm import rms_norm, rms_norm_ref
from .probe import (
    ERRORS,
    Forward,
    Match,
    agree,
    marked,
    others,
    random,
    said,
    shape_of,
    with_attributes,
)


def is_candidate(module: nn.Module) -> bool:
    """A 1-D weight and an epsilon; a LayerNorm may be without the weight."""
    if _is_layer_norm(module):
        return True
    weight = module._parameters.get("weight")
    has_eps = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    return weight is not None and len(shape_of(weight)) == 1 and has_eps


def recognise(module: nn.Module) -> Match | str:
    if _is_layer_norm(module):
        return _recognise_layer_norm(module)
    (width,) = shape_of(module._parameters["weight"])
    eps = "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"
    if more := others(module, "weight"):
        return f"it has more than a weight: {', '.join(more)}"
    if not isinstance(getattr(module, eps), float) or not width:
        return f"its {eps} must be a float and its weight not empty, got {getattr(module, eps)}"
    variants: list[tuple[str, int, Callable[..., Tensor], Forward]] = [
        ("rms_norm", 1, rms_norm_ref, _norm_forward(eps, False)),
        ("rms_norm (zero-centred)", 1, _zero_centered_ref, _norm_forward(eps, True)),
        ("rms_norm (rounded once)", 1, _rounded_once_ref, _norm_forward(eps, False, "torch")),
        ("gated_rms_norm", 2, gated_rms_norm_ref, _gated_norm_forward(eps)),
    ]
    error: Exception | None = None
    for op, num_inputs, plain, forward in variants:
        try:
            if _computes(module, plain, num_inputs, width, getattr(module, eps)):
                return Match(op, forward)
        except ERRORS as raised:  # of one input where two are needed, or the other way round
            error = raised if num_inputs == 1 else error
    return f"it gives other values than the norms here{f' ({said(error)})' if error else ''}"


def _zero_centered_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_ref(x, weight, eps, zero_centered=True)


def _rounded_once_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """OLMo 2's: only the product with the weight is rounded. F.rms_norm computes this."""
    return rms_norm_ref(x.float(), weight.float(), eps).to(x.dtype)


def _computes(
    module: nn.Module, plain: Callable[..., Tensor], num_inputs: int, width: int, eps: float
) -> bool:
    """Whether the module with another weight gives what `plain` gives, in both dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        weight, *inputs = (
            random(seed, *shape).to(dtype)
            for seed, shape in enumerate([(width,), *[(-(-512 // width), width)] * num_inputs])
        )
        probe = with_attributes(module, weight=weight)
        if not agree(probe.forward(*inputs), plain(*inputs, weight, eps)):
            return False
    return True


def _norm_forward(eps: str, zero_centered: bool, backend: str | None = None) -> Forward:
    def forward(self: Any, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())  # whatever the parameter was called
        return rms_norm(
            x, self.weight, getattr(self, eps), zero_centered=zero_centered, backend=backend
        )

    return marked(forward, "rms_norm")


def _gated_norm_forward(eps: str) -> Forward:
    def forward(self: Any, *args: Tensor, **named: Tensor) -> Tensor:
        x, gate = (*args, *named.values())
        return gated_rms_norm(x, gate, self.weight, getattr(self, eps))

    return marked(forward, "gated_rms_norm")


# LayerNorm: torch's own module, or one that keeps its constructor's attributes


def _is_layer_norm(module: nn.Module) -> bool:
    return isinstance(getattr(module, "normalized_shape", None), tuple) and hasattr(module, "eps")


def _recognise_layer_norm(module: nn.Module) -> Match | str:
    shape: tuple[int, ...] = module.normalized_shape  # type: ignore[assignment]
    if len(shape) != 1:
        return f"it normalises {len(shape)} dimensions, the op one"
    if more := others(module, "weight", "bias"):
        return f"it has more than a weight and a bias: {', '.join(more)}"
    given = {name: getattr(module, name, None) for name in ("weight", "bias")}
    present = [name for name, parameter in given.items() if parameter is not None]
    for dtype in (torch.float32, torch.bfloat16):
        changed = {name: random(seed, *shape).to(dtype) for seed, name in enumerate(present)}
        x = random(2, -(-512 // shape[0]), *shape).to(dtype)
        got = with_attributes(module, **changed).forward(x)
        want = F.layer_norm(x, shape, changed.get("weight"), changed.get("bias"), module.eps)  # type: ignore[arg-type]
        if not agree(got, want):
            return "it gives other values than a LayerNorm"
    return Match("layer_norm", _layer_norm_forward())


def _layer_norm_forward() -> Forward:
    def forward(self: Any, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        return layer_norm(x, self.weight, self.bias, self.eps)

    return marked(forward, "layer_norm")
