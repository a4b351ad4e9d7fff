import os
import random
import sys

import pytest
import torch

from triptych_kernels import weighted_sum, weighted_sum_ref
from triptych_kernels.weighted_sum import _weighted_sum

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = [0.1, 0.37, 0.2, 0.25, 0.08]


def tensors(count, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def ulps(got, want):
    """Distance in units of the last place, for values of one sign."""
    kind = torch.int32 if got.dtype == torch.float32 else torch.int16
    return (got.view(kind).long() - want.view(kind).long()).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (33, 1000), (2, 3, 5)])
@pytest.mark.usefixtures("poison")
def test_is_within_one_ulp_in_any_order(shape, dtype):
    given = [x.abs() + 0.01 for x in tensors(5, *shape, dtype=dtype)]  # no cancellation
    want = weighted_sum_ref(given, WEIGHTS)
    pairs = list(zip(given, WEIGHTS, strict=True))
    for seed in range(4):
        random.Random(seed).shuffle(pairs)
        xs, ws = zip(*pairs, strict=True)
        assert ulps(weighted_sum(xs, ws), want) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_cancelling_terms_lose_what_the_docstring_says(dtype):
    given = tensors(5, 20000, dtype=dtype)
    exact = sum(x.double() * w for x, w in zip(given, WEIGHTS, strict=True))
    terms = sum(x.double().abs() * w for x, w in zip(given, WEIGHTS, strict=True))
    y = weighted_sum(given, WEIGHTS)
    accumulated = 5 * 2.0 ** (-52 if dtype == torch.float32 else -23) * terms
    spacing = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert ((y.double() - exact).abs() <= spacing / 2 + accumulated).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 49, 4000])
def test_equal_tensors_come_back_bit_for_bit(count, dtype):
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, info.max, -info.max, info.tiny, info.smallest_normal / 4])
    x = torch.cat([tensors(1, 500)[0] * 3, special]).to(dtype)
    y = weighted_sum([x] * count, [1 / count] * count)
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(y.view(kind), x.view(kind))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_other_output_dtypes(backend):
    halves = tensors(3, 50, dtype=torch.bfloat16)
    y = weighted_sum(halves, WEIGHTS[:3], dtype=torch.float32, backend=backend)
    want = sum(x.double() * w for x, w in zip(halves, WEIGHTS, strict=False)).float()
    assert y.dtype == torch.float32 and ulps(y, want) == 0
    y = weighted_sum(tensors(3, 50), WEIGHTS[:3], dtype=torch.float16, backend=backend)
    assert y.dtype == torch.float16


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_out_may_be_one_of_the_tensors_and_non_contiguous(backend):
    given = tensors(3, 40, 6)
    want = weighted_sum(given, WEIGHTS[:3])
    out = torch.full((6, 40), float("nan")).t()
    assert weighted_sum(given, WEIGHTS[:3], out=out, backend=backend) is out
    assert torch.equal(out, want)
    assert weighted_sum(given, WEIGHTS[:3], out=given[1], backend=backend) is given[1]
    assert torch.equal(given[1], want)
    narrow = torch.empty(40, 6, dtype=torch.bfloat16)
    assert weighted_sum(tensors(2, 40, 6), [0.5, 0.5], out=narrow).dtype == torch.bfloat16


def test_non_contiguous_tensors():
    given = tensors(3, 20, 30)
    strided = [given[0].t().contiguous().t(), torch.stack([given[1]] * 2, -1)[..., 0], given[2]]
    assert torch.equal(weighted_sum(strided, WEIGHTS[:3]), weighted_sum(given, WEIGHTS[:3]))
    expanded = [torch.ones(1, 5).expand(4, 5)] * 2
    assert torch.equal(weighted_sum(expanded, [0.5, 0.5]), torch.ones(4, 5))


def test_many_chunks_are_one_sum(monkeypatch):
    given = tensors(3, 1000, dtype=torch.bfloat16)
    whole = weighted_sum(given, WEIGHTS[:3])
    monkeypatch.setattr(sys.modules["triptych_kernels.weighted_sum"], "_CHUNK", 7)
    assert torch.equal(weighted_sum(given, WEIGHTS[:3]), whole)


