import pytest
import torch

from triptych_kernels import linear_cross_entropy, linear_cross_entropy_ref

BACKENDS = ["chunked", "reference"]


def problem(num_rows, hidden=24, vocabulary=63, dtype=torch.float32, ignored=0.4):
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(num_rows, hidden, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, hidden, generator=generator).mul_(0.3).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype)
    labels = torch.randint(vocabulary, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) < ignored] = -100
    return hidden_states, weight, bias, labels


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk_rows", [4096, 7, 1])
@pytest.mark.parametrize(("num_rows", "vocabulary"), [(1, 63), (63, 760), (40, 11)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_formula(check, backend, num_rows, vocabulary, chunk_rows, dtype):
    hidden_states, weight, bias, labels = problem(num_rows, 24, vocabulary, dtype)
    labels[0] = 5  # at least one target
    check(
        lambda x, w, b: linear_cross_entropy(
            x, w, labels, bias=b, chunk_rows=chunk_rows, backend=backend
        ),
        lambda x, w, b: linear_cross_entropy_ref(x, w, labels, bias=b),
        hidden_states,
        weight,
        bias,
    )


def test_the_reference_is_the_mean_that_torch_gives_times_the_targets():
    hidden_states, weight, _, labels = problem(30)
    loss = linear_cross_entropy(hidden_states, weight, labels)
    mean = torch.nn.functional.cross_entropy(hidden_states @ weight.T, labels)
    torch.testing.assert_close(loss, mean * (labels != -100).sum())


@pytest.mark.parametrize("num_rows", [0, 9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_targets_give_zero_and_zero_gradients(backend, num_rows):
    hidden_states, weight, bias, labels = problem(num_rows)
    tensors = [x.requires_grad_() for x in (hidden_states, weight, bias)]
    loss = linear_cross_entropy(
        hidden_states, weight, torch.full_like(labels, -100), bias=bias, backend=backend
    )
    assert loss.shape == () and loss.dtype == torch.float32 and loss.item() == 0
    for gradient, x in zip(torch.autograd.grad(loss, tensors), tensors, strict=True):
        assert gradient.shape == x.shape and not gradient.any()


def test_bfloat16_gradients_keep_their_dtype_and_the_loss_is_float32():
    hidden_states, weight, bias, labels = problem(20, dtype=torch.bfloat16)
    tensors = [x.requires_grad_() for x in (hidden_states, weight, bias)]
    loss = linear_cross_entropy(hidden_states, weight, labels, bias=bias, chunk_rows=3)
    assert loss.dtype == torch.float32
    assert {g.dtype for g in torch.autograd.grad(loss, tensors)} == {torch.bfloat16}


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradient_of_one_input_alone(wanted):
    hidden_states, weight, bias, labels = problem(20)
    tensors = [hidden_states, weight, bias]
    tensors[wanted].requires_grad_()
    ours = linear_cross_entropy(*tensors[:2], labels, bias=bias, chunk_rows=6)
    plain = linear_cross_entropy_ref(*tensors[:2], labels, bias=bias)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, tensors[wanted])[0] for loss in (ours, plain))
    )


def test_no_grad_and_twice_backward():
    hidden_states, weight, _, labels = problem(20)
    weight.requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden_states, weight, labels).requires_grad
    loss = linear_cross_entropy(hidden_states, weight, labels)
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_num_targets_and_ignore_index():
    hidden_states, weight, _, labels = problem(20)
    wanted = linear_cross_entropy(hidden_states, weight, labels)
    count = int((labels != -100).sum())
    assert torch.equal(
        linear_cross_entropy(hidden_states, weight, labels, num_targets=count), wanted
    )
    labels = labels.where(labels != -100, -1)
    assert torch.equal(linear_cross_entropy(hidden_states, weight, labels, ignore_index=-1), wanted)


def test_non_contiguous_inputs(check):
    hidden_states, weight, _, labels = problem(48)
    check(
        lambda x, w: linear_cross_entropy(x[::2, ::2], w.T[::2].T, labels[::2], chunk_rows=5),
        lambda x, w: linear_cross_entropy_ref(x[::2, ::2], w.T[::2].T, labels[::2]),
        hidden_states,
        weight,
    )


def test_gradcheck():
    hidden_states, weight, bias, labels = problem(7, 4, 5, torch.float64)
    tensors = [x.requires_grad_() for x in (hidden_states, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_cross_entropy(x, w, labels, bias=b, chunk_rows=2), tensors
    )


def test_never_holds_all_logits():
    hidden_states, weight, _, labels = problem(64, 8, 50, ignored=0)
    hidden_states.requires_grad_()
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        linear_cross_entropy(hidden_states, weight, labels, chunk_rows=8).backward()
    assert max(sizes) <= max(8 * 50, 64 * 8)


def test_autocast_computes_in_its_dtype():
    hidden_states, weight, _, labels = problem(20)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden_states, weight, labels)
    (gradient,) = torch.autograd.grad(loss, weight)
    wanted = linear_cross_entropy(hidden_states.bfloat16(), weight.bfloat16(), labels)
    assert torch.equal(loss, wanted) and gradient.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone, as in torch
        assert (
            linear_cross_entropy(hidden_states.double(), weight.double(), labels).dtype.itemsize
            == 8
        )


def test_wrong_labels_counts_and_shapes_are_refused():
    hidden_states, weight, _, labels = problem(20)
    with pytest.raises(ValueError, match=r"labels must lie in 0..62 or be -100"):
        linear_cross_entropy(hidden_states, weight, labels + 63)
    with pytest.raises(ValueError, match="num_targets must be the number of labels"):
        linear_cross_entropy(hidden_states, weight, labels, num_targets=20)
    with pytest.raises(ValueError, match="flatten the batch first"):
        linear_cross_entropy(hidden_states[None], weight, labels)
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        linear_cross_entropy(hidden_states, weight, labels, chunk_rows=0)
    with pytest.raises(ValueError, match=r"labels must be int64, got torch\.float32"):
        linear_cross_entropy(hidden_states, weight, labels.float())
    with pytest.raises(ValueError, match=r"one dtype, got torch\.bfloat16, torch\.float32"):
        linear_cross_entropy(hidden_states.bfloat16(), weight, labels)
