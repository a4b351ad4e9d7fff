"""The stacked experts of a mixture: gate_up_proj (E, 2F, H), down_proj (E, H, F).

transformers' ExpertsInterface dispatches such modules by one string for the whole model; here the
instance's forward is replaced like any other, so that a model may be fused in part.
"""

from typing import Any

from torch import Tensor, nn

from ..moe import moe_mlp, moe_mlp_ref
from .mlps import activation_of, gate_of
from .probe import Forward, Match, agree, marked, others, random, shape_of, with_attributes

_MATRICES = ("gate_up_proj", "down_proj")
_WIDTHS = 16, 8  # H and F of the probe


def is_candidate(module: nn.Module) -> bool:
    given = [module._parameters.get(name) for name in _MATRICES]
    return all(p is not None and len(shape_of(p)) == 3 for p in given)


def recognise(module: nn.Module) -> Match | str:
    gate_up, down = (shape_of(module._parameters[name]) for name in _MATRICES)
    num_experts, double, hidden = gate_up
    if down != (num_experts, hidden, double // 2) or double % 2:
        return (
            f"its matrices must be (E, 2F, H) and (E, H, F), got {tuple(gate_up)} and {tuple(down)}"
        )
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over ranks"
    activation = activation_of(module)
    if more := others(module, *_MATRICES, *([activation] if activation else [])):
        return f"it has more than two stacks of matrices: {', '.join(more)}"
    if activation is None or gate_of(getattr(module, activation)) != "swiglu":
        return "its activation is not silu"
    if not _computes(module, num_experts):
        return "it computes something else than moe_mlp"
    return Match("moe_mlp", _forward())


def _computes(module: nn.Module, num_experts: int) -> bool:
    hidden, width = _WIDTHS
    gate_up = random(0, num_experts, 2 * width, hidden) / hidden**0.5
    down = random(1, num_experts, hidden, width)
    x, noise = random(2, 12, hidden), random(3, 12, num_experts)
    weights, experts = noise.softmax(-1).topk(min(2, num_experts), dim=-1)
    probe = with_attributes(module, gate_up_proj=gate_up, down_proj=down)
    probe.__dict__["training"] = False
    return agree(
        probe.forward(x, experts, weights), moe_mlp_ref(x, gate_up, down, weights, experts)
    )


def _forward() -> Forward:
    def forward(
        self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        out = moe_mlp(
            flat,
            self.gate_up_proj,
            self.down_proj,
            top_k_weights.reshape(len(flat), -1),
            top_k_index.reshape(len(flat), -1),
        )
        return out.view(hidden_states.shape)

    return marked(forward, "moe_mlp")
