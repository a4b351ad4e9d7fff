"""Check and time triptych-kernels on a CUDA device, with only the package itself on the path.

    PYTHONPATH=packages/kernels python tools/check_kernels_gpu.py [--only OP …] [--no-timing]

Accuracy: each op's output and gradients against float64. The rule is FlashAttention's: the error
may be at most twice that of the same formula in plain torch and the same dtype, plus SLACK. Then:
no op may wait for the device, each must be one graph for torch.compile and agree with itself
there, tensors of more than 2^31 elements must be right at their end. An op that the package does
not have is skipped. Exit code 1 when anything fails. The table comes last.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from kernel_cases.case import HALF, Case, bounds_of, randn
from kernel_cases.optimizer import OPTIONS
from kernel_cases.registry import CASES
from torch import Tensor

from triptych_kernels import (
    adamw_,
    attention,
    causal_conv1d,
    explain,
    linear_cross_entropy,
    rms_norm,
    swiglu,
)

SLACK = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
REORDERED = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, help="some ops and not all")
    parser.add_argument("--no-timing", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tools/check_kernels_gpu.py: a CUDA device must be there, got none")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(explain())

    torch.manual_seed(0)
    results = [result for op in args.only or CASES for result in check_op(op)]
    if args.only is None:
        results += [check_layer_compiles(), check_num_targets_is_used(), *check_huge()]
    if args.only is None or "adamw" in args.only:
        results += [check_huge_adamw(), check_rounding()]
    if args.only is None or "causal_conv1d" in args.only:
        results.append(check_huge_conv())
    lines = [line for line, _ in results]
    if not args.no_timing:
        lines.append(
            f"\n{'forward + backward, median of 20':<66} {'ms ours/torch':>15} {'MiB':>15}"
        )
        lines += [line for op in args.only or CASES for line in time_op(op)]
    failed = [line for line, passed in results if not passed]
    print("\n".join([*lines, *(["", "FAILED:"] if failed else []), *failed]))
    print(f"{len(failed)} of {len(results)} checks failed" if failed else f"{len(results)} passed")
    sys.exit(1 if failed else 0)


def check_op(op: str) -> Iterator[tuple[str, bool]]:
    """Accuracy of all cases, a graph of the first, no wait in those of a step's size."""
    accuracy, timed = CASES[op]
    try:
        for number, case in enumerate(accuracy()):
            yield check_accuracy(case)
            if number == 0 and not case.waits:
                yield check_compiles(case)
        for case in timed():
            if not case.waits:
                yield check_no_sync(case)
    except ImportError as error:
        print(f"{op}: skipped, {error}")


def time_op(op: str) -> Iterator[str]:
    try:
        for case in CASES[op][1]():
            yield time_case(case)
    except ImportError:  # said by check_op
        return


# Checks: each returns its line of the table and whether it passed


def check_accuracy(case: Case) -> tuple[str, bool]:
    ours, plain = (outputs(op, case) for op in (case.ours, case.plain))
    exact = outputs(case.plain, case, torch.float64)
    worst, passed, report = 0.0, True, ""
    for name, got, same, want in zip(names_of(case, ours), ours, plain, exact, strict=True):
        slack = case.slack or SLACK[case.dtype]
        error, allowed = distance(got, want), 2 * distance(same, want) + slack
        passed &= got.shape == same.shape and got.dtype == same.dtype and error <= allowed
        if error / allowed >= worst:
            worst, report = error / allowed, f"{name}: {error:.1e} of {allowed:.1e}"
    return line(case.op, case.what, case.dtype, report, passed), passed


