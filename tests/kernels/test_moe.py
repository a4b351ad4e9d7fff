import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from triptych_kernels import balance_loss, expert_counts, moe_mlp, moe_mlp_ref, route, z_loss
from triptych_kernels.moe import _moe_mlp, _moe_mlp_backward


def inputs(tokens=13, hidden=16, width=8, num_experts=5, top_k=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    experts = torch.rand(tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator)
    x, gate_up = randn(tokens, hidden), randn(num_experts, 2 * width, hidden) / hidden**0.5
    down = randn(num_experts, hidden, width) / width**0.5
    return x.to(dtype), gate_up.to(dtype), down.to(dtype), weights, experts


def exact(x, gate_up, down, weights, experts):
    """Every expert on every token, in float64."""
    gate, up = torch.einsum("th,efh->tef", x, gate_up).chunk(2, dim=-1)
    given = torch.einsum("tef,ehf->teh", F.silu(gate) * up, down)
    picked = given.gather(1, experts[..., None].expand(-1, -1, x.shape[1]))
    return (weights[..., None] * picked).sum(1)


def upstream(y):
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return noise.bfloat16().to(y.dtype)  # the same values in every dtype


def gradients(op, x, gate_up, down, weights, experts, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, gate_up, down)]
    leaves.append(weights.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_())
    y = op(*leaves, experts)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream(y))]


def relative(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("backend", ["grouped", "reference"])
@pytest.mark.parametrize(
    "shape",
    [(13, 16, 8, 5, 2), (1, 8, 24, 3, 1), (40, 32, 16, 7, 7), (3, 16, 8, 11, 2), (65, 8, 40, 2, 1)],
)
@pytest.mark.usefixtures("poison")
def test_matches_the_formula_as_well_as_eager(shape, backend):
    given = inputs(*shape)
    for dtype, eps in ((torch.float32, 1e-6), (torch.bfloat16, 1e-3)):
        # The truth for rounded inputs: they are what both versions see.
        rounded = [t.to(dtype).double() if t.is_floating_point() else t for t in given[:3]]
        want = gradients(exact, *rounded, *given[3:], torch.float64)
        ours = gradients(lambda *a: moe_mlp(*a, backend=backend), *given, dtype)
        eager = gradients(moe_mlp_ref, *given, dtype)
        for got, plain, true in zip(ours, eager, want, strict=True):
            assert relative(got, true) <= 2 * relative(plain, true) + eps


def test_widths_that_grouped_mm_cannot_take_run_on_the_reference():
    given = inputs(hidden=7, width=3)
    ours, want = (gradients(op, *given, torch.float32) for op in (moe_mlp, moe_mlp_ref))
    assert all(map(torch.equal, ours, want))
    with pytest.raises(ValueError, match="widths that are multiples of 4, got 7"):
        moe_mlp(*given, backend="grouped")
    with pytest.raises(ValueError, match="widths that are multiples of 4, got 3"):
        moe_mlp(*inputs(width=3), backend="grouped")


@pytest.mark.parametrize("busy", [0, 4])
@pytest.mark.usefixtures("poison")
def test_all_tokens_to_one_expert(busy):
    *given, experts = inputs(top_k=1)
    experts = torch.full_like(experts, busy)
    ours = gradients(moe_mlp, *given, experts, torch.float32)
    want = gradients(exact, *given, experts, torch.float64)
    for got, true in zip(ours, want, strict=True):
        torch.testing.assert_close(got.double(), true, atol=1e-5, rtol=1e-4)
    idle = [e for e in range(5) if e != busy]
    assert not ours[2][idle].any() and not ours[3][idle].any()


@pytest.mark.parametrize("backend", ["grouped", "reference"])
def test_no_tokens(backend):
    given = inputs(tokens=0)
    y, *grads = gradients(lambda *a: moe_mlp(*a, backend=backend), *given, torch.float32)
    assert y.shape == (0, 16)
    assert [g.shape for g in grads] == [t.shape for t in given[:4]]
    assert not any(g.any() for g in grads)


def test_non_contiguous_inputs():
    x, gate_up, down, weights, experts = inputs(tokens=12)
    strided = (
        x.t().contiguous().t(),
        gate_up.mT.contiguous().mT,
        down.mT.contiguous().mT,
        weights.t().contiguous().t(),
        experts.t().contiguous().t(),
    )
    ours = gradients(moe_mlp, *strided, torch.float32)
    want = gradients(moe_mlp, x, gate_up, down, weights, experts, torch.float32)
    for got, plain in zip(ours, want, strict=True):
        torch.testing.assert_close(got, plain)


def test_the_same_expert_twice_counts_twice():
    x, gate_up, down, weights, experts = inputs()
    experts[:, 1] = experts[:, 0]
    once = moe_mlp(x, gate_up, down, weights.sum(1, keepdim=True), experts[:, :1])
    torch.testing.assert_close(moe_mlp(x, gate_up, down, weights, experts), once)


def test_upstream_gradient_of_stride_zero():
    *given, experts = inputs()
    leaves = [t.requires_grad_() for t in given]
    moe_mlp(*leaves, experts).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in leaves)


