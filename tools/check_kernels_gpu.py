"""Check and time triptych-kernels on a CUDA device, with only the package itself on the path.

    PYTHONPATH=packages/kernels python tools/check_kernels_gpu.py [--only OP] [--no-timing]

Accuracy: each op's output and gradients against float64. The rule is FlashAttention's: the error
may be at most twice that of the same formula in plain torch and the same dtype, plus SLACK. Then:
no op may wait for the device, fullgraph compilation must agree, tensors of more than 2^31 elements
must be right at their end. Exit code 1 when anything fails. The table comes last.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych_kernels import (
    attention,
    attention_ref,
    explain,
    linear_cross_entropy,
    linear_cross_entropy_ref,
    rms_norm,
    rms_norm_ref,
    swiglu,
    swiglu_ref,
)

SLACK = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
HALF = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """An op on some inputs: `ours` against `plain` torch, which computes in any dtype."""

    op: str
    what: str
    dtype: torch.dtype
    tensors: list[Tensor]  # the differentiable inputs
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="one op: attention, linear_cross_entropy, rms_norm, swiglu")
    parser.add_argument("--no-timing", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tools/check_kernels_gpu.py: a CUDA device must be there, got none")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(explain())

    torch.manual_seed(0)
    accuracy = [c for c in accuracy_cases() if args.only in (None, c.op)]
    results = [check_accuracy(case) for case in accuracy]
    results += [check_no_sync(case) for case in timing_cases() if args.only in (None, case.op)]
    if args.only is None:
        results += [check_compile(), check_num_targets_is_used(), *check_huge()]
    lines = [line for line, _ in results]
    if not args.no_timing:
        lines.append(
            f"\n{'forward + backward, median of 20':<66} {'ms ours/torch':>15} {'MiB':>15}"
        )
        lines += [time_case(case) for case in timing_cases() if args.only in (None, case.op)]
    failed = [line for line, passed in results if not passed]
    print("\n".join([*lines, *(["", "FAILED:"] if failed else []), *failed]))
    print(f"{len(failed)} of {len(results)} checks failed" if failed else f"{len(results)} passed")
    sys.exit(1 if failed else 0)


# Checks: each returns its line of the table and whether it passed


def check_accuracy(case: Case) -> tuple[str, bool]:
    ours, plain = (outputs(op, case.tensors) for op in (case.ours, case.plain))
    exact = outputs(case.plain, [x.double() for x in case.tensors])
    worst, passed, report = 0.0, True, ""
    for name, got, same, want in zip("y" + "abc", ours, plain, exact, strict=False):
        error, allowed = distance(got, want), 2 * distance(same, want) + SLACK[case.dtype]
        passed &= got.shape == same.shape and got.dtype == same.dtype and error <= allowed
        if error / allowed >= worst:
            worst, report = error / allowed, f"{name}: {error:.1e} of {allowed:.1e}"
    return line(case.op, case.what, case.dtype, report, passed), passed


def check_no_sync(case: Case) -> tuple[str, bool]:
    """After a warm-up, forward and backward must not wait for the device."""
    outputs(case.ours, case.tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs(case.ours, case.tensors)
        passed = True
    except RuntimeError as error:
        print(case.op, error)
        passed = False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return line(case.op, case.what, case.dtype, "no synchronisation", passed), passed


def check_compile() -> tuple[str, bool]:
    """A layer of attention, norm and gate must compile whole and agree with itself uncompiled."""
    cu_seqlens = torch.tensor([0, 100, 100, 256], dtype=torch.int32, device="cuda")

    def layer(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        out = attention(rms_norm(q, weight), k, k, cu_seqlens, 256, causal=True)
        return swiglu(out, q)

    tensors = [randn(256, 8, 64), randn(256, 2, 64, seed=1), randn(64, seed=2)]
    compiled = outputs(torch.compile(layer, fullgraph=True), tensors)
    errors = [distance(a, b) for a, b in zip(compiled, outputs(layer, tensors), strict=True)]
    passed = max(errors) < 1e-2
    return line("all", "torch.compile fullgraph", HALF, f"{max(errors):.1e}", passed), passed


def check_num_targets_is_used() -> tuple[str, bool]:
    """The count that the caller gives and the count that is taken must give the same bits."""
    x, weight = randn(300, 256), randn(5000, 256, seed=1) * 0.05
    labels = torch.arange(300, device="cuda").where(torch.arange(300, device="cuda") > 100, -100)
    counted = linear_cross_entropy(x, weight, labels)
    passed = bool(torch.equal(counted, linear_cross_entropy(x, weight, labels, num_targets=199)))
    return line("linear_cross_entropy", "num_targets", HALF, "same bits", passed), passed


def check_huge() -> list[tuple[str, bool]]:
    """Beyond 2^31 elements, where 32-bit offsets would wrap, the last rows must be right."""
    x = randn(8, 2048).repeat(2**31 // 2048 // 8 + 1, 1)
    weight, results = randn(2048, seed=1), []
    with torch.no_grad():
        for name, ours, small in (
            ("rms_norm", lambda: rms_norm(x, weight), rms_norm(x[:8], weight)),
            ("swiglu", lambda: swiglu(x, x), swiglu(x[:8], x[:8])),
        ):
            passed = bool(torch.equal(ours()[-8:], small))
            results.append((line(name, "2^31 elements", HALF, "same bits", passed), passed))
    return results


def time_case(case: Case) -> str:
    columns = [measure(op, case.tensors) for op in (case.ours, case.plain)]
    times = "/".join(f"{ms:.2f}" for ms, _ in columns)
    memory = "/".join(f"{mib:.0f}" for _, mib in columns)
    return f"{case.op:<21} {case.what:<44} {times:>15} {memory:>15}"


def measure(op: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[float, float]:
    """-> median milliseconds of 20 runs after 3, peak MiB above the inputs."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    upstream = gradient_like(op(*tensors))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(23):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.autograd.grad(op(*tensors), tensors, upstream)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times[3:]), (torch.cuda.max_memory_allocated() - before) / 2**20


