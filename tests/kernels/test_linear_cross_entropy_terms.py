"""`linear_cross_entropy` with its further terms: z-loss, soft cap, smoothing, weights; traced."""

import pytest
import torch
import torch.nn.functional as F

from triptych_kernels import linear_cross_entropy, linear_cross_entropy_ref
from triptych_kernels.linear_cross_entropy import _linear_cross_entropy

BACKENDS = ["chunked", "reference"]
TERMS = [
    {"z_loss": 0.1},
    {"softcap": 1.5},
    {"label_smoothing": 0.3},
    {"z_loss": 0.05, "softcap": 2.0, "label_smoothing": 0.1},
]


def problem(num_rows, hidden=24, vocabulary=63, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(num_rows, hidden, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, hidden, generator=generator).mul_(0.3).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype)
    labels = torch.randint(vocabulary, (num_rows,), generator=generator)
    labels[1::3] = -100
    return hidden_states, weight, bias, labels, torch.rand(num_rows, generator=generator)


def exact(
    x, weight, bias, labels, weights=None, z_loss=0.0, softcap=None, label_smoothing=0.0
):  # fmt: skip
    """The formula, row by row of the targets. -> losses (N,)."""
    logits = F.linear(x, weight, bias)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    is_target = labels != -100
    lse = logits.logsumexp(-1)
    target = F.one_hot(labels.where(is_target, 0), logits.shape[1]).to(logits.dtype)
    target = (1 - label_smoothing) * target + label_smoothing / logits.shape[1]
    losses = lse - (target * logits).sum(-1) + z_loss * lse**2
    return (losses if weights is None else losses * weights).masked_fill(~is_target, 0.0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_formula(check, backend, weighted, terms, dtype):
    hidden_states, weight, bias, labels, weights = problem(20, dtype=dtype)
    given = weights if weighted else None
    check(
        lambda x, w, b: linear_cross_entropy(
            x, w, labels, bias=b, weights=given, chunk_rows=5, backend=backend, **terms
        ),
        lambda x, w, b: exact(x, w, b, labels, given, **terms).sum(),
        hidden_states,
        weight,
        bias,
    )


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("terms", [{}, TERMS[-1]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_per_token(backend, terms):
    x, weight, bias, labels, weights = problem(20)
    options = {"bias": bias, "weights": weights, "chunk_rows": 6, **terms}
    x.requires_grad_()
    loss, losses = linear_cross_entropy(
        x, weight, labels, return_per_token=True, backend=backend, **options
    )
    torch.testing.assert_close(losses, exact(x, weight, bias, labels, weights, **terms).detach())
    assert losses.dtype == torch.float32 and not losses.requires_grad and loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(x, weight, labels, backend=backend, **options))
    torch.testing.assert_close(losses.sum(), loss.detach())
    with torch.no_grad():
        again = linear_cross_entropy(
            x, weight, labels, return_per_token=True, backend=backend, **options
        )
    assert torch.equal(again[1], losses)


@pytest.mark.parametrize("num_rows", [0, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_targets(backend, num_rows):
    x, weight, _, labels, weights = problem(num_rows)
    x.requires_grad_()
    loss, losses = linear_cross_entropy(
        x,
        weight,
        torch.full_like(labels, -100),
        weights=weights,
        return_per_token=True,
        backend=backend,
        **TERMS[-1],
    )
    assert loss.item() == 0 and losses.shape == (num_rows,) and not losses.any()
    assert not torch.autograd.grad(loss, x)[0].any()


def test_weights_get_no_gradient_and_may_be_any_number():
    x, weight, _, labels, weights = problem(20)
    x.requires_grad_()
    for backend in BACKENDS:
        loss = linear_cross_entropy(
            x, weight, labels, weights=weights.clone().requires_grad_(), backend=backend
        )
        loss.backward()
    kept = labels % 2 == 0  # booleans: the rows that count
    dropped = linear_cross_entropy(x, weight, labels.where(kept, -100))
    torch.testing.assert_close(linear_cross_entropy(x, weight, labels, weights=kept), dropped)


def test_gradcheck():
    x, weight, bias, labels, weights = problem(6, 3, 5, torch.float64)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    for backend in BACKENDS:
        assert torch.autograd.gradcheck(
            lambda x, w, b, backend=backend: linear_cross_entropy(
                x, w, labels, bias=b, weights=weights, chunk_rows=2, backend=backend, **TERMS[-1]
            ),
            tensors,
        )


@pytest.mark.parametrize("terms", [{}, TERMS[-1]])
def test_compiles_in_one_graph(terms):
    x, weight, bias, labels, weights = problem(20)

    def head(x, w, b, num_targets=None):
        loss, losses = linear_cross_entropy(
            x * 2,
            w,
            labels,
            bias=b,
            weights=weights,
            chunk_rows=6,
            num_targets=num_targets,
            return_per_token=True,
            **terms,
        )
        return loss * 3, losses

    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for num_targets in (None, int((labels != -100).sum())):
        got, want = compiled(*tensors, num_targets), head(*tensors, num_targets)
        assert torch.equal(got[1], want[1]) and not got[1].requires_grad
        gradients = torch.autograd.grad(got[0], tensors), torch.autograd.grad(want[0], tensors)
        torch.testing.assert_close((got[0], *gradients[0]), (want[0], *gradients[1]))
    with torch.no_grad():
        assert torch.equal(compiled(*tensors)[1], want[1])
    with pytest.raises(ValueError, match="num_targets must be the number"):
        compiled(*tensors, 3)


@pytest.mark.parametrize("wants", [[True] * 3, [False, True, False]])
def test_opcheck(wants):
    x, weight, bias, labels, weights = problem(7, 4, 5)
    weight = weight.T.contiguous().T  # dense, but not contiguous
    for tensor, wanted in zip((x, weight, bias), wants, strict=True):
        tensor.requires_grad_(wanted)
    terms = (0.1, 2.0, 0.1)
    for arguments in [
        (x, weight, bias, labels, weights, -100, None, 3, *terms, "chunked", wants),
        (x, weight, None, labels, None, -100, None, 9, 0.0, None, 0.0, "chunked", [*wants[:2], 0]),
    ]:
        torch.library.opcheck(_linear_cross_entropy, arguments)


def test_fake_tensors_and_checkpointing():
    with torch._subclasses.FakeTensorMode():
        x, weight = torch.empty(9, 4, requires_grad=True), torch.empty(5, 4, requires_grad=True)
        labels = torch.empty(9, dtype=torch.int64)
        loss = linear_cross_entropy(x, weight, labels)
        loss.backward()
    assert loss.shape == () and x.grad.shape == x.shape and weight.grad.shape == weight.shape
    x, weight, _, labels, _ = problem(20)
    weight.requires_grad_()
    once, kept = (
        linear_cross_entropy(x, weight, labels),
        torch.utils.checkpoint.checkpoint(
            linear_cross_entropy, x, weight, labels, use_reentrant=False
        ),
    )
    assert torch.equal(*(torch.autograd.grad(loss, weight)[0] for loss in (once, kept)))


def test_wrong_values_are_refused():
    x, weight, _, labels, weights = problem(20)
    for settings, message in [
        ({"z_loss": -1.0}, "z_loss must be at least 0, got -1.0"),
        ({"softcap": 0.0}, "softcap must be above 0, got 0.0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"weights": weights[1:]}, r"\(63, 24\), \(20,\), \(19,\); flatten the batch first"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(x, weight, labels, **settings)


def test_the_reference_has_torchs_label_smoothing():
    x, weight, _, labels, _ = problem(20)
    loss = linear_cross_entropy_ref(x, weight, labels, label_smoothing=0.2)
    torch.testing.assert_close(
        loss, F.cross_entropy(x @ weight.T, labels, label_smoothing=0.2, reduction="sum")
    )