def test_empty_and_scalar_tensors():
    assert weighted_sum([torch.ones(0, 3)] * 2, [1, 2]).shape == (0, 3)
    assert weighted_sum([torch.tensor(2.0)] * 2, [1, 2]) == 6


def test_result_is_new_memory():
    x = torch.ones(3)
    assert weighted_sum([x], [1.0]).data_ptr() != x.data_ptr()


def test_gradients():
    given = [x.bfloat16().requires_grad_() for x in tensors(3, 4)]
    given[1].requires_grad_(False)
    y = weighted_sum(given, WEIGHTS[:3])
    y.backward(torch.ones_like(y))
    assert torch.equal(given[0].grad, torch.full((4,), 0.1).bfloat16())
    assert given[1].grad is None
    leaves = [x.double().requires_grad_() for x in tensors(2, 3)]
    assert torch.autograd.gradcheck(lambda *a: weighted_sum_ref(a, [0.3, 0.7]), leaves)


def test_opcheck():
    given = [x.requires_grad_() for x in tensors(3, 4)]
    for dtype in DTYPES[:2]:
        torch.library.opcheck(_weighted_sum, (given, WEIGHTS[:3], dtype, "chunked"))


def test_compiles_in_one_graph():
    def average(*given):
        return weighted_sum(given, WEIGHTS[:3])

    given = [x.requires_grad_() for x in tensors(3, 4, 5)]
    y = torch.compile(average, fullgraph=True, backend="aot_eager")(*given)
    assert torch.equal(y, average(*given))
    y.sum().backward()
    torch.testing.assert_close(given[1].grad, torch.full((4, 5), 0.37))
    plain = [x.detach() for x in given]
    compiled = torch.compile(weighted_sum, fullgraph=True, backend="aot_eager")
    out = torch.empty(4, 5)
    compiled(plain, WEIGHTS[:3], out=out)
    assert torch.equal(out, y)


def test_twice_the_same_bits_whatever_the_number_of_threads():
    given = tensors(4, 1 << 19, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    first = weighted_sum(given, WEIGHTS[:4])
    try:
        torch.set_num_threads(min(2, os.cpu_count() or 1))
        assert torch.equal(weighted_sum(given, WEIGHTS[:4]), first)
    finally:
        torch.set_num_threads(threads)


def test_what_does_not_fit_is_refused_by_its_index():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"tensors\[2\] .*got \(3, 2\)"):
        weighted_sum([x, x, x.t()], [1, 1, 1])
    with pytest.raises(ValueError, match=r"tensors\[1\] .*got \(2, 3\) torch.bfloat16"):
        weighted_sum([x, x.bfloat16()], [1, 1])
    with pytest.raises(ValueError, match=r"tensors\[1\] .*on meta"):
        weighted_sum([x, x.to("meta")], [1, 1])
    with pytest.raises(ValueError, match="got 2 tensors and 1 weights"):
        weighted_sum([x, x], [1])
    with pytest.raises(ValueError, match="at least one tensor"):
        weighted_sum([], [])
    with pytest.raises(ValueError, match=r"the tensors must be float16.*got torch.int64"):
        weighted_sum([x.long()], [1])
    with pytest.raises(ValueError, match=r"the output must be float16.*got torch.float64"):
        weighted_sum([x], [1], dtype=torch.float64)
    with pytest.raises(ValueError, match="out must be"):
        weighted_sum([x], [1], out=torch.ones(3, 2))
    with pytest.raises(ValueError, match="no tensor may require a gradient"):
        weighted_sum([x.clone().requires_grad_()], [1], out=torch.ones(2, 3))


def test_a_second_derivative_is_refused():
    x = torch.ones(3, requires_grad=True)
    y = weighted_sum([x, x], [0.5, 0.25]).square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="must not be differentiated"):
        torch.autograd.grad(first.square().sum() + x.sum(), x)
