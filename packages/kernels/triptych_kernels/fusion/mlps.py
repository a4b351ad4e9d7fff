"""Gated MLPs: down(act(gate(x)) * up(x)), with two projections or one for gate and up."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geglu import geglu
from ..swiglu import swiglu
from .probe import Forward, Match, agree, marked, others, random, with_attributes

# The linears of a block; in the second the gate's rows come before the up projection's.
_APART, _TOGETHER = ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj")
_ACTIVATIONS = ("act_fn", "activation_fn", "act")
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "geglu": F.gelu,
}


def is_candidate(module: nn.Module) -> bool:
    return _linears(module) is not None


def recognise(module: nn.Module) -> Match | str:
    linears = _linears(module)
    assert linears is not None
    activation = activation_of(module)
    if activation is None:
        return f"it has no {' or '.join(_ACTIVATIONS)}"
    if more := others(module, *linears, activation):
        return f"it has more than its linears: {', '.join(more)}"
    op = gate_of(getattr(module, activation))
    if op is None:
        return f"its {activation} is neither silu nor gelu"
    if not _computes(module, linears, op):
        return f"it computes something else than down_proj({op})"
    return Match(op, _forward(linears, op))


def activation_of(module: nn.Module) -> str | None:
    for name in _ACTIVATIONS:
        if name in module.__dict__ or module._modules.get(name) is not None:
            return name
    return None


def gate_of(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The op whose gate this activation is."""
    for op, gate in GATES.items():
        probes = (random(0, 512).to(dtype) * 3 for dtype in (torch.float32, torch.bfloat16))
        if all(agree(activation(x.clone()), gate(x)) for x in probes):
            return op
    return None


def apply_gate(op: str, gate: Tensor, up: Tensor) -> Tensor:
    if op == "swiglu":
        return swiglu(gate, up)
    return geglu(gate, up, approximate="tanh" if "tanh" in op else "none")


def _linears(module: nn.Module) -> tuple[str, ...] | None:
    for names in (_APART, _TOGETHER):
        if all(isinstance(module._modules.get(name), nn.Module) for name in names):
            return names
    return None


def _computes(module: nn.Module, linears: tuple[str, ...], op: str) -> bool:
    """Whether the module with three small matrices in its linears gives what the formula gives."""
    gate, up, down = (random(seed, 16, 16) for seed in range(3))
    matrices = [gate, up, down] if linears is _APART else [torch.cat([gate, up]), down]
    probe = with_attributes(
        module, **{name: _linear(matrix) for name, matrix in zip(linears, matrices, strict=True)}
    )
    x = random(3, 32, 16)
    want = F.linear(GATES[op](F.linear(x, gate)) * F.linear(x, up), down)
    return agree(probe.forward(x), want)


def _linear(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, matrix)


def _forward(linears: tuple[str, ...], op: str) -> Forward:
    def apart(self: Any, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        return self.down_proj(apply_gate(op, self.gate_proj(x), self.up_proj(x)))

    def together(self: Any, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(apply_gate(op, gate, up))

    return marked(apart if linears is _APART else together, op)
