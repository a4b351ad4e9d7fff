"""Time on the device and at the wall, peak memory, and the ceilings to hold them against.

Device time is that of a replayed CUDA graph, free of launch overhead; an op that waits for the
device cannot be captured and is timed between two events instead, which `device_by` says. Wall
time is eager: many calls, then one wait. Both walk through several sets of inputs that together
are larger than the L2 cache, so that no call finds its inputs there.
"""

import math
import time
from collections.abc import Callable
from statistics import quantiles
from typing import NamedTuple

import torch
from torch import Tensor

from .op import Call, Inputs

_SAMPLES = (5, 30)
_BUDGET = 0.6  # seconds for all samples of one measurement
_REHEARSAL = 0.02  # the same on a CPU
_SAMPLE = 2e-3  # seconds that a sample lasts at least
_MAX_SETS = 64


class Times(NamedTuple):
    """Microseconds a call."""

    median: float
    p20: float
    p80: float


class Measured(NamedTuple):
    device: Times | None
    device_by: str  # "graph", "events", or "" without a device
    wall: Times
    peak_mib: float | None


class Ceilings(NamedTuple):
    """What a plain copy and a plain matrix product reach on this machine."""

    terabytes: float
    teraflops: float


Thunk = Callable[[], object]


def number_of_sets(inputs: Inputs, device: torch.device) -> int:
    """How many sets of inputs are twice the L2 cache."""
    if device.type != "cuda":
        return 1
    size = sum(x.numel() * x.element_size() for x in inputs.tensors)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(_MAX_SETS, math.ceil(2 * cache / max(size, 1))))


def thunks_of(call: Call, sets: list[Inputs], mode: str) -> list[Thunk]:
    """One call without arguments per set of inputs: forward, backward, or both."""
    make = {"fwd": _forward, "bwd": _backward, "full": _full}[mode]
    return [make(call, inputs) for inputs in sets]


def _forward(call: Call, inputs: Inputs) -> Thunk:
    def thunk() -> object:
        with torch.no_grad():
            return call(*inputs.tensors, **inputs.constants)

    return thunk


def _backward(call: Call, inputs: Inputs) -> Thunk:
    leaves = _leaves(inputs)
    outputs = outputs_of(call(*leaves, **inputs.constants))
    upstream = _upstream(outputs)
    return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)


def _full(call: Call, inputs: Inputs) -> Thunk:
    leaves = _leaves(inputs)
    upstream = _upstream(outputs_of(call(*leaves, **inputs.constants)))

    def thunk() -> object:
        outputs = outputs_of(call(*leaves, **inputs.constants))
        return torch.autograd.grad(outputs, leaves, upstream)

    return thunk


def _leaves(inputs: Inputs) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in inputs.tensors]


def _upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """A loss is differentiated from 1, as by backward(), for which Liger takes a shorter way."""
    return [torch.randn_like(x) if x.dim() else torch.ones_like(x) for x in outputs]


def outputs_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def measure(thunks: list[Thunk], device: torch.device) -> Measured:
    for _ in range(3):  # compiles and tunes
        for thunk in thunks:
            thunk()
    if device.type != "cuda":
        return Measured(None, "", _wall(thunks, lambda: None, _REHEARSAL), None)
    peak = _peak_mib(thunks[0])
    wall = _wall(thunks, torch.cuda.synchronize)
    replayed = None if _waits_for_device(thunks[0]) else _replayed(thunks, wall)
    if replayed:
        return Measured(replayed, "graph", wall, peak)
    return Measured(_between_events(thunks, wall), "events", wall, peak)


def _wall(thunks: list[Thunk], wait: Callable[[], None], budget: float = _BUDGET) -> Times:
    def sample(rounds: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(rounds):
            for thunk in thunks:
                thunk()
        wait()
        return (time.perf_counter() - start) / rounds / len(thunks)

    return _sampled(sample, len(thunks), sample(1), budget)


def _between_events(thunks: list[Thunk], wall: Times) -> Times:
    def sample(rounds: int) -> float:
        return _elapsed(lambda: [thunk() for _ in range(rounds) for thunk in thunks]) / (
            rounds * len(thunks)
        )

    return _sampled(sample, len(thunks), wall.median / 1e6)


def _replayed(thunks: list[Thunk], wall: Times) -> Times | None:
    """None when the calls cannot be captured."""
    rounds = _rounds(len(thunks), wall.median / 1e6)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(rounds):
                for thunk in thunks:
                    thunk()
    except RuntimeError:  # a library waits for the device behind torch's back
        return None
    graph.replay()
    calls = rounds * len(thunks)
    estimate = _elapsed(graph.replay)
    times = [_elapsed(graph.replay) / calls for _ in range(_number_of_samples(estimate))]
    del graph
    return _summary(times)


def _elapsed(run: Callable[[], object]) -> float:
    """Seconds on the device."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _sampled(
    sample: Callable[[int], float], sets: int, estimate: float, budget: float = _BUDGET
) -> Times:
    rounds = _rounds(sets, estimate)
    number = _number_of_samples(rounds * sets * estimate, budget)
    return _summary([sample(rounds) for _ in range(number)])


def _rounds(sets: int, seconds_a_call: float) -> int:
    return max(1, math.ceil(_SAMPLE / max(seconds_a_call * sets, 1e-7)))


def _number_of_samples(seconds_a_sample: float, budget: float = _BUDGET) -> int:
    low, high = _SAMPLES
    return max(low, min(high, int(budget / max(seconds_a_sample, 1e-7))))


def _summary(seconds: list[float]) -> Times:
    p20, _, p50, _, p80 = (quantiles(seconds, n=10, method="inclusive")[i] for i in (1, 2, 4, 6, 7))
    return Times(p50 * 1e6, p20 * 1e6, p80 * 1e6)


def _peak_mib(thunk: Thunk) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    thunk()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _waits_for_device(thunk: Thunk) -> bool:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        thunk()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return False


def ceilings(device: torch.device) -> Ceilings | None:
    """A copy of 1 GiB and a bfloat16 product of 8192 x 8192 matrices, medians; None on a CPU."""
    if device.type != "cuda":
        return None
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2**29, generator=generator, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = _median_elapsed(lambda: y.copy_(x))
    a, b, c = (z[: 2**26].view(8192, 8192) for z in (x, x.flip(0), y))
    product = _median_elapsed(lambda: torch.mm(a, b, out=c))
    return Ceilings(2 * 2**30 / copy / 1e12, 2 * 8192**3 / product / 1e12)


def _median_elapsed(run: Thunk) -> float:
    for _ in range(5):
        run()
    times = sorted(_elapsed(lambda: [run() for _ in range(10)]) / 10 for _ in range(11))
    return times[5]
