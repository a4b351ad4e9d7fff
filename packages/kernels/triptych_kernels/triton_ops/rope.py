# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""Rotary embedding of q and k in one launch; the formula and the op are in ../rope.py."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

_TILE = 2048  # pairs of elements that one program rotates


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, D), k (T, Hk, D), cos and sin (T, >= rotary_dim / 2) -> q, k turned.

    Only the first rotary_dim / 2 columns of the tables are read. `inverse` turns the other way.
    """
    out_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    out_k = torch.empty_like(k, memory_format=torch.contiguous_format)
    num_tokens, q_heads, head_dim = q.shape
    k_heads = k.shape[1]
    half = rotary_dim // 2
    block_heads, block_half, block_rest = _tile(max(q_heads, k_heads), half, head_dim)
    q_blocks, k_blocks = -(-q_heads // block_heads), -(-k_heads // block_heads)
    if num_tokens and head_dim and q_blocks + k_blocks:
        q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
        launch(
            _kernel,
            (num_tokens, q_blocks + k_blocks, 1),
            (q, k, cos, sin, out_q, out_k),
            (
                q_heads,
                k_heads,
                head_dim,
                half,
                *(q.stride(0), q.stride(1), k.stride(0), k.stride(1)),
                *(cos.stride(0), sin.stride(0)),
            ),
            (inverse, rotary_dim < head_dim, block_heads, block_half, block_rest),
        )
    return out_q, out_k


@cache
def _tile(heads: int, half: int, head_dim: int) -> tuple[int, int, int]:
    """-> heads per program, the width of half a rotated head and that of the rest of a head."""
    block_half = triton.next_power_of_2(max(half, 1))
    block_heads = min(triton.next_power_of_2(max(heads, 1)), max(1, _TILE // block_half))
    return block_heads, block_half, triton.next_power_of_2(max(head_dim - 2 * half, 1))


@triton.jit
def _rotate(
    x_ptr,
    y_ptr,
    first_head,
    num_heads,
    head_dim,
    half,
    x_stride,
    cos,
    sin,
    HAS_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    head = first_head + tl.arange(0, BLOCK_HEADS)
    col = tl.arange(0, BLOCK_HALF)
    inside = (head < num_heads)[:, None] & (col < half)[None, :]
    source = x_ptr + head[:, None] * x_stride + col[None, :]
    target = y_ptr + head[:, None] * head_dim + col[None, :]
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, a * cos[None, :] - b * sin[None, :], mask=inside)
    tl.store(target + half, b * cos[None, :] + a * sin[None, :], mask=inside)
    if HAS_REST:
        rest = 2 * half + tl.arange(0, BLOCK_REST)
        inside = (head < num_heads)[:, None] & (rest < head_dim)[None, :]
        x = tl.load(x_ptr + head[:, None] * x_stride + rest[None, :], mask=inside, other=0.0)
        tl.store(y_ptr + head[:, None] * head_dim + rest[None, :], x, mask=inside)


@triton.jit
def _kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    out_q_ptr,
    out_k_ptr,
    q_heads,
    k_heads,
    head_dim,
    half,
    q_token,
    q_head,
    k_token,
    k_head,
    cos_token,
    sin_token,
    INVERSE: tl.constexpr,
    HAS_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    # Program (t, b) turns some heads of token t: of q, or of k where b is past the blocks of q.
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks = tl.cdiv(q_heads, BLOCK_HEADS)
    col = tl.arange(0, BLOCK_HALF)
    cos = tl.load(cos_ptr + token * cos_token + col, mask=col < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_token + col, mask=col < half, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    if block < q_blocks:
        _rotate(
            q_ptr + token * q_token,
            out_q_ptr + token * q_heads * head_dim,
            block * BLOCK_HEADS,
            q_heads,
            head_dim,
            half,
            q_head,
            cos,
            sin,
            HAS_REST,
            BLOCK_HEADS,
            BLOCK_HALF,
            BLOCK_REST,
        )
    else:
        _rotate(
            k_ptr + token * k_token,
            out_k_ptr + token * k_heads * head_dim,
            (block - q_blocks) * BLOCK_HEADS,
            k_heads,
            head_dim,
            half,
            k_head,
            cos,
            sin,
            HAS_REST,
            BLOCK_HEADS,
            BLOCK_HALF,
            BLOCK_REST,
        )
