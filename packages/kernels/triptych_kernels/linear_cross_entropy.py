"""Cross entropy of a linear layer, summed over the targets, without the (N, V) logits.

loss = sum over targets t of logsumexp(z_t) - z_t[label_t], with z = hidden_states @ weight.T + bias

and the further terms of cross_entropy_in_place.py. The scheme (chunks of rows, gradients computed
in the forward, logits turned into their gradients in place) is that of Liger Kernel (arXiv
2410.10989), with QuACK's large chunks and float32 accumulation of the weight's gradient. z-loss:
PaLM (arXiv 2204.02311); soft cap: Gemma 2 (arXiv 2408.00118).
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import lowered
from .cross_entropy_in_place import Terms
from .dispatch import choose, is_traced
from .linear_cross_entropy_chunks import compute, scaled, spread, wide_dtype


@overload
def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_rows: int = 4096,
    num_targets: int | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    return_per_token: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_rows: int = 4096,
    num_targets: int | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    return_per_token: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_rows: int = 4096,
    num_targets: int | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    return_per_token: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum the cross entropy of the rows whose label is not `ignore_index`.

    hidden_states: (N, H); weight: (V, H); labels: (N,) int64; bias: (V,). Returns () float32
    (float64 for float64 inputs); no targets give 0 with zero gradients. Ignored rows cost no
    matrix product. At most (chunk_rows, V) logits are held, in the dtype of hidden_states; the
    gradients are computed here and wait, in the dtypes of their tensors, for the backward.

    softcap: a bound c, through which logits become c * tanh(logit / c). label_smoothing: the share,
    below 1, of the target that is spread over all V classes. z_loss: adds z_loss * logsumexp^2 to
    each row. weights: (N,), multiplies each row's loss; it gets no gradient. return_per_token:
    also return each row's share of the sum, (N,) in the sum's dtype, 0 where ignored, without a
    gradient.

    num_targets is the number of labels that are not ignored. On CUDA give it where it is known:
    counting them waits for the device. A wrong count, or a label outside 0..V-1, raises ValueError
    on the CPU and trips a device-side assertion on CUDA, as do shapes and values that do not fit
    (ValueError). Not differentiable twice: a backward with create_graph=True raises RuntimeError.
    """
    terms = Terms(z_loss, softcap, label_smoothing)
    _check_shapes(hidden_states, weight, labels, bias, weights)
    _check_values(chunk_rows, terms)
    hidden_states, weight = lowered(hidden_states), lowered(weight)
    bias = None if bias is None else lowered(bias)
    _check_dtypes(hidden_states, weight, labels, bias)
    name = choose("linear_cross_entropy", hidden_states, backend)
    if name == "reference":
        loss, losses = _reference(hidden_states, weight, labels, bias, weights, ignore_index, terms)
    else:
        # Inside forward() grad mode is always off, so the question is asked here.
        wants = [
            torch.is_grad_enabled() and x is not None and x.requires_grad
            for x in (hidden_states, weight, bias)
        ]
        settings = (ignore_index, num_targets, chunk_rows, *terms, name, wants)
        tensors = (hidden_states, weight, bias, labels, weights)
        if is_traced(hidden_states):
            loss, losses, *_ = _linear_cross_entropy(*tensors, *settings)
        else:
            loss, losses = _LinearCrossEntropy.apply(*tensors, *settings)
    return (loss, losses) if return_per_token else loss


def linear_cross_entropy_ref(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    return_per_token: bool = False,
) -> Any:
    """`linear_cross_entropy` in plain torch, with all the logits at once."""
    terms = Terms(z_loss, softcap, label_smoothing)
    loss, losses = _reference(hidden_states, weight, labels, bias, weights, ignore_index, terms)
    return (loss, losses) if return_per_token else loss


