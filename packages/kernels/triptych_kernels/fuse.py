"""Give the modules inside any model the ops of this package, and take them back.

A module is recognised by its structure and by what it computes, not by its class: its forward is
run on a few small random tensors on the CPU and must give what the op gives. Only the instance's
`forward` is replaced: parameters, their names, hooks and the class stay. The files of fusion/ say
what is recognised, and how.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import MethodType, ModuleType

import torch
from torch import nn

from .fusion import attention, experts, loss, mlps, norms, rotary
from .fusion.probe import ERRORS, Match, is_fused, is_replaced, replaced_op, said

_KINDS: tuple[ModuleType, ...] = (norms, mlps, experts, rotary, loss)
OPS = (
    "attention",
    "gated_rms_norm",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "moe_mlp",
    "rms_norm",
    "rope",
    "swiglu",
)


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
    """Replace the forward of every module in `model` that an op here can compute.

    Candidates are, with `ops` (all by default) limiting them to some:

    - "rms_norm", "gated_rms_norm", "layer_norm": a 1-D weight and an eps or variance_epsilon;
    - "swiglu", "geglu": linears gate_proj, up_proj, down_proj, or gate_up_proj, down_proj;
    - "moe_mlp": stacked experts, gate_up_proj (E, 2F, H) and down_proj (E, H, F);
    - "rope": attention whose forward calls apply_rotary_pos_emb;
    - "linear_cross_entropy": a model that takes `labels` and has a linear head. Called with
      labels, it computes its loss without the logits; those in its output (DeferredLogits, or
      without gradients a tensor like it) are computed when they are read;
    - "attention": models of transformers that run on sdpa, through its AttentionInterface.

    With `dry_run` nothing is replaced. Returns what was, or would be, replaced and what was left
    alone and why. state_dict, pickling and copying work as before; of a pickled model only the
    attention comes back fused. Call it before torch.compile, and before hooks that wrap forwards.

    Raises ValueError for an unknown op.
    """
    wanted = _wanted(ops)
    report = FuseReport()
    for name, module in model.named_modules():
        for kind in _KINDS:
            if kind.is_candidate(module):
                _fuse_module(kind, name, module, wanted, report, dry_run)
                break
    for name, module, config in attention.configurations(model):
        why_not = attention.why_not(module, config)
        if why_not or attention.OP not in wanted:
            report.left_alone[name] = why_not or _unwanted(attention.OP)
        else:
            report.replaced[name] = attention.OP
            if not dry_run:
                attention.switch(model, config)
    return report


def unfuse(model: nn.Module) -> list[str]:
    """Give the modules that `fuse` changed their own forward again, and return their names."""
    fused = [(name, module) for name, module in model.named_modules() if is_fused(module)]
    names = [name for name, module in fused if replaced_op(module)]
    for _, module in fused:
        del module.__dict__["forward"]
    return names + attention.unswitch(model)


def _fuse_module(
    kind: ModuleType,
    name: str,
    module: nn.Module,
    wanted: set[str],
    report: FuseReport,
    dry_run: bool,
) -> None:
    found = _recognise(kind, module)
    if isinstance(found, str):
        report.left_alone[name] = found
        return
    shown = ".".join(part for part in (name, found.shown) if part)
    if found.op.split()[0] not in wanted:
        report.left_alone[shown] = _unwanted(found.op)
        return
    report.replaced[shown] = found.op
    if dry_run:
        return
    module.forward = MethodType(found.forward, module)
    for child_name, forward in found.also.items():
        child = module.get_submodule(child_name)
        child.forward = MethodType(forward, child)


def _wanted(ops: Iterable[str] | None) -> set[str]:
    wanted = set(OPS) if ops is None else set(ops)
    if unknown := wanted - set(OPS):
        raise ValueError(
            f"fuse: ops must be among {', '.join(OPS)}, got {sorted(unknown)}; correct it"
        )
    return wanted


def _unwanted(op: str) -> str:
    return f"{op} is not among the ops asked for"


def _recognise(kind: ModuleType, module: nn.Module) -> Match | str:
    """The op that computes this candidate, or why there is none."""
    if is_fused(module):
        return "it is fused already"
    if is_replaced(module):
        return "something else has replaced its forward"
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            found: Match | str = kind.recognise(module)
    except ERRORS as error:
        return f"its forward does not run on a probe: {said(error)}"
    return found