def test_only_the_gradients_that_are_asked_for():
    x, gate_up, down, weights, experts = inputs()
    want = gradients(moe_mlp, x, gate_up, down, weights, experts, torch.float32)
    for index, leaf in enumerate((x, gate_up, down, weights), start=1):
        leaf.requires_grad_()
        y = moe_mlp(x, gate_up, down, weights, experts)
        assert torch.equal(torch.autograd.grad(y, leaf, upstream(y))[0], want[index])
        leaf.requires_grad_(False)


def test_saves_the_pre_activation_and_no_copies():
    *given, experts = inputs(tokens=64, hidden=16, width=8, top_k=4)
    leaves = [t.requires_grad_() for t in given]
    saved = []

    def keep(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        moe_mlp(*leaves, experts)
    own = {t.data_ptr() for t in (*leaves, experts)}
    floating = [t for t in saved if t.data_ptr() not in own and t.is_floating_point()]
    assert [tuple(t.shape) for t in floating] == [(64 * 4, 2 * 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twice_the_same_bits(dtype):
    given = inputs(tokens=100, top_k=3)
    first, second = (gradients(moe_mlp, *given, dtype) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_gradcheck_of_the_reference():
    *given, experts = inputs(tokens=4, hidden=3, width=2, num_experts=3)
    leaves = [t.double().requires_grad_() for t in given]
    assert torch.autograd.gradcheck(lambda *a: moe_mlp_ref(*a, experts), leaves)


def test_opcheck():
    *given, experts = inputs()
    leaves = [t.requires_grad_() for t in given]
    torch.library.opcheck(_moe_mlp, (*leaves, experts, "grouped", 0, 1))
    with torch.no_grad():
        y, *kept = _moe_mlp(*leaves, experts, "grouped", 0, 1)
    plain = [t.detach() for t in leaves]
    wants = [True, False, True, True]
    torch.library.opcheck(_moe_mlp_backward, (y, *plain, *kept, "grouped", wants))


def test_compiles_in_one_graph():
    *given, experts = inputs()
    compiled = torch.compile(moe_mlp, fullgraph=True, backend="aot_eager")
    ours = gradients(compiled, *given, experts, torch.float32)
    want = gradients(moe_mlp, *given, experts, torch.float32)
    assert all(map(torch.equal, ours, want))


def in_parts(x, gate_up, down, weights, experts, backend=None):
    """The sum over two parts of six experts, as two ranks would compute it."""
    halves = zip(gate_up.chunk(2), down.chunk(2), strict=True)
    return sum(
        moe_mlp(x, *stacks, weights, experts, part=(rank, 2), backend=backend)
        for rank, stacks in enumerate(halves)
    )


@pytest.mark.parametrize("backend", ["grouped", "reference"])
@pytest.mark.parametrize("only", [None, 1])  # of all experts, those that tokens go to
@pytest.mark.usefixtures("poison")
def test_parts_of_the_experts_add_up(backend, only):
    *given, experts = inputs(num_experts=6, top_k=3)
    if only is not None:
        experts = torch.full_like(experts, only)
    ours = gradients(lambda *a: in_parts(*a, backend=backend), *given, experts, torch.float32)
    want = gradients(exact, *given, experts, torch.float64)
    for got, true in zip(ours, want, strict=True):
        torch.testing.assert_close(got.double(), true, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_part_compiles_in_one_graph_whatever_its_number_of_rows(backend):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(in_parts, fullgraph=True, backend=graphs)
    *given, _ = inputs(num_experts=6, top_k=3)
    for seed in range(3):
        noise = torch.rand(13, 6, generator=torch.Generator().manual_seed(seed))
        experts = noise.argsort(1)[:, :3]
        ours = gradients(compiled, *given, experts, torch.float32)
        want = gradients(in_parts, *given, experts, torch.float32)
        assert all(map(torch.equal, ours, want))
    assert graphs.frame_count == 1


def test_checkpointing_gives_the_same_gradients():
    *given, experts = inputs()

    def checkpointed(*args):
        return torch.utils.checkpoint.checkpoint(moe_mlp, *args, use_reentrant=False)

    ours = gradients(checkpointed, *given, experts, torch.float32)
    want = gradients(moe_mlp, *given, experts, torch.float32)
    assert all(map(torch.equal, ours, want))


def test_autocast_takes_the_low_dtype():
    *given, experts = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = moe_mlp(*given, experts)
    assert torch.equal(y, moe_mlp(*(t.bfloat16() for t in given[:3]), given[3], experts))


def test_weights_may_be_of_another_dtype():
    x, gate_up, down, weights, experts = inputs()
    for name in ("grouped", "reference"):
        want = moe_mlp(x, gate_up, down, weights, experts, backend=name)
        got = moe_mlp(x, gate_up, down, weights.double(), experts, backend=name)
        torch.testing.assert_close(got, want)


def test_what_does_not_fit_is_refused():
    x, gate_up, down, weights, experts = inputs()
    with pytest.raises(ValueError, match=r"\(E, 2F, H\).*got \(13, 16\), \(5, 8, 16\)"):
        moe_mlp(x, gate_up[:, :8], down, weights, experts)
    with pytest.raises(ValueError, match="one dtype"):
        moe_mlp(x, gate_up.bfloat16(), down, weights, experts)
    with pytest.raises(ValueError, match=r"experts must lie in 0\.\.9, got 0\.\.10"):
        moe_mlp(x, gate_up, down, weights, torch.arange(26).view(13, 2) % 11, part=(0, 2))
    with pytest.raises(ValueError, match=r"experts must lie in 0\.\.4, got 0\.\.5"):
        moe_mlp(x, gate_up, down, weights, torch.arange(26).view(13, 2) % 6)


def test_route_softmax_and_sigmoid():
    logits = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    weights, experts = route(logits.bfloat16(), 3, normalize=False)
    top = logits.bfloat16().float().softmax(-1).topk(3)
    assert torch.equal(weights, top.values) and torch.equal(experts, top.indices)
    weights, _ = route(logits, 3, normalize=True, score="sigmoid")
    torch.testing.assert_close(weights.sum(-1), torch.ones(9))
    assert weights.dtype == torch.float32


def test_route_bias_moves_the_choice_and_not_the_weights():
    logits = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bias = torch.tensor([0.0, 0, 10, 0, 0, 0])
    weights, experts = route(logits, 2, normalize=False, score="sigmoid", bias=bias)
    assert (experts[:, 0] == 2).all()
    assert torch.equal(weights, logits.sigmoid().gather(1, experts))
    weights.sum().backward()
    assert ((logits.grad != 0).sum(1) == 2).all()


def test_route_of_scores_that_are_all_zero_is_finite():
    weights, _ = route(torch.full((2, 4), -200.0), 2, normalize=True, score="sigmoid")
    assert torch.isfinite(weights).all()


def test_route_refuses():
    with pytest.raises(ValueError, match=r"top_k must lie in 1\.\.4"):
        route(torch.ones(2, 4), 5, normalize=True)
    with pytest.raises(ValueError, match="softmax or sigmoid"):
        route(torch.ones(2, 4), 1, normalize=True, score="relu")
    with pytest.raises(ValueError, match=r"\(T, E\)"):
        route(torch.ones(2, 3, 4), 1, normalize=True)


def test_balance_loss():
    even = torch.arange(12).view(6, 2) % 4
    torch.testing.assert_close(balance_loss(torch.zeros(6, 4), even), torch.tensor(1.0))
    one = torch.zeros(6, 1, dtype=torch.int64)
    collapsed = torch.tensor([50.0, 0, 0, 0]).expand(6, 4)
    torch.testing.assert_close(balance_loss(collapsed, one), torch.tensor(4.0))
    assert balance_loss(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64)) == 0


def test_balance_loss_is_that_of_transformers_divided_by_k():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 5, generator=generator).requires_grad_()
    _, experts = route(logits, 2, normalize=True)
    share = F.one_hot(experts, 5).float().mean(0)  # (k, E), as in load_balancing_loss_func
    theirs = (share * logits.softmax(-1).mean(0)).sum() * 5
    ours = balance_loss(logits, experts)
    torch.testing.assert_close(ours * 2, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours * 2, logits)[0], torch.autograd.grad(theirs, logits)[0]
    )


def test_masked_tokens_do_not_count():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 5, generator=generator)
    _, experts = route(logits, 2, normalize=True)
    mask = torch.arange(10) < 7
    logits[7:] = float("nan")
    for ours, want in (
        (
            balance_loss(logits, experts, mask=mask, score="sigmoid"),
            balance_loss(logits[:7], experts[:7], score="sigmoid"),
        ),
        (z_loss(logits, mask=mask), z_loss(logits[:7])),
        (z_loss(logits[:7]), logits[:7].logsumexp(-1).square().mean()),
    ):
        torch.testing.assert_close(ours, want)
    counts = expert_counts(experts, 5, mask=mask)
    assert torch.equal(counts, torch.bincount(experts[:7].flatten(), minlength=5))


def test_balance_loss_over_several_ranks_counts():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 5, generator=generator)
    _, experts = route(logits, 2, normalize=True)
    counts = expert_counts(experts, 5)
    halves = [balance_loss(logits[i : i + 5], experts[i : i + 5], counts=counts) for i in (0, 5)]
    torch.testing.assert_close(sum(halves) / 2, balance_loss(logits, experts))