def _reference(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    ignore_index: int,
    terms: Terms,
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden_states, weight, bias)  # (N, V)
    logits = logits.to(wide_dtype(logits.dtype))
    if terms.softcap is not None:
        logits = terms.softcap * torch.tanh(logits / terms.softcap)
    losses = F.cross_entropy(
        logits,
        labels,
        ignore_index=ignore_index,
        label_smoothing=terms.label_smoothing,
        reduction="none",
    )
    if terms.z_loss:
        lse = logits.logsumexp(-1)
        losses = losses + terms.z_loss * lse.square().masked_fill(labels == ignore_index, 0.0)
    if weights is not None:
        losses = losses * weights.detach().to(losses.dtype)
    return losses.sum(), losses.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    """The eager path: the same work as the custom op's, without its cost per call."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        result = compute(hidden_states, *arguments)
        ctx.save_for_backward(result.d_hidden, result.d_weight, result.d_bias, result.rows)
        ctx.num_rows = len(hidden_states)
        ctx.dtypes = [None if x is None else x.dtype for x in arguments[:2]]  # weight, bias
        losses = spread(result.losses, result.rows, len(hidden_states))
        ctx.mark_non_differentiable(losses)
        return result.loss, losses

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # they would pass as constants: the inputs were not kept
            raise RuntimeError(
                "linear_cross_entropy: its gradients must not be differentiated, got "
                "create_graph=True; ask for backend='reference'"
            )
        d_hidden, d_weight, d_bias, rows = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = spread(d_hidden * d_loss, rows, ctx.num_rows)
        weight_dtype, bias_dtype = ctx.dtypes
        d_weight = scaled(d_weight, d_loss, weight_dtype)
        return d_hidden, d_weight, scaled(d_bias, d_loss, bias_dtype), *[None] * 10


@torch.library.custom_op("triptych::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    num_targets: int | None,
    chunk_rows: int,
    z_loss: float,
    softcap: float | None,
    label_smoothing: float,
    name: str,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss (), losses (N,), d_hidden (N, H), d_weight, d_bias; empty where not wanted.

    d_hidden has all the rows here: how many have a target is not known while tracing.
    """
    result = compute(
        hidden_states,
        weight,
        bias,
        labels,
        weights,
        ignore_index,
        num_targets,
        chunk_rows,
        z_loss,
        softcap,
        label_smoothing,
        name,
        wants,
    )
    num_rows = len(hidden_states)
    d_hidden = result.d_hidden
    if d_hidden is not None:
        d_hidden = spread(d_hidden, result.rows, num_rows)
    losses = spread(result.losses, result.rows, num_rows)
    d_hidden, d_weight, d_bias = (
        hidden_states.new_empty(0) if gradient is None or like is None else gradient.to(like.dtype)
        for gradient, like in (
            (d_hidden, hidden_states),
            (result.d_weight, weight),
            (result.d_bias, bias),
        )
    )
    return result.loss, losses, d_hidden, d_weight, d_bias


@_linear_cross_entropy.register_fake
def _(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, ...]:
    wide = wide_dtype(hidden_states.dtype)
    wants_hidden, wants_weight, wants_bias = settings[-1]
    nothing = hidden_states.new_empty(0)
    gradients = (
        hidden_states.new_empty(hidden_states.shape) if wants_hidden else nothing,
        weight.new_empty(weight.shape) if wants_weight else nothing.clone(),
        bias.new_empty(bias.shape) if bias is not None and wants_bias else nothing.clone(),
    )
    losses = hidden_states.new_empty(hidden_states.shape[0], dtype=wide)
    return losses.new_empty(()), losses, *gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wants = inputs[-1]
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, d_loss: Tensor, *of_the_rest: Tensor) -> tuple[Tensor | None, ...]:
    gradients = [
        gradient * d_loss if wanted else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.wants, strict=True)
    ]
    return *gradients, *[None] * 10


_linear_cross_entropy.register_autograd(_differentiate, setup_context=_save)


def _check_shapes(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
) -> None:
    fits = (
        hidden_states.dim() == weight.dim() == 2
        and hidden_states.shape[1] == weight.shape[1]
        and labels.shape == hidden_states.shape[:1]
        and (bias is None or bias.shape == weight.shape[:1])
        and (weights is None or weights.shape == labels.shape)
    )
    if not fits:
        tensors = (hidden_states, weight, labels, bias, weights)
        shapes = [tuple(x.shape) for x in tensors if x is not None]
        raise ValueError(
            f"linear_cross_entropy: hidden_states, weight, labels, bias, weights must be (N, H), "
            f"(V, H), (N,), (V,), (N,), got {', '.join(map(str, shapes))}; flatten the batch first"
        )


def _check_dtypes(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None
) -> None:
    dtypes = [x.dtype for x in (hidden_states, weight, bias) if x is not None]
    if len(set(dtypes)) > 1:
        raise ValueError(
            f"linear_cross_entropy: hidden_states, weight and bias must have one dtype, got "
            f"{', '.join(map(str, dtypes))}; cast them"
        )
    if labels.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: labels must be int64, got {labels.dtype}; convert them once, "
            f"where the batch is made"
        )


def _check_values(chunk_rows: int, terms: Terms) -> None:
    if chunk_rows < 1:
        raise ValueError(
            f"linear_cross_entropy: chunk_rows must be at least 1, got {chunk_rows}; "
            f"leave it at its default"
        )
    if terms.z_loss < 0:
        raise ValueError(
            f"linear_cross_entropy: z_loss must be at least 0, got {terms.z_loss}; "
            f"it is a small factor, such as 1e-4"
        )
    if terms.softcap is not None and terms.softcap <= 0:
        raise ValueError(
            f"linear_cross_entropy: softcap must be above 0, got {terms.softcap}; "
            f"leave it out for no cap"
        )
    if not 0 <= terms.label_smoothing < 1:
        raise ValueError(
            f"linear_cross_entropy: label_smoothing must be at least 0 and below 1, got "
            f"{terms.label_smoothing}; it is the share that is spread over the classes"
        )
