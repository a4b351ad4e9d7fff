"""One case per exported op, for test_every_op.py: its tensors, its call and its reference.

The differentiable tensors come first and in a list; whatever else a call needs is in the closure
and has the dtype that the tensors have.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import triptych_kernels as tk

TOKENS = 9


@dataclass(frozen=True)
class Case:
    """`ours(*tensors, backend=…)` and `plain(*tensors)` give a tensor or a tuple of tensors."""

    op: str  # its name in dispatch.BACKENDS; "" where it has one form only
    shapes: tuple[tuple[int, ...], ...]  # "T" tokens stand as TOKENS
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    differentiable: bool = True
    beyond: tuple[str, ...] = ()  # backends that do not have what this case asks for
    float64: bool = True  # whether the reference computes in it, for gradcheck

    def tensors(self, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = [[tokens if n == TOKENS else n for n in shape] for shape in self.shapes]
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in shapes
        ]


def bounds(tokens: int) -> Tensor:
    """Three documents, one of them empty and one of a single token."""
    ends = [0, 0, min(1, tokens), tokens]
    return torch.tensor(ends, dtype=torch.int32)


def labels(tokens: int, vocabulary: int) -> Tensor:
    out = (torch.arange(tokens) * 7) % vocabulary
    out[1::3] = -100
    return out


def experts(tokens: int) -> Tensor:
    """Of four experts the last gets nothing."""
    return torch.stack([torch.arange(tokens) % 3, (torch.arange(tokens) + 1) % 3], dim=1)


def attention(**options: Any) -> Case:
    def call(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(q: Tensor, k: Tensor, v: Tensor, **backend: Any) -> Any:
            return op(q, k, v, bounds(len(q)), 16, **options, **backend)

        return run

    shapes = ((TOKENS, 4, 8), (TOKENS, 2, 8), (TOKENS, 2, 8))
    beyond = ("sdpa",) if "return_lse" in options or "softcap" in options else ()
    return Case("attention", shapes, call(tk.attention), call(tk.attention_ref), beyond=beyond)


def cross_entropy(**options: Any) -> Case:
    def call(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, weight: Tensor, bias: Tensor, **backend: Any) -> Any:
            extra = dict(options)
            if "weights" in extra:
                extra["weights"] = torch.linspace(0, 1, len(x), dtype=x.dtype)
            return op(x, weight, labels(len(x), 20), bias=bias, **extra, **backend)

        return run

    def plain(*tensors: Tensor) -> Any:
        options.pop("chunk_rows", None)
        return call(tk.linear_cross_entropy_ref)(*tensors)

    return Case(
        "linear_cross_entropy",
        ((TOKENS, 16), (20, 16), (20,)),
        call(tk.linear_cross_entropy),
        plain,
    )


def rope(**options: Any) -> Case:
    def call(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(q: Tensor, k: Tensor, **backend: Any) -> Any:
            width = options.get("rotary_dim", 8) // 2
            angles = torch.arange(len(q) * width, dtype=torch.float32).view(len(q), width)
            return op(q, k, angles.cos(), angles.sin(), **options, **backend)

        return run

    shapes = ((TOKENS, 4, 8), (TOKENS, 2, 8))
    return Case("rope", shapes, call(tk.apply_rope), call(tk.apply_rope_ref))


def with_documents(op: str, shapes: Any, ours: Any, plain: Any, at: int, **options: Any) -> Case:
    """An op that takes cu_seqlens after its `at` first tensors, or by name where at is -1."""

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*tensors: Tensor, **backend: Any) -> Any:
            documents = bounds(len(tensors[0]))
            if at < 0:
                return function(*tensors, cu_seqlens=documents, **options, **backend)
            late = {"bias": tensors[at]} if len(tensors) > at else {}
            return function(*tensors[:at], documents, **late, **options, **backend)

        return run

    return Case(op, shapes, call(ours), call(plain))


def conv_in_parts() -> Case:
    """Of the middle of wider rows, without a bias."""

    def ours(x: Tensor, weight: Tensor, **backend: Any) -> Any:
        options = {"silu": True, "widths": (4, 12), **backend}
        return tk.causal_conv1d(x[:, 2:18], weight, bounds(len(x)), **options)

    def plain(x: Tensor, weight: Tensor) -> Any:
        y = tk.causal_conv1d_ref(x[:, 2:18], weight, bounds(len(x)), silu=True)
        return y.split([4, 12], -1)

    return Case("causal_conv1d", (HIDDEN, (16, 3)), ours, plain)


def delta_rule(**options: Any) -> Case:
    def call(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **backend: Any) -> Any:
            g, beta = -g.square(), beta.sigmoid()
            return op(q, k, v, g, beta, bounds(len(q)), normalize_qk=True, **options, **backend)

        return run

    heads = (TOKENS, 4)
    shapes = ((TOKENS, 2, 8), (TOKENS, 2, 8), (TOKENS, 4, 6), heads, heads)
    return Case(
        "gated_delta_rule", shapes, call(tk.gated_delta_rule), call(tk.gated_delta_rule_ref)
    )


def moe() -> Case:
    def call(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, **backend: Any) -> Any:
            return op(x, gate_up, down, weights, experts(len(x)), **backend)

        return run

    shapes = ((TOKENS, 16), (4, 16, 16), (4, 16, 8), (TOKENS, 2))
    return Case("moe_mlp", shapes, call(tk.moe_mlp), call(tk.moe_mlp_ref))


def routed(function: Callable[[Tensor], Any], **options: Any) -> Case:
    return Case("", ((TOKENS, 5),), function, function, **options)


def orthogonal(form: str) -> Case:
    """In the dtype of its tensors, so that the reference computes the same."""

    def ours(g: Tensor, **backend: Any) -> Tensor:
        return tk.newton_schulz(g, form=form, compute_dtype=g.dtype, **backend)

    return Case("newton_schulz", ((2, 6, 10),), ours, tk.newton_schulz_ref, differentiable=False)


def summed(*tensors: Tensor, backend: str | None = None) -> Tensor:
    return tk.weighted_sum(tensors, [0.3, -0.5, 1.0], backend=backend)


def averaged(*tensors: Tensor) -> Tensor:
    return tk.weighted_sum_ref(tensors, [0.3, -0.5, 1.0])


def zero_centred(op: str, ours: Any, plain: Any, *shapes: tuple[int, ...]) -> Case:
    return Case(
        op,
        shapes,
        lambda *x, **backend: ours(*x, zero_centered=True, **backend),
        lambda *x: plain(*x, zero_centered=True),
        beyond=("torch",),
    )


HIDDEN = (TOKENS, 20)


def stepped() -> Case:
    """On copies, as it works in place; -> the parameters and states, and a bfloat16 copy of one."""

    def call(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(*tensors: Tensor, **backend: Any) -> Any:
            held = [x.detach().clone(memory_format=torch.contiguous_format) for x in tensors]
            params, states = held[:2], [x.square() for x in held]
            copies = [params[0].to(torch.bfloat16), None]
            options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
            op(
                *(params, tensors[2:], states[:2], states[2:]),
                **{"copies": copies, "step": 3, **options, **backend},
            )
            return *params, *states, copies[0].to(params[0].dtype)

        return run

    shapes = (HIDDEN, (20, 4), HIDDEN, (20, 4))
    return Case("adamw", shapes, call(tk.adamw_), call(tk.adamw_ref), differentiable=False)


CASES: dict[str, Case] = {
    "attention": attention(causal=True),
    "attention bidirectional with lse": attention(causal=False, return_lse=True),
    "attention window": attention(causal=True, window=3),
    "attention window and softcap": attention(causal=True, window=3, softcap=1.5),
    "linear_cross_entropy": cross_entropy(chunk_rows=4),
    "linear_cross_entropy all terms": cross_entropy(
        chunk_rows=4, z_loss=0.1, softcap=2.0, label_smoothing=0.1, weights=1, return_per_token=True
    ),
    "rms_norm": Case("rms_norm", (HIDDEN, (20,)), tk.rms_norm, tk.rms_norm_ref),
    "rms_norm zero-centred": zero_centred("rms_norm", tk.rms_norm, tk.rms_norm_ref, HIDDEN, (20,)),
    "add_rms_norm zero-centred": zero_centred(
        "add_rms_norm", tk.add_rms_norm, tk.add_rms_norm_ref, HIDDEN, HIDDEN, (20,)
    ),
    "layer_norm without weights": Case(
        "layer_norm", (HIDDEN,), lambda x, **b: tk.layer_norm(x, **b), tk.layer_norm_ref
    ),
    "geglu exact": Case(
        "geglu",
        (HIDDEN, HIDDEN),
        lambda *x, **b: tk.geglu(*x, approximate="none", **b),
        lambda *x: tk.geglu_ref(*x, approximate="none"),
    ),
    "modulate per token": Case("modulate", (HIDDEN,) * 3, tk.modulate, tk.modulate_ref),
    "gate_add per token": Case("gate_add", (HIDDEN,) * 3, tk.gate_add, tk.gate_add_ref),
    "add_rms_norm": Case(
        "add_rms_norm", (HIDDEN, HIDDEN, (20,)), tk.add_rms_norm, tk.add_rms_norm_ref
    ),
    "gated_rms_norm": Case(
        "gated_rms_norm", (HIDDEN, HIDDEN, (20,)), tk.gated_rms_norm, tk.gated_rms_norm_ref
    ),
    "layer_norm": Case("layer_norm", (HIDDEN, (20,), (20,)), tk.layer_norm, tk.layer_norm_ref),
    "swiglu": Case("swiglu", (HIDDEN, HIDDEN), tk.swiglu, tk.swiglu_ref),
    "geglu": Case("geglu", (HIDDEN, HIDDEN), tk.geglu, tk.geglu_ref),
    "apply_rope": rope(),
    "apply_rope of a part": rope(rotary_dim=4),
    "modulate": with_documents(
        "modulate", (HIDDEN, (3, 20), (3, 20)), tk.modulate, tk.modulate_ref, -1
    ),
    "gate_add": with_documents(
        "gate_add", (HIDDEN, HIDDEN, (3, 20)), tk.gate_add, tk.gate_add_ref, -1
    ),
    "causal_conv1d": with_documents(
        "causal_conv1d",
        (HIDDEN, (20, 4), (20,)),
        tk.causal_conv1d,
        tk.causal_conv1d_ref,
        2,
        silu=True,
    ),
    "causal_conv1d in parts": conv_in_parts(),
    "gated_delta_rule": delta_rule(return_state=True),
    "native_sparse_attention": with_documents(
        "native_sparse_attention",
        ((TOKENS, 4, 8), (TOKENS, 2, 8), (TOKENS, 2, 6), (TOKENS, 4, 3)),
        tk.native_sparse_attention,
        tk.native_sparse_attention_ref,
        4,
        block_size=2,
        num_selected=3,
        window=3,
    ),
    "moe_mlp": moe(),
    "route": routed(lambda x: tk.route(x, 2, normalize=True)[0]),
    "balance_loss": routed(lambda x: tk.balance_loss(x, experts(len(x)))),
    "z_loss": routed(tk.z_loss),
    "expert_counts": routed(
        lambda x: tk.expert_counts(experts(len(x)), x.shape[1]), differentiable=False
    ),
    "rope_tables": Case(
        "",
        ((4,),),
        lambda f: tk.rope_tables(torch.arange(9), f),
        lambda f: tk.rope_tables(torch.arange(9), f),
        differentiable=False,
        float64=False,
    ),
    "newton_schulz": orthogonal("standard"),
    "newton_schulz gram": orthogonal("gram"),
    "adamw_": stepped(),
    "weighted_sum": Case("weighted_sum", (HIDDEN,) * 3, summed, averaged, float64=False),
}