def outputs(op: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """-> the output and the gradient of each tensor, for one fixed upstream gradient."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = op(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, gradient_like(out))]


def gradient_like(out: Tensor) -> Tensor:
    """Odd sixteenths: exact in every dtype, so that all compute with the same gradient."""
    generator = torch.Generator("cuda").manual_seed(3)
    values = torch.randint(-8, 8, out.shape, generator=generator, device="cuda") / 8 + 1 / 16
    return values.to(out.dtype)


def distance(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; absolute where want is zero."""
    size = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / (size or 1.0)


def line(op: str, what: str, dtype: torch.dtype, report: str, passed: bool) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{op:<21} {what:<44} {name:<9} {report:<22} {'ok' if passed else 'FAILED'}"


# Cases


def accuracy_cases() -> Iterator[Case]:
    yield from attention_cases()
    yield from linear_cross_entropy_cases()
    yield from rms_norm_cases()
    yield from swiglu_cases()


def randn(*shape: int, dtype: torch.dtype = HALF, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def attention_case(
    lengths: list[int], heads: int, kv_heads: int, head_dim: int, causal: bool
) -> Case:
    tokens = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    max_seqlen = -(-max(lengths) // 256) * 256

    def on(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: op(q, k, v, cu_seqlens, max_seqlen, causal=causal)

    return Case(
        "attention",
        f"{len(lengths)} docs T{tokens} {heads}/{kv_heads} D{head_dim} causal={causal}",
        HALF,
        [
            randn(tokens, heads, head_dim),
            randn(tokens, kv_heads, head_dim, seed=1),
            randn(tokens, kv_heads, head_dim, seed=2),
        ],
        on(attention),
        on(plain_attention),
    )


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, causal: bool
) -> Tensor:
    """The formula in the dtype of q, document by document."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    out = []
    lengths = cu_seqlens.diff().tolist()
    for q_, k_, v_ in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q_, k_) * q.shape[2] ** -0.5
        if causal:
            above = torch.ones(scores.shape[1:], dtype=torch.bool, device="cuda").triu(1)
            scores = scores.masked_fill(above, -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_))
    return torch.cat(out)


def attention_cases() -> list[Case]:
    ragged = [0, 1, 63, 0, 700, 257, 1]
    return [
        attention_case(lengths, heads, kv_heads, head_dim, causal)
        for lengths in (ragged, [1, 3], [1024])
        for heads, kv_heads, head_dim in ((16, 8, 128), (4, 4, 64), (8, 1, 72))
        for causal in (True, False)
    ]


def linear_cross_entropy_case(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, ignored: float, chunk_rows: int
) -> Case:
    labels = torch.randint(vocabulary, (rows,), device="cuda")
    labels[torch.rand(rows, device="cuda") < ignored] = -100
    num_targets = int((labels != -100).sum())

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(
            x, weight, labels, chunk_rows=chunk_rows, num_targets=num_targets
        )

    return Case(
        "linear_cross_entropy",
        f"N{rows} H{width} V{vocabulary} ignored {ignored:.0%} chunk {chunk_rows}",
        dtype,
        [randn(rows, width, dtype=dtype), randn(vocabulary, width, dtype=dtype, seed=1) * 0.05],
        ours,
        lambda x, weight: linear_cross_entropy_ref(x, weight, labels),
    )


def linear_cross_entropy_cases() -> list[Case]:
    return [
        linear_cross_entropy_case(rows, 256, vocabulary, dtype, ignored, chunk_rows)
        for dtype in (HALF, torch.float16, torch.float32)
        for rows, vocabulary, ignored, chunk_rows in (
            (1, 1000, 0.0, 4096),
            (63, 760, 1.0, 4096),
            (1025, 32003, 0.5, 200),
            (2048, 151936, 0.0, 4096),
        )
    ]


def rms_norm_case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    tensors = [randn(*shape, dtype=dtype), 1 + 0.2 * randn(shape[-1], dtype=dtype, seed=1)]
    return Case("rms_norm", f"{shape}", dtype, tensors, rms_norm, rms_norm_ref)


def rms_norm_cases() -> list[Case]:
    shapes = [(1, 64), (63, 760), (4099, 2048), (777, 16, 128), (50, 8192), (3, 65536), (0, 128)]
    return [rms_norm_case(shape, d) for d in (HALF, torch.float32) for shape in shapes] + [
        Case(
            "rms_norm",
            "q of a fused qkv (777, 3, 8, 128)",
            HALF,
            [randn(777, 3, 8, 128), randn(128, seed=1)],
            lambda x, w: rms_norm(x[:, 0], w),
            lambda x, w: rms_norm_ref(x[:, 0], w),
        )
    ]


def swiglu_case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    inputs = [randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)]
    return Case("swiglu", f"{shape}", dtype, inputs, swiglu, swiglu_ref)


def swiglu_cases() -> list[Case]:
    shapes = [(1, 1), (63, 760), (2, 511, 6144), (0, 128)]
    return [swiglu_case(shape, d) for d in (HALF, torch.float32) for shape in shapes] + [
        Case(
            "swiglu",
            "halves of (511, 2 * 3072)",
            HALF,
            [randn(511, 6144)],
            lambda x: swiglu(*x.chunk(2, dim=-1)),
            lambda x: swiglu_ref(*x.chunk(2, dim=-1)),
        )
    ]


def timing_cases() -> Iterator[Case]:
    """A Qwen3-1.7B step over 16,384 packed tokens, against what torch itself has to offer."""
    lengths = [1500, 400, 700, 1400, 1024, 100, 1800, 1268] * 2  # 16,384 tokens
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    case = attention_case(lengths, 16, 8, 128, causal=True)
    yield replace(case, plain=lambda q, k, v: attention_ref(q, k, v, bounds, 2048, causal=True))
    yield linear_cross_entropy_case(8192, 2048, 151936, HALF, 0.0, 4096)
    yield linear_cross_entropy_case(8192, 2048, 151936, HALF, 0.75, 4096)
    for shape in ((16384, 2048), (16384, 16, 128)):
        case = rms_norm_case(shape, HALF)
        yield replace(case, plain=lambda x, w: F.rms_norm(x, w.shape, w, 1e-6))
    yield swiglu_case((16384, 6144), HALF)


if __name__ == "__main__":
    main()
