"""Give the norms and gated MLPs inside any model the ops of this package, and take them back.

A module is recognised by its structure and by what it computes, not by its class: its forward is
run on a few small random tensors on the CPU, in float32 and bfloat16, and must give what the op
gives. Only the instance's `forward` is replaced: parameters, their names, hooks and the class stay.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gated_rms_norm import gated_rms_norm, gated_rms_norm_ref
from .geglu import geglu
from .rms_norm import rms_norm, rms_norm_ref
from .swiglu import swiglu

_LINEARS = ("gate_proj", "up_proj", "down_proj")
_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "geglu": F.gelu,
}
# What a forward that was not written for the probe may raise.
_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)


@dataclass
class FuseReport:
    """What `fuse` did: for each candidate its name, and the op it got or why it got none."""

    replaced: dict[str, str] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} modules fused, {len(self.left_alone)} left alone"]
        lines += [f"  {name}: {op}" for name, op in self.replaced.items()]
        lines += [f"  {name}: left alone, {why}" for name, why in self.left_alone.items()]
        return "\n".join(lines)


def fuse(
    model: nn.Module, *, ops: Iterable[str] | None = None, dry_run: bool = False
) -> FuseReport:
    """Replace the forward of every norm and gated MLP in `model` that an op here can compute.

    Candidates are modules with a 1-D `weight` and `eps` or `variance_epsilon` (RMSNorm, also
    zero-centred or gated), and modules with linears gate_proj, up_proj, down_proj and an act_fn
    (SwiGLU, GeGLU). `ops` limits the ops to some of "rms_norm", "gated_rms_norm", "swiglu",
    "geglu". With `dry_run` nothing is replaced. Returns what was, or would be, replaced and what
    was left alone and why. state_dict, pickling and copying work as before; a pickled model comes
    back unfused. Call it before torch.compile.

    Raises ValueError for an unknown op.
    """
    wanted = _wanted(ops)
    report = FuseReport()
    for name, module in model.named_modules():
        if not (_is_norm(module) or _is_gated_mlp(module)):
            continue
        found = _recognise(module)
        if isinstance(found, str):
            report.left_alone[name] = found
        elif found.op.split()[0] not in wanted:
            report.left_alone[name] = f"{found.op} is not among the ops asked for"
        else:
            report.replaced[name] = found.op
            if not dry_run:
                module.forward = MethodType(found.forward, module)
    return report


def unfuse(model: nn.Module) -> list[str]:
    """Give the modules that `fuse` changed their own forward again, and return their names."""
    fused = [(name, module) for name, module in model.named_modules() if _is_fused(module)]
    for _, module in fused:
        del module.__dict__["forward"]
    return [name for name, _ in fused]


@dataclass(frozen=True)
class _Match:
    op: str
    forward: Callable[..., Tensor]


def _wanted(ops: Iterable[str] | None) -> set[str]:
    known = {"rms_norm", "gated_rms_norm", "swiglu", "geglu"}
    wanted = known if ops is None else set(ops)
    if unknown := wanted - known:
        raise ValueError(
            f"fuse: ops must be among {', '.join(sorted(known))}, got {sorted(unknown)}; correct it"
        )
    return wanted


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    has_eps = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    return weight is not None and weight.ndim == 1 and has_eps


def _is_gated_mlp(module: nn.Module) -> bool:
    return all(isinstance(module._modules.get(name), nn.Module) for name in _LINEARS)


def _is_fused(module: nn.Module) -> bool:
    forward = getattr(module.__dict__.get("forward"), "__func__", None)
    return hasattr(forward, "triptych_op")


def _recognise(module: nn.Module) -> _Match | str:
    """The op that computes this candidate, or why there is none."""
    if _is_fused(module):
        return "it is fused already"
    own = module.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return "something else has replaced its forward"
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            return _recognise_norm(module) if _is_norm(module) else _recognise_mlp(module)
    except _ERRORS as error:
        return f"its forward does not run on a probe: {error}"


# Norms


def _recognise_norm(module: nn.Module) -> _Match | str:
    width = module._parameters["weight"].shape[0]  # type: ignore[union-attr]
    eps = "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"
    others = [n for n, p in module.named_parameters() if n != "weight" and p is not None]
    if others or any(True for _ in module.children()):
        return f"it has more than a weight: {', '.join(others) or 'children'}"
    if not isinstance(getattr(module, eps), float) or not width:
        return f"its {eps} must be a float and its weight not empty, got {getattr(module, eps)}"
    variants: list[tuple[str, int, Callable[..., Tensor], Callable[..., Tensor]]] = [
        ("rms_norm", 1, rms_norm_ref, _norm_forward(eps, False)),
        ("rms_norm (zero-centred)", 1, _zero_centered_ref, _norm_forward(eps, True)),
        ("gated_rms_norm", 2, gated_rms_norm_ref, _gated_norm_forward(eps)),
    ]
    error: Exception | None = None
    for op, num_inputs, plain, forward in variants:
        try:
            if _computes(module, plain, num_inputs, getattr(module, eps)):
                return _Match(op, forward)
        except _ERRORS as raised:  # of one input where two are needed, or the other way round
            error = raised if num_inputs == 1 else error
    return f"it gives other values than the norms here{f' ({error})' if error else ''}"


def _zero_centered_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_ref(x, weight, eps, zero_centered=True)


def _computes(module: nn.Module, plain: Callable[..., Tensor], num_inputs: int, eps: float) -> bool:
    """Whether the module with another weight gives what `plain` gives, in both dtypes."""
    width = module._parameters["weight"].shape[0]  # type: ignore[union-attr]
    for dtype in (torch.float32, torch.bfloat16):
        weight, *inputs = (
            _random(seed, *shape).to(dtype)
            for seed, shape in enumerate([(width,), *[(-(-512 // width), width)] * num_inputs])
        )
        probe = _with(module, _parameters={"weight": nn.Parameter(weight)})
        if not _agree(probe.forward(*inputs), plain(*inputs, weight, eps)):
            return False
    return True


def _norm_forward(eps: str, zero_centered: bool) -> Callable[..., Tensor]:
    def forward(self: Any, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())  # whatever the parameter was called
        return rms_norm(x, self.weight, getattr(self, eps), zero_centered=zero_centered)

    return _marked(forward, "rms_norm")


def _gated_norm_forward(eps: str) -> Callable[..., Tensor]:
    def forward(self: Any, *args: Tensor, **named: Tensor) -> Tensor:
        x, gate = (*args, *named.values())
        return gated_rms_norm(x, gate, self.weight, getattr(self, eps))

    return _marked(forward, "gated_rms_norm")


# Gated MLPs


def _recognise_mlp(module: nn.Module) -> _Match | str:
    if "act_fn" not in module.__dict__ and "act_fn" not in module._modules:
        return "it has no act_fn"
    others = set(module._modules) - {*_LINEARS, "act_fn"}
    if others or module._parameters:
        return (
            f"it has more than three linears: {', '.join(sorted([*others, *module._parameters]))}"
        )
    op = _gate_of(module)
    if op is None:
        return "its act_fn is neither silu nor gelu"
    linears = {name: nn.Linear(16, 16, bias=False) for name in _LINEARS}
    for seed, linear in enumerate(linears.values()):
        linear.weight.copy_(_random(seed, 16, 16))
    probe = _with(module, _modules={**module._modules, **linears})
    x = _random(3, 32, 16)
    hidden = _GATES[op](linears["gate_proj"](x)) * linears["up_proj"](x)
    if not _agree(probe.forward(x), linears["down_proj"](hidden)):
        return f"it computes something else than down_proj({op})"
    return _Match(op, _mlp_forward(op))


def _gate_of(module: nn.Module) -> str | None:
    for op, gate in _GATES.items():
        probes = (_random(0, 512).to(dtype) * 3 for dtype in (torch.float32, torch.bfloat16))
        if all(_agree(module.act_fn(x.clone()), gate(x)) for x in probes):  # type: ignore[operator]
            return op
    return None


def _mlp_forward(op: str) -> Callable[..., Tensor]:
    def gate_up(gate: Tensor, up: Tensor) -> Tensor:
        if op == "swiglu":
            return swiglu(gate, up)
        return geglu(gate, up, approximate="tanh" if "tanh" in op else "none")

    def forward(self: Any, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        return self.down_proj(gate_up(self.gate_proj(x), self.up_proj(x)))

    return _marked(forward, op)


# Probing


def _marked(forward: Callable[..., Tensor], op: str) -> Callable[..., Tensor]:
    forward.triptych_op = op  # type: ignore[attr-defined]
    return forward


def _with(module: nn.Module, **changed: Any) -> nn.Module:
    """A copy of the module that shares all but the changed attributes."""
    probe = copy.copy(module)
    probe.__dict__ = {**module.__dict__, **changed}
    probe.__dict__.pop("forward", None)  # bound to the module itself
    return probe


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _agree(got: Any, want: Tensor) -> bool:
    """Equal up to float32 rounding: of bfloat16 values 5 % may fall to the other side of a tie.

    A norm that rounds to bfloat16 at another place differs in a quarter of its values.
    """
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    if got.dtype == torch.float32:
        return torch.allclose(got, want, rtol=1e-5, atol=1e-5)
    close = torch.allclose(got.float(), want.float(), rtol=2e-2, atol=1e-3)
    return close and (got != want).float().mean().item() < 0.05
