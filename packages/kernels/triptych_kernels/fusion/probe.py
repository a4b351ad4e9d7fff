"""How a module is recognised: its forward is run on small random tensors and compared."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# What a forward that was not written for the probe may raise: anything, such as an assert.
ERRORS = Exception

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Match:
    """The op that computes a module, and the forward that calls it.

    `also` holds the forwards of children, by their names; `shown` is the child that a report
    names, "" for the module itself.
    """

    op: str
    forward: Forward
    also: dict[str, Forward] = field(default_factory=dict)
    shown: str = ""


def marked(forward: Forward, op: str) -> Forward:
    """The forward, so that `unfuse` knows it; an op of "" is not named in its answer."""
    forward.__name__ = "forward"  # pickle looks the bound method up by it, and finds the class's
    forward.triptych_op = op  # type: ignore[attr-defined]
    return forward


def is_fused(module: nn.Module) -> bool:
    return hasattr(_own_forward(module), "triptych_op")


def is_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not its class's."""
    own = module.__dict__.get("forward")
    return own is not None and _own_forward(module) is not type(module).forward


def replaced_op(module: nn.Module) -> str:
    return getattr(_own_forward(module), "triptych_op", "")


def _own_forward(module: nn.Module) -> Any:
    return getattr(module.__dict__.get("forward"), "__func__", None)


def with_attributes(module: nn.Module, **changed: Any) -> nn.Module:
    """A copy of the module that shares all but the changed attributes.

    They hide parameters and children of the same name. No nn.Module or nn.Parameter is built,
    which deepspeed.zero.Init would partition.
    """
    probe = copy.copy(module)
    probe.__dict__ = {**module.__dict__, **changed}
    probe.__dict__.pop("forward", None)  # bound to the module itself
    return probe


def random(seed: int, *shape: int) -> Tensor:
    """float32 on the CPU, also where a context or library has replaced torch.randn."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.normal(0.0, 1.0, shape, generator=generator, dtype=torch.float32, device="cpu")


def agree(got: Any, want: Tensor) -> bool:
    """Equal up to float32 rounding: of bfloat16 values 5 % may fall to the other side of a tie.

    A norm that rounds to bfloat16 at another place differs in a quarter of its values.
    """
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    if got.dtype == torch.float32:
        return torch.allclose(got, want, rtol=1e-5, atol=1e-5)
    close = torch.allclose(got.float(), want.float(), rtol=2e-2, atol=1e-3)
    return close and (got != want).float().mean().item() < 0.05


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The whole shape, also of a parameter that ZeRO-3 has partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def said(error: Exception) -> str:
    return str(error) or type(error).__name__


def others(module: nn.Module, *known: str) -> list[str]:
    """Names of parameters, buffers and children that are not among `known`."""
    kinds = (module._parameters, module._buffers, module._modules)
    names = [name for kind in kinds for name, held in kind.items() if held is not None]
    return sorted(set(names) - set(known))
