import inspect

import pytest
import torch
import torch.nn.functional as F

from triptych_kernels import gated_delta_rule, gated_delta_rule_ref
from triptych_kernels.dispatch import FLA_KEEPS_FORWARD
from triptych_kernels.gated_delta_rule import _gated_delta_rule
from triptych_kernels.gated_delta_rule_fla import gated_delta_rule_fla

# Lengths of the packed documents; 0 and 1 are allowed anywhere, 64 tokens are one chunk.
PACKS = [[7], [0, 1, 0, 6, 1, 0], [64, 65], [63, 1, 130]]


def pack(lengths, heads=2, value_heads=4, width=8, value_width=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(lengths)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = randn(num_tokens, heads, width)
    k = F.normalize(randn(num_tokens, heads, width), dim=-1)
    v = randn(num_tokens, value_heads, value_width)
    g = F.logsigmoid(randn(num_tokens, value_heads))
    beta = randn(num_tokens, value_heads).sigmoid()
    return [x.to(dtype) for x in (q, k, v, g, beta)], cu_seqlens_of(lengths)


def cu_seqlens_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def with_gradients(op, tensors):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = op(*tensors)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lengths", PACKS)
def test_chunked_is_the_recurrence(check, lengths, dtype):
    tensors, cu_seqlens = pack(lengths, dtype=dtype)
    check(
        lambda *x: gated_delta_rule(*x, cu_seqlens),
        lambda *x: gated_delta_rule_ref(*x, cu_seqlens),
        *tensors,
    )


def test_recurrence_is_the_formula_in_matrices():
    """S_t = alpha S (I - beta k k^T) + beta v k^T, written with whole matrices."""
    (q, k, v, g, beta), cu_seqlens = pack([9], heads=1, value_heads=1, dtype=torch.float64)
    state, want = torch.zeros(5, 8, dtype=torch.float64), []
    for t in range(9):
        k_t, b = k[t, 0], beta[t, 0]
        keep = torch.eye(8, dtype=torch.float64) - b * torch.outer(k_t, k_t)
        state = g[t, 0].exp() * state @ keep + b * torch.outer(v[t, 0], k_t)
        want.append(state @ q[t, 0] * 8**-0.5)
    got, last = gated_delta_rule_ref(q, k, v, g, beta, cu_seqlens, return_state=True)
    torch.testing.assert_close(got[:, 0], torch.stack(want))
    torch.testing.assert_close(last[0, 0], state.T)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_states_continue_a_document(backend):
    """A document cut in two, the second part started from the state of the first."""
    tensors, whole = pack([100, 30])
    out, last = gated_delta_rule(*tensors, whole, return_state=True, backend=backend)
    first = [x[:70] for x in tensors]
    _, state = gated_delta_rule(*first, cu_seqlens_of([70, 0]), return_state=True, backend=backend)
    assert not state[1].any()
    rest, last_of_rest = gated_delta_rule(
        *(x[70:] for x in tensors),
        cu_seqlens_of([30, 30]),
        initial_state=state,
        return_state=True,
        backend=backend,
    )
    torch.testing.assert_close(rest, out[70:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last_of_rest, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_an_empty_document_returns_its_first_state(backend):
    tensors, _ = pack([3])
    initial = torch.randn(3, 4, 8, 5)
    _, last = gated_delta_rule(
        *tensors,
        cu_seqlens_of([0, 3, 0]),
        initial_state=initial,
        return_state=True,
        backend=backend,
    )
    assert torch.equal(last[0], initial[0])
    assert torch.equal(last[2], initial[2])
    assert not torch.equal(last[1], initial[1])


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("value", [100.0, float("nan")])
def test_no_state_leaks_into_another_document(backend, value):
    lengths, inside = [6, 70, 0, 9], slice(6, 76)
    tensors, cu_seqlens = pack(lengths)
    outside = torch.ones(85, dtype=torch.bool)
    outside[inside] = False
    spoiled = [x.clone() for x in tensors]
    for x in spoiled[:3]:
        x[inside] = value

    def op(*x):
        return gated_delta_rule(*x, cu_seqlens, backend=backend)

    for got, want in zip(with_gradients(op, spoiled), with_gradients(op, tensors), strict=True):
        assert torch.equal(got[outside], want[outside])
        assert not torch.equal(got[inside], want[inside])


def test_normalize_qk_and_scale(check):
    (q, k, v, g, beta), cu_seqlens = pack([5, 66])

    def exact(q, k, *rest):
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        return gated_delta_rule_ref(q, k, *rest, cu_seqlens, scale=0.3)

    check(
        lambda *x: gated_delta_rule(*x, cu_seqlens, normalize_qk=True, scale=0.3),
        exact,
        *(q, 3 * k, v, g, beta),
    )


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_gradcheck(backend):
    tensors, cu_seqlens = pack([3, 0, 66], 1, 2, 2, 2, torch.float64)
    initial = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    tensors = [x.requires_grad_() for x in (*tensors, initial)]
    assert torch.autograd.gradcheck(
        lambda *x: gated_delta_rule(
            *x[:5], cu_seqlens, initial_state=x[5], return_state=True, backend=backend
        ),
        tensors,
        fast_mode=True,
    )


def test_non_contiguous_inputs(check):
    (q, k, v, g, beta), cu_seqlens = pack([5, 66], heads=4)
    fused = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1)

    def on(op):
        def call(x, g, beta):
            q, k, v = x.split([32, 32, 20], dim=1)
            q, k, v = (y.unflatten(1, (4, -1)) for y in (q, k, v))
            return op(q, k, v, g.T.contiguous().T, beta, cu_seqlens)

        return call

    check(on(gated_delta_rule), on(gated_delta_rule_ref), fused, g, beta)


def test_strong_decay_does_not_overflow():
    (q, k, v, g, beta), cu_seqlens = pack([80])
    inputs = (q, k, v, 50 * g, beta)
    chunked = with_gradients(lambda *x: gated_delta_rule(*x, cu_seqlens), inputs)
    plain = with_gradients(lambda *x: gated_delta_rule_ref(*x, cu_seqlens), inputs)
    for got, want in zip(chunked, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("g", [-1e4, -torch.inf])
def test_a_state_that_is_forgotten_at_once_costs_no_digits(g):
    tensors, cu_seqlens = pack([80])
    tensors[3] = torch.where(torch.arange(80)[:, None] == 4, g, tensors[3] * 1e-2)
    exact = gated_delta_rule_ref(*(x.double() for x in tensors), cu_seqlens)
    got = gated_delta_rule(*tensors, cu_seqlens, backend="chunked")
    assert (got - exact).norm() < 1e-5 * exact.norm()


def test_autocast_leaves_it_float32():
    tensors, cu_seqlens = pack([70])
    want = gated_delta_rule(*tensors, cu_seqlens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gated_delta_rule(*tensors, cu_seqlens), want)


def test_compiles_in_one_graph():
    tensors, cu_seqlens = pack([5, 66])

    def op(*x):
        return gated_delta_rule(*x, cu_seqlens)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        with_gradients(compiled, tensors), with_gradients(op, tensors), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_fla_op_has_the_shapes_it_promises():
    """fla itself runs on CUDA; what torch.compile is told about it is checked here."""
    tensors, cu_seqlens = pack([5, 66], dtype=torch.bfloat16)
    fakes = [x.to("meta").requires_grad_() for x in tensors]
    out, state = _gated_delta_rule(*fakes, cu_seqlens.to("meta"), None, 1.0, True, "fla")
    assert (out.shape, out.dtype) == ((71, 4, 5), torch.bfloat16)
    assert (state.shape, state.dtype) == ((2, 4, 8, 5), torch.float32)
    gradients = torch.autograd.grad((out, state), fakes, (out, state))
    assert [x.shape for x in gradients] == [x.shape for x in tensors]


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_node_that_keeps_fla_forward_has_the_shapes_it_promises(normalize, initial):
    """Of the node for fla 0.6.0, too: what it keeps is as long as the row, whatever is in it."""
    tensors, cu_seqlens = pack([5, 0, 66], dtype=torch.bfloat16)
    tensors[3] = tensors[3].float()  # g, as models give it
    tensors += [torch.zeros(3, 4, 8, 5)] if initial else []
    fakes = [x.to("meta").requires_grad_() for x in tensors]
    options = (fakes[5] if initial else None, 1.0, normalize)
    out, state, *kept = gated_delta_rule_fla(*fakes[:5], cu_seqlens.to("meta"), *options)
    assert (out.shape, out.dtype) == ((71, 4, 5), torch.bfloat16)
    assert (state.shape, state.dtype) == ((3, 4, 8, 5), torch.float32)
    row, half = (71, 2), ((71, 2, 8), torch.bfloat16)
    lengths = [half, half, (row, torch.float32), (row, torch.float32)]
    nothing = [((0,), torch.bfloat16)] * 4
    assert [(x.shape, x.dtype) for x in kept] == [
        ((71, 4), torch.float32),
        ((71, 4, 64), torch.bfloat16),
        *(lengths if normalize else nothing),
    ]
    gradients = torch.autograd.grad((out, state), fakes, (out, state))
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in tensors]


def test_node_calls_fla_as_it_is():
    """The node's calls, against the signatures of the fla that is installed, if it is 0.6.0."""
    pytest.importorskip("fla")
    if not FLA_KEEPS_FORWARD:
        pytest.skip("another fla: its forward runs again in the backward")
    from fla.modules.norm.l2norm import l2norm_bwd, l2norm_fwd
    from fla.ops.gated_delta_rule.chunk import (
        chunk_gated_delta_rule_bwd,
        chunk_gated_delta_rule_fwd,
    )

    both = ["q", "k", "v", "g", "beta", "scale", "initial_state"]
    both += ["cu_seqlens", "chunk_indices", "chunk_size"]
    for part, others in (
        (chunk_gated_delta_rule_fwd, ["output_final_state"]),
        (chunk_gated_delta_rule_bwd, ["A", "do", "dht"]),
    ):
        inspect.signature(part).bind(**dict.fromkeys(both + others))
    names = [list(inspect.signature(part).parameters) for part in (l2norm_fwd, l2norm_bwd)]
    assert (names[0][:1], names[1][:3]) == (["x"], ["y", "rstd", "dy"])


def test_matches_transformers():
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    (q, k, v, g, beta), cu_seqlens = pack([130], heads=4)
    got, state = gated_delta_rule(
        q, k, v, g, beta, cu_seqlens, normalize_qk=True, return_state=True
    )
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        want, want_state = getattr(module, name)(
            *(x.unsqueeze(0) for x in (q, k, v, g, beta)),
            initial_state=None,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        torch.testing.assert_close(got, want[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state, want_state, rtol=1e-4, atol=1e-5)


def test_shapes_are_checked():
    (q, k, v, g, beta), cu_seqlens = pack([5])
    with pytest.raises(ValueError, match="Hv a multiple of H"):
        gated_delta_rule(q, k, v[:, :3], g[:, :3], beta[:, :3], cu_seqlens)
    with pytest.raises(ValueError, match="Hv a multiple of H"):
        gated_delta_rule(q, k, v, g[:, :1], beta, cu_seqlens)
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 5\), got \(2, 4, 8, 5\)"):
        gated_delta_rule(q, k, v, g, beta, cu_seqlens, initial_state=torch.zeros(2, 4, 8, 5))
    with pytest.raises(ValueError, match="rise from 0 to 5"):
        gated_delta_rule(q, k, v, g, beta, cu_seqlens_of([4]))
    with pytest.raises(ValueError, match="backend="):
        gated_delta_rule(q, k, v, g, beta, cu_seqlens, backend="fla")
