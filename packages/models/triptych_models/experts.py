"""A mixture of experts: a router in fp32, stacked experts, and their tokens' way to other ranks.

In an ExpertGroup of N ranks each holds 1/N of the experts of every layer. Every rank of it sees the
tokens of all, runs those its experts were chosen for (none is dropped), and gives each rank the sum
for its tokens. With k choices a token goes to nearly every rank where N is at most k; sent once to
each, and not once a choice, it crosses k / N times less often, and what crosses has the same size
whatever the routers do. Every rank stays a data-parallel rank: an expert's gradient holds the
tokens of all ranks of the group, so summed over the ranks that hold the same experts it is the sum
over all ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych_kernels import moe_mlp, route

from .balance import RouterFigures, Segments, router_figures
from .expert_rows import gather_rows, largest, sum_rows
from .layout import MixtureShape, StoredExperts
from .sequence import ALONE, SequenceGroup


def _leave(parameter: nn.Parameter) -> None:
    """Nothing to say of an expert that every rank has."""


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that hold a layer's experts between them: rank r of `size` has the r-th part.

    name is that of torch's process group; mark tells whoever sums gradients that a parameter is a
    part of one, before anything else sees it. The default is a rank that has all experts.
    """

    name: str = ""
    size: int = 1
    rank: int = 0
    mark: Callable[[nn.Parameter], None] = _leave


EVERY_EXPERT = ExpertGroup()


class Router(nn.Module):
    """Scores every expert for each token; logits are computed in fp32 whatever the weight's dtype.

    Where the shape says so, experts are chosen by score + e_score_correction_bias, a buffer (E,)
    that no gradient moves (see `Mixture.after_update`); it stays fp32, where steps of 0.001 last.

    Args:
        shape: of the sparse layers.
        hidden_size: of a token.
        dtype: of the weight (E, H).
        stored: the block's name in directories.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self, shape: MixtureShape, hidden_size: int, *, dtype: torch.dtype, stored: StoredExperts
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.num_experts, hidden_size, dtype=dtype))
        self.shape, self.stored = shape, stored
        # float() after: zero.Init makes zeros in the model's dtype
        bias = torch.zeros(shape.num_experts).float() if shape.has_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, H) → logits (T, E), weights (T, k) and experts (T, k) int64, the first two fp32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(wide), self.weight.to(wide))
        shape, bias = self.shape, self.e_score_correction_bias
        weights, experts = route(
            logits, shape.top_k, normalize=shape.normalize, score=shape.score, bias=bias
        )
        return logits, weights * shape.scale if shape.scale != 1 else weights, experts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self.e_score_correction_bias
        super()._apply(fn, recurse)  # behind .to(), .bfloat16(), .cuda()
        moved = self.e_score_correction_bias
        if kept is not None and moved is not None and moved.dtype != kept.dtype:
            self.e_score_correction_bias = kept.to(moved.device)
        return self


class Experts(nn.Module):
    """This rank's part of a layer's SwiGLU experts, stacked: gate above up (E/N, 2F, H), down.

    Under transformers' names; `stored` is how directories have them. Raises ValueError where the
    group's ranks do not divide the experts.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        width: int,
        *,
        dtype: torch.dtype,
        stored: StoredExperts,
        group: ExpertGroup = EVERY_EXPERT,
    ) -> None:
        super().__init__()
        if num_experts % group.size:
            raise ValueError(
                f"parallel.expert: must divide the model's {num_experts} experts, got {group.size};"
                " take a divisor"
            )
        self.num_experts, self.group, self.stored = num_experts, group, stored
        self.hidden_size, self.width = hidden_size, width
        here = num_experts // group.size
        self.gate_up_proj = nn.Parameter(torch.empty(here, 2 * width, hidden_size, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(here, hidden_size, width, dtype=dtype))
        for parameter in self.parameters():
            parameter.expert_part = (group.rank, group.size)  # type: ignore[attr-defined]
            group.mark(parameter)

    @property
    def here(self) -> range:
        """The numbers, in the whole layer, of the experts that this rank has."""
        count = self.num_experts // self.group.size
        return range(self.group.rank * count, (self.group.rank + 1) * count)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x (T, H), weights and experts (T, k) → (T, H).

        In a group all its ranks must call it, in training with as many tokens each.
        """
        group, count = self.group, len(x)
        if group.size == 1:
            return moe_mlp(x, self.gate_up_proj, self.down_proj, weights, experts)
        most = count if self.training else largest(count, x.device, group.name)
        # One small tensor for both: fp32 has every number of an expert exactly.
        routes = torch.cat([weights, experts.to(weights.dtype)], 1)
        x, routes = (F.pad(rows, (0, 0, 0, most - count)) for rows in (x, routes))
        weights, numbers = gather_rows(routes, group.size, group.name).chunk(2, 1)
        given = moe_mlp(
            gather_rows(x, group.size, group.name),  # (N * T, H)
            self.gate_up_proj,
            self.down_proj,
            weights,
            numbers.long(),
            part=(group.rank, group.size),
        )
        return sum_rows(given, group.size, group.name)[:count]


class SharedGate(nn.Module):
    """How much a token gets of what the shared expert gives: the sigmoid of one logit, in fp32."""

    def __init__(self, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (T, H) → (T, 1) in x's dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide)).sigmoid().to(x.dtype)


class MoEBlock(nn.Module):
    """Stands in for transformers' sparse block, under its names: gate, experts, and where every
    token also runs through an MLP of its own, shared_expert and shared_expert_gate, or
    shared_experts, whose output counts whole."""

    def __init__(
        self,
        gate: Router,
        experts: Experts,
        shared_expert: nn.Module | None = None,
        shared_expert_gate: SharedGate | None = None,
        shared_experts: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.shared_expert = shared_expert
        self.shared_expert_gate = shared_expert_gate
        self.shared_experts = shared_experts

    def forward(
        self,
        hidden_states: Tensor,
        segments: Segments | None = None,
        sequence: SequenceGroup = ALONE,
    ) -> tuple[Tensor, RouterFigures | None]:
        """(…, H) → the same shape; with the segments of its tokens also what the router did."""
        x = hidden_states.flatten(0, -2)
        logits, weights, experts = self.gate(x)
        out = self.experts(x, weights, experts)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            out = out + self.shared_expert_gate(x) * self.shared_expert(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        out = out.view(hidden_states.shape)
        if segments is None:
            return out, None
        return out, router_figures(logits, experts, segments, sequence, self.gate.shape.score)
