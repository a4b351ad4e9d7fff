"""The Triton kernels of the short causal convolution on the CPU, in float32.

Run by test_interpreted.py, or: TRITON_INTERPRET=1 pytest and this file's path.
"""

import pytest
import torch

from triptych_kernels import causal_conv1d, causal_conv1d_ref
from triptych_kernels.triton_ops import causal_conv1d as kernels

pytestmark = pytest.mark.usefixtures("poison")

# Documents shorter than the filter, of nothing, and across the rows that programs share out.
PACKS = [[1], [5, 0, 1, 9, 2], [0, 0, 23, 0], [1, 1, 1, 1, 1, 20], [0]]
# Each filter over borders of all kinds, and the usual one over every pack.
CASES = [
    (lengths, taps, silu)
    for taps, silu in ((1, True), (2, False), (4, True), (4, False), (5, True))
    for lengths in (PACKS if (taps, silu) == (4, True) else PACKS[1:4:2])
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several blocks of rows and of columns, the last of them not whole."""
    monkeypatch.setattr(kernels, "_ROWS", 4)
    monkeypatch.setattr(kernels, "_COLUMNS", 4)


def cu_seqlens_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(tokens, width=6, taps=4):
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, width), (width, taps), (width,)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(("lengths", "taps", "silu"), CASES)
def test_is_the_reference(check, lengths, taps, silu):
    bounds = cu_seqlens_of(lengths)
    x, weight, bias = inputs(sum(lengths), taps=taps)
    check(
        lambda *given: causal_conv1d(*given, bounds, silu=silu, backend="triton"),
        lambda *given: causal_conv1d_ref(*given, bounds, silu=silu),
        x,
        weight,
    )
    check(
        lambda x, w, b: causal_conv1d(x, w, bounds, bias=b, silu=silu, backend="triton"),
        lambda x, w, b: causal_conv1d_ref(x, w, bounds, bias=b, silu=silu),
        x,
        weight,
        bias,
    )


@pytest.mark.parametrize("programs", [1, 3, 50])
def test_rows_shared_out_over_programs(check, monkeypatch, programs):
    monkeypatch.setattr(kernels, "max_programs", lambda device, per_sm: programs)
    bounds = cu_seqlens_of([3, 17, 1, 9])
    check(
        lambda x, w, b: causal_conv1d(x, w, bounds, bias=b, silu=True),
        lambda x, w, b: causal_conv1d_ref(x, w, bounds, bias=b, silu=True),
        *inputs(30),
    )


def test_parts_of_a_part_of_a_projection(check):
    """Rows wider than what is read of them, and gradients of rows wider than what comes in."""
    bounds = cu_seqlens_of([5, 0, 9])
    x, weight, bias = inputs(14, width=17)

    def on(op, **options):
        def run(x, w, b):
            w, b = w[2:16], b[2:16]
            parts = op(x[:, 2:16], w, bounds, bias=b, silu=True, **options)
            q, k, v = parts if options else parts.split([5, 3, 6], -1)
            return torch.cat([q * 2, v, k.square()], -1)

        return run

    ours = on(causal_conv1d, widths=(5, 3, 6))
    check(ours, on(causal_conv1d_ref), x, weight, bias)
    parts = causal_conv1d(x, weight, bounds, widths=(9, 8))
    assert all(part.is_contiguous() for part in parts)


def test_a_part_without_a_gradient(check):
    bounds = cu_seqlens_of([5, 9])
    check(
        lambda x, w: causal_conv1d(x, w, bounds, silu=True, widths=(4, 2))[1],
        lambda x, w: causal_conv1d_ref(x, w, bounds, silu=True)[:, 4:],
        *inputs(14)[:2],
    )


def test_documents_do_not_meet():
    """What is not a number stays in its document, forward and backward."""
    lengths, inside = [5, 0, 1, 9, 2], slice(6, 15)
    outside = torch.ones(17, dtype=torch.bool)
    outside[inside] = False
    x, weight, _ = inputs(17)
    spoiled = x.clone()
    spoiled[inside] = float("nan")
    found = []
    for y in (x.requires_grad_(), spoiled.requires_grad_()):
        out = causal_conv1d(y, weight, cu_seqlens_of(lengths), silu=True, backend="triton")
        found.append((out.detach(), *torch.autograd.grad(out, y, torch.ones_like(out))))
    for clean, other in zip(*found, strict=True):
        assert torch.equal(clean[outside], other[outside])
        assert other[inside].isnan().all()
