"""Ops that are bound by matrix products: loss, attention, mixture of experts, Newton-Schulz."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Call, Draw, Inputs, Op, Shape, Unavailable, Work, found, ours


def loss_inputs(s: Shape, draw: Draw) -> Inputs:
    labels = draw.randint(s.vocabulary, s.rows)
    # An exact share, so that the cost is a function of the shape alone.
    ignored = draw.rand(s.rows).argsort()[: s.rows - kept_rows(s)]
    labels[ignored] = -100
    tensors = [draw.randn(s.rows, s.width), draw.randn(s.vocabulary, s.width, scale=0.02)]
    return Inputs(tensors, {"labels": labels, "num_targets": kept_rows(s)})


def kept_rows(s: Shape) -> int:
    return int(s.rows - round(s.rows * s.ignored))


def eager_loss(hidden: Tensor, weight: Tensor, labels: Tensor, num_targets: int) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


class _Products(torch.autograd.Function):
    """The three matrix products of a linear layer, on logits that never become gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        ctx.save_for_backward(hidden, weight, logits)
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.t() @ hidden


def loss_products(hidden: Tensor, weight: Tensor, labels: Tensor, num_targets: int) -> Tensor:
    """What no linear cross entropy can be faster than: its products, with all logits in memory."""
    return _Products.apply(hidden[:num_targets], weight)


def liger_loss() -> Call:
    function = found(
        "liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"
    )

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, num_targets: int) -> Tensor:
        out = function.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum")
        return out[0] if isinstance(out, tuple) else out

    return call


def quack_loss() -> Call:
    chunked = found("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda hidden, weight, labels, num_targets: chunked(
        hidden, weight, labels, reduction="sum"
    )


def loss_work(products: int) -> Any:
    """`products` matrix products of the rows that are not ignored."""
    return lambda s: Work(
        products * (s.rows + s.vocabulary) * s.width,
        2 * products * kept_rows(s) * s.width * s.vocabulary,
    )


def lengths_of(s: Shape) -> list[int]:
    """Documents whose lengths are as 1 : 2 : 3 : ..., the rounding in the last."""
    whole = s.documents * (s.documents + 1) // 2
    lengths = [s.tokens * i // whole for i in range(1, s.documents)]
    return [*lengths, s.tokens - sum(lengths)]


def attention_inputs(s: Shape, draw: Draw) -> Inputs:
    q = draw.randn(s.tokens, s.heads, s.head_dim)
    k, v = (draw.randn(s.tokens, s.kv_heads, s.head_dim) for _ in range(2))
    lengths = lengths_of(s)
    bounds = torch.tensor([0, *lengths], device=draw.device).cumsum(0).to(torch.int32)
    return Inputs([q, k, v], {"cu_seqlens": bounds, "lengths": tuple(lengths)})


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """torch's scaled_dot_product_attention, document by document."""
    out = []
    for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in parts)
        y = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        out.append(y.squeeze(0).transpose(0, 1))
    return torch.cat(out)


def varlen_attention() -> Call:
    varlen_attn = found("torch.nn.attention.varlen", "varlen_attn")
    # torch 2.12 added the flag and checks it; 2.11 takes fewer key heads without being told.
    gqa = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}
    return lambda q, k, v, cu_seqlens, lengths: varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max(lengths),
        max(lengths),
        window_size=(-1, 0),
        **(gqa if q.shape[1] != k.shape[1] else {}),
    )


def flash_attention(module: str) -> Any:
    """flash_attn is version 2, flash_attn.cute version 4."""

    def resolve() -> Call:
        function = found(module, "flash_attn_varlen_func")

        def call(
            q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...]
        ) -> Tensor:
            out = function(
                q,
                k,
                v,
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
                max_seqlen_q=max(lengths),
                max_seqlen_k=max(lengths),
                causal=True,
            )
            return out[0] if isinstance(out, tuple) else out

        return call

    return resolve


def ours_attention() -> Call:
    attention = found("triptych_kernels", "attention")
    return lambda q, k, v, cu_seqlens, lengths: attention(
        q, k, v, cu_seqlens, max(lengths), causal=True
    )


def attention_work(products: float) -> Any:
    """`products` products of (L, D) with (D, L) a document and head, half of each masked."""

    def work(s: Shape) -> Work:
        pairs = sum(length**2 for length in lengths_of(s)) / 2
        moved = s.tokens * s.head_dim * (s.heads + s.kv_heads)
        return Work(products * moved, 2 * products * s.heads * s.head_dim * pairs)

    return work


def moe_inputs(s: Shape, draw: Draw) -> Inputs:
    x = draw.randn(s.tokens, s.width)
    gate_up = draw.randn(s.experts, 2 * s.expert_width, s.width, scale=0.02)
    down = draw.randn(s.experts, s.width, s.expert_width, scale=0.02)
    weights, experts = draw.rand(s.tokens, s.experts).topk(s.top_k, dim=-1)
    weights = (weights / weights.sum(-1, keepdim=True)).to(draw.dtype)
    return Inputs([x, gate_up, down, weights], {"experts": experts})


