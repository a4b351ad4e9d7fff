"""Which experts a token goes to, and the two losses that keep the router healthy.

    scores = softmax(logits) or sigmoid(logits);  experts = the top_k of scores + bias
    balance_loss = E sum_e f_e P_e;  z_loss = mean over tokens of logsumexp(logits)^2

All of it is (T, E), small beside the experts' work, and plain torch on every device: torch.compile
fuses it, and no op of its own would be faster.
"""

import torch
from torch import Tensor


def route(
    logits: Tensor,
    top_k: int,
    *,
    normalize: bool,
    score: str = "softmax",
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the `top_k` experts of each token, and how much each of them counts.

    logits: (T, E); returns weights (T, top_k) float32 (float64 for float64 logits), the largest
    first, and experts (T, top_k) int64. The scores are softmax(logits) (Mixtral, Qwen) or
    sigmoid(logits) (DeepSeek-V3, arXiv 2412.19437), in float32. normalize divides the chosen
    weights by their sum. bias (E,) is added to the scores for the choice alone, not to the weights
    (balancing without a loss, arXiv 2408.15664); then the order is that of score + bias.
    Differentiable in logits.

    Raises ValueError for another score, a top_k outside 1..E and shapes that do not fit.
    """
    if logits.dim() != 2 or (bias is not None and bias.shape != logits.shape[1:]):
        raise ValueError(
            f"route: logits and bias must be (T, E) and (E,), got {tuple(logits.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}; flatten the batch first"
        )
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(
            f"route: top_k must lie in 1..{logits.shape[1]}, the number of experts, got {top_k}; "
            f"correct it"
        )
    scores = _scores(logits, score)
    if bias is None:
        weights, experts = scores.topk(top_k, dim=-1)
    else:
        experts = (scores.detach() + bias.detach()).topk(top_k, dim=-1).indices
        weights = scores.gather(1, experts)
    if normalize:
        # Sigmoids can all be 0; a softmax's largest cannot.
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    return weights, experts


def expert_counts(experts: Tensor, num_experts: int, *, mask: Tensor | None = None) -> Tensor:
    """Number of tokens that each expert was given: experts (T, k) -> (num_experts,) int64.

    mask: (T,) bool, False for tokens that do not count (padding). Does not wait for the device,
    as torch.bincount does.
    """
    ones = torch.ones_like(experts) if mask is None else mask[:, None].expand_as(experts)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
    return counts.scatter_add_(0, experts.reshape(-1).long(), ones.reshape(-1).long())


def balance_loss(
    logits: Tensor,
    experts: Tensor,
    *,
    score: str = "softmax",
    mask: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """The load-balancing loss: E * sum_e f_e P_e, 1 when the load is even and up to E otherwise.

    f_e is the share of all choices that fell on expert e, P_e the mean over tokens of its score,
    the scores of a token divided by their sum (Switch, arXiv 2101.03961, eq. 4; for k > 1 as in
    GShard, arXiv 2006.16668, and Megatron; transformers' is k times as large). The gradient flows
    through P alone.

    logits: (T, E); experts: (T, k); returns () float32, 0 without tokens. mask: (T,) bool, False
    for tokens that do not count. counts: (E,), the choices per expert over more than these tokens,
    such as `expert_counts` summed over ranks and micro-batches (arXiv 2501.11873); by default
    those of `experts`.
    """
    scores = _scores(logits, score)
    if score != "softmax":
        scores = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
    if counts is None:
        counts = expert_counts(experts, logits.shape[1], mask=mask)
    shares = counts / counts.sum().clamp_min(1)
    return logits.shape[1] * (shares * _mean(scores, mask)).sum()


def z_loss(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of logsumexp(logits)^2, which keeps logits small (ST-MoE, 2202.08906).

    logits: (T, E); mask: (T,) bool, False for tokens that do not count; returns () float32, 0
    without tokens.
    """
    return _mean(_widen(logits).logsumexp(-1).square(), mask)


def _scores(logits: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return _widen(logits).softmax(-1)
    if score == "sigmoid":
        return _widen(logits).sigmoid()
    raise ValueError(f"route: score must be softmax or sigmoid, got {score!r}; name one of these")


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of x (T, ...) over the tokens that count; 0 when there are none."""
    if mask is None:
        return x.sum(0) / max(1, len(x))
    # where and not a product: what a masked token holds may be inf or nan.
    kept = torch.where(mask.view(-1, *[1] * (x.dim() - 1)), x, 0)
    return kept.sum(0) / mask.sum().clamp_min(1)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
