"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split, for q and k together.

Each pair (a, b) of elements of a head turns by the angle of its token and frequency:

    a' = a cos - b sin,    b' = b cos + a sin

Half-split layout (GPT-NeoX, transformers' `rotate_half`): of the R rotated dimensions, element i is
paired with i + R / 2. The interleaved layout of GPT-J, where 2i is paired with 2i + 1, is another
order of the same dimensions: permute the rows of the q and k projections once and use this op.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from .autograd import first_order
from .dispatch import choose, is_traced

Layout = Literal["plain", "chunked", "interleaved", "axial"]


def apply_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn the heads of q and k by the angles of their tokens.

    q: (T, Hq, D), k: (T, Hk, D) of one dtype, also as views of one projection. cos, sin: (T, R/2),
    as `rope_tables` makes them, or (T, R) with both halves equal, as transformers has them; only
    the first half is read, in any float dtype. Returns (q, k) in their dtype and shapes. R =
    rotary_dim is D unless given; the dimensions past it are passed through. The arithmetic is
    float32, rounded once at the end, as in the vision towers of transformers; its text models
    also round both products. The gradient is the opposite turn; cos and sin get none. On CUDA:
    one launch forward, one backward.

    Raises ValueError when the shapes do not fit.
    """
    rotary_dim = q.shape[-1] if rotary_dim is None else rotary_dim
    _check(q, k, cos, sin, rotary_dim)
    if choose("rope", q, backend) == "reference":
        return apply_rope_ref(q, k, cos, sin, rotary_dim=rotary_dim)
    if is_traced(q):
        return _rope(q, k, cos, sin, rotary_dim, False)
    return _Rope.apply(q, k, cos, sin, rotary_dim)


def apply_rope_ref(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, rotary_dim: int | None = None
) -> tuple[Tensor, Tensor]:
    """`apply_rope` in plain torch, which torch.compile may fuse with what is around it."""
    rotary_dim = q.shape[-1] if rotary_dim is None else rotary_dim
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    half = rotary_dim // 2
    c, s = (x.detach()[:, None, :half].to(wide) for x in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        a, b, rest = x.split([half, half, x.shape[-1] - rotary_dim], dim=-1)
        a, b = a.to(wide), b.to(wide)
        return torch.cat([(a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype), rest], dim=-1)

    return turn(q), turn(k)


def rope_tables(
    position_ids: Tensor,
    inv_freq: Tensor,
    *,
    layout: Layout = "plain",
    mrope_section: list[int] | tuple[int, ...] | None = None,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Make the cos and sin tables of `apply_rope`, once per step for all layers.

    position_ids: integers, (...,) for "plain", (3, ...) with rows t, h, w for the two M-RoPE
    layouts, (2, ...) with rows h, w for "axial". inv_freq: (F,). Returns cos and sin in `dtype`,
    each times `scaling` (YaRN's attention factor), of R / 2 columns:

    - "plain": (..., F), angle = position * inv_freq.
    - "chunked" (Qwen2-VL, Qwen2.5-VL): (..., F), the first mrope_section[0] frequencies by t, the
      next mrope_section[1] by h, the others by w; mrope_section adds up to F.
    - "interleaved" (Qwen3-VL, Qwen3.5): (..., F), frequencies 1, 4, 7, ... below
      3 * mrope_section[1] by h, 2, 5, 8, ... below 3 * mrope_section[2] by w, the others by t.
    - "axial" (vision towers of Qwen-VL): (..., 2 F), all frequencies by h, then all by w.

    transformers' tables are these twice side by side: `torch.cat([cos, cos], -1)`. The angles and
    their cos and sin are float32 (bfloat16 angles would be wrong past position 256).

    Raises ValueError when the layout does not exist or the shapes do not fit it.
    """
    _check_tables(position_ids, inv_freq, layout, mrope_section)
    angles = position_ids[..., None].float() * inv_freq.float()
    if layout == "axial":
        angles = torch.cat([angles[0], angles[1]], dim=-1)
    elif layout == "chunked":
        chunks = angles.split(list(mrope_section or ()), dim=-1)
        angles = torch.cat([chunk[axis] for axis, chunk in enumerate(chunks)], dim=-1)
    elif layout == "interleaved":
        by_axis, angles = angles, angles[0].clone()
        for axis in (1, 2):
            columns = slice(axis, 3 * (mrope_section or ())[axis], 3)
            angles[..., columns] = by_axis[axis, ..., columns]
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> None:
    if q.ndim != 3 or k.ndim != 3 or q.shape[::2] != k.shape[::2] or q.dtype != k.dtype:
        raise ValueError(
            f"apply_rope: q and k must be (T, Hq, D) and (T, Hk, D) of one dtype, got "
            f"{tuple(q.shape)} {q.dtype} and {tuple(k.shape)} {k.dtype}; flatten the batch first"
        )
    if rotary_dim % 2 or not 0 < rotary_dim <= q.shape[-1]:
        raise ValueError(
            f"apply_rope: rotary_dim must be even, at least 2 and at most D = {q.shape[-1]}, got "
            f"{rotary_dim}; give the number of dimensions that turn"
        )
    widths = (rotary_dim // 2, rotary_dim)
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[0] != q.shape[0]:
        wrong = True
    else:
        wrong = cos.shape[1] not in widths
    if wrong:
        raise ValueError(
            f"apply_rope: cos and sin must be ({q.shape[0]}, {widths[0]}) or ({q.shape[0]}, "
            f"{widths[1]}), got {tuple(cos.shape)} and {tuple(sin.shape)}; give rotary_dim when "
            f"only a part of each head turns"
        )


def _check_tables(position_ids: Tensor, inv_freq: Tensor, layout: str, mrope_section: Any) -> None:
    axes = {"plain": 0, "chunked": 3, "interleaved": 3, "axial": 2}
    if layout not in axes:
        raise ValueError(
            f"rope_tables: layout must be one of {', '.join(axes)}, got {layout!r}; name one"
        )
    if axes[layout] and position_ids.shape[:1] != (axes[layout],):
        raise ValueError(
            f"rope_tables: position_ids of the layout {layout} must be ({axes[layout]}, ...), got "
            f"{tuple(position_ids.shape)}; put the axes first"
        )
    if axes[layout] != 3:
        return
    width, section = inv_freq.shape[0], list(mrope_section or ())
    if len(section) != 3 or (layout == "chunked" and sum(section) != width):
        raise ValueError(
            f"rope_tables: mrope_section must be three counts that add up to {width}, the number "
            f"of frequencies, got {mrope_section}; take it from the model's rope parameters"
        )


class _Rope(torch.autograd.Function):
    """The eager path: the same kernel as the custom op's, without its cost per call."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int
    ) -> tuple[Tensor, Tensor]:
        from .triton_ops import rope as kernels

        ctx.save_for_backward(cos, sin)
        ctx.rotary_dim = rotary_dim
        return kernels.rotate(q, k, cos, sin, rotary_dim, inverse=False)

    @staticmethod
    @first_order
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        from .triton_ops import rope as kernels

        cos, sin = ctx.saved_tensors
        dq, dk = kernels.rotate(dq, dk, cos, sin, ctx.rotary_dim, inverse=True)
        return dq, dk, None, None, None


@torch.library.custom_op("triptych::rope", mutates_args=())
def _rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, inverse: bool
) -> tuple[Tensor, Tensor]:
    """-> q, k turned, by the opposite angles if `inverse`."""
    from .triton_ops import rope as kernels

    return kernels.rotate(q, k, cos, sin, rotary_dim, inverse)


@_rope.register_fake
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, inverse: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.rotary_dim, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(
    ctx: Any, dq: Tensor, dk: Tensor
) -> tuple[Tensor, Tensor, None, None, None, None]:
    dq, dk = _rope(dq, dk, *ctx.saved_tensors, ctx.rotary_dim, not ctx.inverse)
    return dq, dk, None, None, None, None


_rope.register_autograd(_differentiate, setup_context=_save)
