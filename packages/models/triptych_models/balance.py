"""What keeps a router's load even: losses over the stretches of a row, and counts of its choices.

A segment s is a document, or all documents of a row; documents without a target (the padding tail)
are in none. Of its L_s tokens n_s are targets. With p_te the router's softmax, or its sigmoids
divided by their sum, and f_se the share of the choices in s that fell on expert e,

    balance = sum_s n_s * E sum_e f_se (1/L_s) sum_{t in s} p_te      (1 per target when even)
    z       = sum_s n_s * (1/L_s) sum_{t in s} logsumexp(logits_t)^2

Both are sums over targets like the loss, to be divided by the targets of the whole window: so the
step's is the mean over segments, each with the weight of its targets, whatever rank or micro-step
computed it; over documents also however they were packed. Over a document it is DeepSeek-V3's
sequence-wise loss (arXiv 2412.19437, eq. 17-20), over a row that of Switch and GShard in Megatron's
scale (arXiv 2101.03961, eq. 4, shares divided by k; transformers' is k times as large).
"""

from typing import Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from triptych_kernels import expert_counts

from .layout import Score
from .sequence import SequenceGroup

Over = Literal["document", "row"]


class Segments(NamedTuple):
    """To which segment each of this rank's T tokens belongs; S segments in the whole row."""

    of_token: Tensor  # (T,) int64
    is_counted: Tensor  # (T,) bool, False for tokens in no segment
    weights: Tensor  # (T,) fp32, n_s / L_s of the token's segment, 0 for those in none
    num_tokens: Tensor  # (S,) fp32, L_s
    is_image: Tensor  # (T,) bool


class RouterFigures(NamedTuple):
    """What a router did with the tokens of one rank: sums, see above."""

    balance: Tensor  # () fp32
    z: Tensor  # () fp32
    load: Tensor  # (2, E) fp32, choices per expert: of tokens of text, and of images


def segment_row(
    shift_labels: Tensor,
    cu_seqlens: Tensor,
    over: Over,
    sequence: SequenceGroup,
    image_positions: Tensor | None = None,
) -> Segments:
    """Segments of a row of which this rank has the labels shift_labels (1, T); no host sync.

    cu_seqlens (num_docs + 1,) int32 is the whole row's; of its tokens the rank holds the
    sequence.rank-th part, and among these image_positions are those of images.
    """
    labels = shift_labels.flatten()
    starts = len(labels) * sequence.rank
    at = torch.arange(starts, starts + len(labels), device=labels.device)
    document = torch.searchsorted(cu_seqlens[1:].long(), at, right=True)  # (T,)
    targets = torch.zeros(len(cu_seqlens) - 1, device=labels.device)
    targets = _sum_over(targets.index_add_(0, document, (labels != -100).float()), sequence)
    tokens = cu_seqlens.diff().float() * (targets > 0)  # (num_docs,)
    is_counted = (targets > 0)[document]
    if over == "row":
        targets, tokens = targets.sum(0, keepdim=True), tokens.sum(0, keepdim=True)
        document = torch.zeros_like(document)
    weights = (targets / tokens.clamp_min(1))[document] * is_counted
    is_image = torch.zeros_like(is_counted)
    if image_positions is not None:
        is_image = is_image.index_fill(0, image_positions, True)
    return Segments(document, is_counted, weights, tokens, is_image)


def router_figures(
    logits: Tensor,
    experts: Tensor,
    segments: Segments,
    sequence: SequenceGroup,
    score: Score = "softmax",
) -> RouterFigures:
    """Losses of one router's logits (T, E) fp32, differentiable, and its choices experts (T, k).

    Where ranks share a row, these are the rank's terms of the sums.
    """
    num_experts, num_segments = logits.shape[1], len(segments.num_tokens)
    probabilities = logits.softmax(-1) if score == "softmax" else _shares(logits.sigmoid())
    keys = segments.of_token[:, None] * num_experts + experts  # (T, k)
    counts = expert_counts(keys, num_segments * num_experts, mask=segments.is_counted)
    counts = counts.view(num_segments, num_experts).float()
    kinds = segments.is_image[:, None] * num_experts + experts  # (T, k)
    load = expert_counts(kinds, 2 * num_experts, mask=segments.is_counted)
    choices = experts.shape[1] * segments.num_tokens.clamp_min(1)  # (S,)
    shares = _sum_over(counts, sequence) / choices[:, None]  # (S, E)
    per_token = (shares[segments.of_token] * probabilities).sum(-1)  # (T,)
    balance = num_experts * (per_token * segments.weights).sum()
    z = (logits.logsumexp(-1).square() * segments.weights).sum()
    return RouterFigures(balance, z, load.view(2, num_experts).float())


def _shares(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)


def _sum_over(values: Tensor, sequence: SequenceGroup) -> Tensor:
    """Summed over the ranks that hold a row; not differentiable."""
    return _sum_over_ranks(values, sequence.name) if sequence.size > 1 else values


@torch.library.custom_op("triptych_models::sum_over_ranks", mutates_args=())
def _sum_over_ranks(values: Tensor, group: str) -> Tensor:
    total = values.clone()
    dist.all_reduce(total, group=_resolve_process_group(cast("dist.GroupName", group)))
    return total


@_sum_over_ranks.register_fake
def _(values: Tensor, group: str) -> Tensor:
    return torch.empty_like(values)
