"""How `attention` calls the FlashAttention packages, which need a GPU.

Their place is taken by modules of the same signatures (flash-attn 2.8.3, flash-attn-4 4.0.0b36)
that compute by the reference. What the kernels themselves compute is checked on a GPU.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from triptych_kernels import attention, attention_ref, dispatch, flash_attention
from triptych_kernels.attention_pattern import Pattern, make_pattern
from triptych_kernels.explain import taken

CUDA = torch.device("cuda")
HALF = torch.bfloat16


def flash2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    window = None if window_size[0] < 0 else window_size[0] + 1
    assert window_size[1] == (0 if causal else window_size[0]) and isinstance(softcap, float)
    out, lse = attention_ref(
        q, k, v, cu_seqlens_q, max_seqlen_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k,
        causal=causal, scale=softmax_scale, window=window, softcap=softcap or None, return_lse=True,
    )  # fmt: skip
    return (out, lse.where(lse != -torch.inf, torch.inf), None) if return_attn_probs else out


def flash4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
    softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None,
    mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
):  # fmt: skip
    left, right = window_size
    assert right == (0 if causal else left)
    out, lse = attention_ref(
        q, k, v, cu_seqlens_q, max_seqlen_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k,
        causal=causal, scale=softmax_scale, window=None if left is None else left + 1,
        softcap=softcap or None, return_lse=True,
    )  # fmt: skip
    return out, lse if return_lse or out.requires_grad else None


def flash4_backward(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
    max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
):  # fmt: skip
    from triptych_kernels.attention_by_document import _attention_backward

    assert lse.shape == q.shape[1::-1] and out.shape == dout.shape == q.shape
    window = None if window_size_left is None else window_size_left + 1
    gradients = _attention_backward(
        dout, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal,
        softmax_scale, window, softcap or None,
    )  # fmt: skip
    for buffer, gradient in zip((dq, dk, dv), gradients, strict=True):
        buffer.copy_(gradient)
    return dq, dk, dv


@pytest.fixture
def packages(monkeypatch):
    for name, functions in {
        "flash_attn": {},
        "flash_attn.flash_attn_interface": {"flash_attn_varlen_func": flash2},
        "flash_attn.cute": {},
        "flash_attn.cute.interface": {
            "flash_attn_varlen_func": flash4,
            "_flash_attn_bwd": flash4_backward,
        },
    }.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)


def problem(causal, window, softcap):
    generator = torch.Generator().manual_seed(0)
    lengths, lengths_k = [4, 0, 3], [2, 3, 5]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths, lengths_k))
    shapes = [(7, 4, 8), (10, 2, 8), (10, 2, 8)]
    q, k, v = (torch.randn(shape, generator=generator).double() for shape in shapes)
    pattern = make_pattern(q, k, v, cu_q, 4, causal, 0.5, window, softcap, cu_k, 5)
    return [x.requires_grad_() for x in (q, k, v)], pattern


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["flash4", "flash4 traced", "flash2"])
def test_a_package_is_asked_for_what_the_call_says(backend, causal, window, softcap):
    tensors, pattern = problem(causal, window, softcap)

    def run(return_lse):
        if backend == "flash4 traced":
            return flash_attention._flash4(*tensors, *pattern)
        return getattr(flash_attention, backend)(*tensors, pattern, return_lse)

    want, want_lse = attention_ref(
        *tensors, pattern.cu_seqlens_q, 4, cu_seqlens_k=pattern.cu_seqlens_k, return_lse=True,
        causal=causal, scale=0.5, window=window, softcap=softcap,
    )  # fmt: skip
    for return_lse in (True, False):
        out, lse = run(return_lse)
        torch.testing.assert_close(out, want)
        if return_lse:
            torch.testing.assert_close(lse, want_lse, check_dtype=False)
        for got, wanted in zip(
            torch.autograd.grad(out.square().sum(), tensors),
            torch.autograd.grad(want.square().sum(), tensors, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted)


@pytest.mark.usefixtures("packages")
def test_flash4_widens_heads_it_has_no_kernel_for():
    tensors, pattern = problem(True, None, None)
    seen = []
    package = sys.modules["flash_attn.cute.interface"]
    run = package.flash_attn_varlen_func
    package.flash_attn_varlen_func = lambda q, *rest, **options: (
        seen.append(q.shape[-1]),
        run(q, *rest, **options),
    )[1]
    bounds = pattern.cu_seqlens_q, pattern.cu_seqlens_k
    for width, wide in ((8, 32), (32, 32), (40, 64), (72, 128), (128, 128)):
        generator = torch.Generator().manual_seed(width)
        q, k, v = (
            torch.randn(*x.shape[:2], width, generator=generator).double().requires_grad_()
            for x in tensors
        )
        got, lse = flash_attention.flash4(q, k, v, pattern._replace(scale=None), True)
        want, want_lse = attention_ref(
            q, k, v, bounds[0], 4, cu_seqlens_k=bounds[1], causal=True, return_lse=True
        )
        torch.testing.assert_close((got, lse), (want, want_lse))
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), (q, k, v)),
            torch.autograd.grad(want.square().sum(), (q, k, v)),
        )
        assert seen.pop() == wide


@pytest.mark.usefixtures("packages")
def test_flash4_passes_opcheck_and_takes_views():
    tensors, pattern = problem(True, 3, 1.5)
    # The op's lse is float32, so opcheck needs tensors whose reference's lse is that as well.
    q, k, v = (x.detach().float() for x in tensors)
    out, lse = flash_attention._flash4(q, k, v, *pattern)
    torch.library.opcheck(
        flash_attention._flash4_backward, (torch.ones_like(out), q, k, v, out, lse, *pattern)
    )
    views = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(flash_attention._flash4, (*views, *pattern))


def test_flash4_traces_without_the_package():
    with torch._subclasses.FakeTensorMode():
        q, k = (torch.empty(7, heads, 16, requires_grad=True) for heads in (4, 2))
        cu = torch.empty(3, dtype=torch.int32)
        pattern = Pattern(cu, cu, 256, 256, True, None, None, None)
        out, lse = flash_attention.flash4(q, k, k, pattern, True)
        out.sum().backward()
    assert lse.shape == (4, 7) and not lse.requires_grad and k.grad.shape == k.shape


@pytest.mark.usefixtures("packages")
def test_flash4_compiles_in_one_graph():
    tensors, pattern = problem(True, 3, None)
    tensors = [x.detach().float().requires_grad_() for x in tensors]

    def layer(*qkv):
        out, lse = flash_attention.flash4(*qkv, pattern, True)
        return out.square(), lse

    (got, lse), (want, want_lse) = (
        run(*tensors) for run in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer)
    )
    torch.testing.assert_close((got, lse), (want, want_lse.detach()))
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(want.sum(), tensors)
    )


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1])
def test_varlen_is_called_as_this_torch_wants_it(window, causal, return_lse):
    with torch._subclasses.FakeTensorMode():
        q, k = (torch.empty(7, heads, 16, requires_grad=True) for heads in (4, 2))
        cu = torch.empty(3, dtype=torch.int32)
        pattern = Pattern(cu, cu, 256, 256, causal, 0.3, window, None)
        out, lse = flash_attention.varlen(q, k, k, pattern, return_lse)
        out.sum().backward()
    assert out.shape == q.shape and k.grad.shape == k.shape
    assert lse.shape == (4, 7) if return_lse else lse is None


def reason(backend, dtype=HALF, width=128, needs=(), device=CUDA):
    return dispatch.BACKENDS["attention"][backend](device, dtype, width, needs)


def test_every_backend_says_what_it_cannot_do(monkeypatch):
    monkeypatch.setattr(dispatch, "_HAS_FLASH2", True)
    monkeypatch.setattr(dispatch, "_HAS_FLASH4", True)
    for backend in ("flash4", "varlen", "flash2"):
        assert "needs a CUDA tensor, got cpu" in reason(backend, device=torch.device("cpu"))
        assert "float16 or bfloat16, got torch.float32" in reason(backend, torch.float32)
        assert "head_dim that is a multiple of 8" in reason(backend, width=20)
    assert "no softcap" in reason("varlen", needs=("softcap",))
    assert reason("varlen", needs=("window", "lse")) == ""
    assert reason("flash2", needs=("window", "softcap", "lse")) == ""
    assert reason("reference", torch.float32, 20, ("window", "softcap", "lse")) == ""


def test_what_is_needed_moves_the_choice(monkeypatch):
    monkeypatch.setattr(dispatch, "_HAS_FLASH2", True)
    monkeypatch.setattr(dispatch, "_HAS_FLASH4", False)
    chosen = [
        dispatch.first_able("attention", CUDA, HALF, 128, needs) for needs in ((), ("softcap",))
    ]
    assert chosen == ["varlen", "flash2"]
    monkeypatch.setattr(dispatch, "_HAS_FLASH2", False)
    assert dispatch.first_able("attention", CUDA, HALF, 128, ("softcap",)) == "reference"


@pytest.mark.parametrize(
    ("major", "width", "message"),
    [
        (8, 128, "compute capability 9.x to 11.x, got 8.x"),
        (12, 128, "got 12.x"),
        (9, 256, "head_dim of at most 128, got 256"),
        (9, 64, ""),
        (9, 72, ""),
        (10, 128, ""),
        (10, 192, "head_dim of at most 128, got 192"),
    ],
)
def test_flash4_knows_its_devices(monkeypatch, major, width, message):
    on_device_of(monkeypatch, major)
    assert message in reason("flash4", width=width) and bool(message) == bool(
        reason("flash4", width=width)
    )


def on_device_of(monkeypatch, major):
    class Properties:
        pass

    Properties.major = major
    monkeypatch.setattr(dispatch, "_HAS_FLASH4", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)


def test_what_does_not_pay_is_not_chosen_but_done_where_asked_for(monkeypatch):
    on_device_of(monkeypatch, 9)
    x, short = torch.empty(1, 1, 72, dtype=HALF), ("short documents",)
    with dispatch.assume_device("cuda"):
        assert dispatch.choose("attention", x) == "flash4"
        assert dispatch.choose("attention", x, needs=short) == "varlen"
        assert dispatch.choose("attention", x, "flash4", short) == "flash4"
        with dispatch.use_backend(attention="flash4"):
            assert dispatch.choose("attention", x, needs=short) == "flash4"
            assert taken("attention", CUDA, HALF, 72) == "flash4"
        with pytest.raises(ValueError, match="no softcap"):
            dispatch.choose("attention", x, "varlen", ("softcap", *short))
    said = "flash4 (varlen in documents of below 1024 tokens)"
    assert taken("attention", CUDA, HALF, 72) == said
    assert taken("attention", CUDA, HALF, 128) == "flash4"


def test_documents_of_any_length_are_one_graph_where_heads_are_not_widened():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    run = torch.compile(attention, fullgraph=True, dynamic=True, backend=graphs)
    for length in (256, 512, 2048):
        q = torch.randn(length, 2, 32)
        run(q, q, q, torch.tensor([0, length], dtype=torch.int32), length, causal=True)
    assert graphs.frame_count == 1
    torch._dynamo.reset()


def test_packages_are_told_apart_without_importing_them(monkeypatch, tmp_path):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise AssertionError")
    (tmp_path / "flash_attn" / "cute" / "flash_bwd_sm90.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert dispatch._has_file("flash_attn", "cute", "flash_bwd_sm90.py")
    assert not dispatch._has_file("flash_attn", "flash_attn_interface.py")
    assert not dispatch._has_file("no_such_package", "x.py")