def eager_moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """transformers' loop over the experts, which waits for the device at each."""
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, slot = (experts == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down[expert]) * weights[token, slot].unsqueeze(-1)
        out = out.index_add(0, token, y)
    return out


def grouped_moe(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor
) -> Tensor:
    """transformers' grouped_mm path: sort by expert, two grouped products, sort back, add up."""
    order = experts.flatten().argsort()
    count = torch.zeros(gate_up.shape[0], dtype=torch.int64, device=x.device)
    count = count.scatter_add(0, experts.flatten(), torch.ones_like(experts.flatten()))
    ends = count.cumsum(0).to(torch.int32)
    rows = x[order // experts.shape[1]]
    gate, up = F.grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    y = (y * weights.flatten()[order].unsqueeze(-1))[order.argsort()]
    return y.view(*experts.shape, -1).sum(1)


def liger_moe() -> Call:
    function = found("liger_kernel.ops.fused_moe", "LigerFusedMoEFunction")
    return lambda x, gate_up, down, weights, experts: function.apply(
        x, gate_up, down, experts.int(), weights
    )


def moe_work(products: int) -> Any:
    return lambda s: Work(
        products * (s.experts * s.expert_width * s.width + s.tokens * s.width),
        2 * products * s.tokens * s.top_k * s.expert_width * s.width,
    )


POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def eager_newton_schulz(g: Tensor) -> Tensor:
    """Five steps X <- a X + (b A + c A^2) X with A = X X^T, on the shorter side."""
    x = g.mT if g.shape[-2] > g.shape[-1] else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if g.shape[-2] > g.shape[-1] else x


def ours_newton_schulz() -> Call:
    newton_schulz = found("triptych_kernels", "newton_schulz")
    return lambda g: newton_schulz(g)


def newton_schulz_work(s: Shape) -> Work:
    """The products of the plain form; forms that need fewer count as these."""
    short, long = sorted((s.rows, s.columns))
    steps = 5 * (2 * 2 * short**2 * long + 2 * short**3)
    return Work(2 * s.batch * short * long, s.batch * steps)


def not_on_cpu(provider: Any) -> Any:
    def resolve() -> Call:
        if not torch.cuda.is_available():
            raise Unavailable("needs CUDA")
        return provider()

    return resolve


LINEAR_CROSS_ENTROPY = Op(
    dims=("rows", "width", "vocabulary"),
    shapes=[(8192, 2048, 151936), (16384, 2048, 151936), (8192, 4096, 151936)],
    tiny=(12, 16, 50),
    inputs=loss_inputs,
    providers={
        "eager": lambda: eager_loss,
        "liger": liger_loss,
        "quack": quack_loss,
        "products": lambda: loss_products,
        "ours": ours("linear_cross_entropy"),
    },
    forward=loss_work(1),
    backward=loss_work(2),
    floors=frozenset({"products"}),
)

ATTENTION = Op(
    dims=("tokens", "documents", "heads", "kv_heads", "head_dim"),
    shapes=[(16384, 16, 16, 8, 128), (16384, 1, 16, 8, 128), (16384, 8, 32, 8, 64)],
    tiny=(12, 3, 4, 2, 8),
    inputs=attention_inputs,
    providers={
        "eager": lambda: eager_attention,
        "varlen": not_on_cpu(varlen_attention),
        "flash-attn 2": not_on_cpu(flash_attention("flash_attn")),
        "flash-attn 4": not_on_cpu(flash_attention("flash_attn.cute")),
        "ours": ours_attention,
    },
    forward=attention_work(2),
    backward=attention_work(5),
)

MOE = Op(
    dims=("tokens", "experts", "width", "expert_width", "top_k"),
    shapes=[(32768, 128, 2048, 768, 8), (8192, 128, 2048, 768, 8)],
    tiny=(8, 4, 16, 8, 2),
    inputs=moe_inputs,
    providers={
        "eager": lambda: eager_moe,
        "grouped_mm": lambda: grouped_moe,
        "liger": liger_moe,
        "ours": ours("moe_mlp"),
    },
    forward=moe_work(3),
    backward=moe_work(6),
    compiled="grouped_mm",
)

NEWTON_SCHULZ = Op(
    dims=("batch", "rows", "columns"),
    shapes=[(1, 2048, 6144), (4, 2048, 6144), (8, 2048, 2048)],
    tiny=(2, 6, 10),
    inputs=lambda s, draw: Inputs([draw.randn(s.batch, s.rows, s.columns)], {}),
    providers={"eager": lambda: eager_newton_schulz, "ours": ours_newton_schulz},
    forward=newton_schulz_work,
    backward=None,
)