def check_no_sync(case: Case) -> tuple[str, bool]:
    """After a warm-up, forward and backward must not wait for the device."""
    outputs(case.ours, case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs(case.ours, case)
        passed = True
    except RuntimeError as error:
        print(case.op, error)
        passed = False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return line(case.op, case.what, case.dtype, "no synchronisation", passed), passed


def check_compiles(case: Case) -> tuple[str, bool]:
    """One graph, which may add in another order and so differ by REORDERED."""
    torch.compiler.reset()
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    try:
        got = outputs(compiled, case)
    except RuntimeError as error:
        print(case.op, error)
        return line(case.op, case.what, case.dtype, "one graph", False), False
    worst = max(distance(a, b) for a, b in zip(got, outputs(case.ours, case), strict=True))
    passed = worst <= REORDERED[case.dtype]
    return line(case.op, case.what, case.dtype, f"one graph: {worst:.1e}", passed), passed


def check_layer_compiles() -> tuple[str, bool]:
    """A layer of attention, norm and gate must compile whole and agree with itself uncompiled."""
    cu_seqlens = bounds_of([100, 0, 156])

    def layer(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        out = attention(rms_norm(q, weight), k, k, cu_seqlens, 256, causal=True)
        return swiglu(out, q)

    tensors = [randn(256, 8, 64), randn(256, 2, 64, seed=1), randn(64, seed=2)]
    case = Case("all", "torch.compile fullgraph", HALF, tensors, layer, layer)
    torch.compiler.reset()
    compiled = outputs(torch.compile(layer, fullgraph=True), case)
    errors = [distance(a, b) for a, b in zip(compiled, outputs(layer, case), strict=True)]
    passed = max(errors) < 1e-2
    return line(case.op, case.what, HALF, f"{max(errors):.1e}", passed), passed


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


def check_huge_adamw() -> tuple[str, bool]:
    """A flat master of more than 2^31 elements: its last rows must be right."""
    few = randn(8, 2048, dtype=torch.float32)
    results = []
    for params in (few.repeat(2**31 // 2048 // 8 + 1, 1), few):
        states = [torch.zeros_like(params) for _ in range(2)]
        copy, grad = (torch.ones_like(params, dtype=HALF) for _ in range(2))
        adamw_([params], [grad], *([x] for x in states), copies=[copy], step=1, **OPTIONS)
        results.append([x[-8:].clone() for x in (params, *states, copy)])
    passed = all(map(torch.equal, *results))
    return line("adamw", "2^31 elements", torch.float32, "same bits", passed), passed


def check_huge_conv() -> tuple[str, bool]:
    """A last document beyond 2^31 elements: its output and gradient must be right."""
    few, weight = randn(8, 2048), randn(2048, 4, seed=1)
    ends = {}
    for x in (few.repeat(2**31 // 2048 // 8 + 1, 1), few):
        x.requires_grad_()
        y = causal_conv1d(x, weight, bounds_of([len(x) - 8, 8]), silu=True)
        ends[len(x)] = [y[-8:].detach(), torch.autograd.grad(y, x, x.detach())[0][-8:]]
    worst = max(map(distance, *ends.values()))
    passed = worst <= REORDERED[HALF]
    return line("causal_conv1d", "2^31 elements", HALF, f"{worst:.1e}", passed), passed


def check_rounding() -> tuple[str, bool]:
    """A value a quarter of the way between two of bfloat16 goes up one time in four, at random."""
    count, found = 2**20, []
    for seed in (1, 1, 2):
        states = [[torch.zeros(count, device="cuda", dtype=HALF)] for _ in range(2)]
        grad = torch.full((count,), 1 + 2**-9, device="cuda")
        options = {**OPTIONS, "beta1": 0.0, "beta2": 0.0, "step": 1, "seed": seed}
        adamw_([torch.zeros_like(grad)], [grad], *states, **options)
        found.append((states[0][0] > 1).double())
    share, again, other = found
    spread = (0.25 * 0.75 / count) ** 0.5
    around = share - 0.25
    products = [around * (other - 0.25), around[1:] * around[:-1], around[1024:] * around[:-1024]]
    worst = max(abs(float(around.mean())), *(abs(float(x.mean())) for x in products)) / spread
    passed = bool(torch.equal(share, again)) and worst < 5
    return line("adamw", "stochastic rounding", HALF, f"{worst:.1f} of 5 sigma", passed), passed


def time_case(case: Case) -> str:
    columns = [measure(op, case) for op in (case.ours, case.plain)]
    times = "/".join(f"{ms:.2f}" for ms, _ in columns)
    memory = "/".join(f"{mib:.0f}" for _, mib in columns)
    return f"{case.op:<23} {case.what:<44} {times:>15} {memory:>15}"


def measure(op: Callable[..., Any], case: Case) -> tuple[float, float]:
    """-> median milliseconds of 20 runs after 3, peak MiB above the inputs."""
    tensors = leaves_of(case)
    upstream = [gradient_like(out) for out in results_of(op(*tensors))]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(23):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        results = results_of(op(*tensors))
        if case.differentiable:
            torch.autograd.grad(results, tensors, upstream)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times[3:]), (torch.cuda.max_memory_allocated() - before) / 2**20


def outputs(op: Callable[..., Any], case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    """-> the outputs and the gradient of each tensor, for one fixed upstream gradient."""
    tensors = leaves_of(case, dtype)
    results = results_of(op(*tensors))
    detached = [out.detach() for out in results]
    if not case.differentiable:
        return detached
    upstream = [gradient_like(out) for out in results]
    return [*detached, *torch.autograd.grad(results, tensors, upstream)]


def leaves_of(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [
        x.detach().to(dtype or x.dtype).requires_grad_(case.differentiable) for x in case.tensors
    ]


def results_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def names_of(case: Case, values: list[Tensor]) -> list[str]:
    """Of what `outputs` returned: y0, y1, … and then a gradient per tensor, d0, d1, …"""
    gradients = len(case.tensors) if case.differentiable else 0
    names = [f"y{i}" for i in range(len(values) - gradients)]
    return [*names, *(f"d{i}" for i in range(gradients))]


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
    return f"{op:<23} {what:<44} {name:<9} {report:<23} {'ok' if passed else 'FAILED'}"


if __name__ == "__main__":
    main()
