"""Which backend an op runs on, and why.

A request is taken from, in this order: the op's `backend=` argument, `use_backend(...)`, the
environment variable TRIPTYCH_KERNELS_BACKEND. A request that cannot be met raises; it never falls
back. Without a request the first backend of `BACKENDS` that can run the tensor is taken.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

ENVIRONMENT = "TRIPTYCH_KERNELS_BACKEND"

# Plain constants and not functions: torch.compile traces through `choose`.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETS = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_HALVES = (torch.float16, torch.bfloat16)
_MAX_NORM_WIDTH = 65536  # one program holds a whole row in registers

# Set by `use_backend`. A plain global and not a ContextVar: activation checkpointing re-runs the
# forward on autograd's own threads, which would not see a context variable.
_requests: dict[str, str] = {}

# Why a backend cannot take a tensor of this device, dtype and last dimension; "" when it can.
_Reason = Callable[[torch.device, torch.dtype, int], str]


def _always(device: torch.device, dtype: torch.dtype, width: int) -> str:
    return ""


def _needs_triton(device: torch.device, dtype: torch.dtype, width: int) -> str:
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if _INTERPRETS:  # its bfloat16 arithmetic is silently wrong
        return "" if dtype == torch.float32 else f"Triton's interpreter needs float32, got {dtype}"
    if device.type != "cuda":
        return f"needs a CUDA tensor, got {device.type}"
    if dtype not in (*_HALVES, torch.float32):
        return f"needs float16, bfloat16 or float32, got {dtype}"
    return ""


def _needs_triton_and_narrow_rows(device: torch.device, dtype: torch.dtype, width: int) -> str:
    if width > _MAX_NORM_WIDTH:
        return f"needs rows of at most {_MAX_NORM_WIDTH} elements, got {width}"
    return _needs_triton(device, dtype, width)


def _needs_flash(device: torch.device, dtype: torch.dtype, width: int) -> str:
    if device.type != "cuda":
        return f"needs a CUDA tensor, got {device.type}"
    if dtype not in _HALVES:
        return f"needs float16 or bfloat16, got {dtype}"
    if width % 8 or width > 256:
        return f"needs a head_dim that is a multiple of 8 and at most 256, got {width}"
    return ""


# op -> its backends, the preferred first, the plain reference last.
BACKENDS: dict[str, dict[str, _Reason]] = {
    "attention": {"varlen": _needs_flash, "reference": _always},
    "linear_cross_entropy": {"triton": _needs_triton, "chunked": _always, "reference": _always},
    "rms_norm": {"triton": _needs_triton_and_narrow_rows, "reference": _always},
    "swiglu": {"triton": _needs_triton, "reference": _always},
}


@contextmanager
def use_backend(name: str | None = None, **per_op: str) -> Iterator[None]:
    """Ask for a backend within a `with` block: `name` for every op, keywords for single ops.

    `use_backend("reference")`, `use_backend(rms_norm="triton", attention="reference")`. The inner
    of two nested blocks wins. The request holds for the whole process, all threads included.

    Raises ValueError for an op that does not exist. A backend that an op does not have, or that
    cannot take the tensors, raises where that op is called.
    """
    global _requests
    before = _requests
    _requests = {**before, **_expand(name, per_op, "use_backend")}
    try:
        yield
    finally:
        _requests = before


def choose(op: str, x: torch.Tensor, backend: str | None = None) -> str:
    """Name the backend on which `op` runs for a tensor like `x`.

    Raises ValueError when the backend that was asked for does not exist or cannot take `x`.
    """
    name, asked_by = _requested(op, backend)
    if name is None:
        return _first_able(op, x.device, x.dtype, x.shape[-1])
    reasons = BACKENDS[op]
    if name not in reasons:
        raise ValueError(
            f"{asked_by}: the backend of {op} must be one of {', '.join(reasons)}, got {name!r}; "
            f"name one of these, or leave the choice open"
        )
    if why_not := reasons[name](x.device, x.dtype, x.shape[-1]):
        raise ValueError(
            f"{asked_by}: the backend of {op} must be able to run here, got {name!r}, which "
            f"cannot: {why_not}; change that, or leave the choice open"
        )
    return name


def is_traced(x: torch.Tensor) -> bool:
    """Whether the op must be one node of a graph (torch.compile, fake tensors) for a tensor `x`.

    Only then is the torch.library op called: beside an H100 it took 0.2 ms of host time more per
    forward and backward than an autograd.Function on the same kernels (0.75 against 0.55 ms).
    """
    return torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter)


def explain(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16, width: int = 128
) -> str:
    """Tell per op which backend would run here, and why each other one would not.

    The answer is for tensors on `device` (by default CUDA where there is one) of `dtype` whose
    last dimension is `width`.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    lines = [f"triptych_kernels for {dtype} on {device.type}, last dimension {width}"]
    for op, reasons in BACKENDS.items():
        name, asked_by = _requested(op, None)
        runs = name or _first_able(op, device, dtype, width)
        states = {
            backend: reason(device, dtype, width) or f"could run; {runs} was taken"
            for backend, reason in reasons.items()
        }
        refused = name is not None and (name not in reasons or reasons[name](device, dtype, width))
        states[runs] = "runs" if not refused else f"refused: {states.get(runs, 'does not exist')}"
        states[runs] += f" (asked by {asked_by})" if name else ""
        lines += [f"  {op:<21} {backend:<10} {state}" for backend, state in states.items()]
    return "\n".join(lines)


def _first_able(op: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    for name, reason in BACKENDS[op].items():
        if not reason(device, dtype, width):
            return name
    raise AssertionError(f"{op} has no reference backend")


def _requested(op: str, backend: str | None) -> tuple[str | None, str]:
    """The backend that was asked for, and by whom; (None, "") when the choice is open."""
    if backend is not None:
        return backend, "backend="
    if op in _requests:
        return _requests[op], "use_backend"
    value = os.environ.get(ENVIRONMENT, "")
    name = _parse(value).get(op) if value else None
    return (name, ENVIRONMENT) if name else (None, "")


def _parse(value: str) -> dict[str, str]:
    """`"reference"` or `"rms_norm=triton,swiglu=reference"` as {op: backend}."""
    everything: str | None = None
    per_op: dict[str, str] = {}
    for part in value.split(","):
        op, equals, name = part.strip().rpartition("=")
        if equals:
            per_op[op] = name
        else:
            everything = name
    return _expand(everything, per_op, ENVIRONMENT)


def _expand(name: str | None, per_op: dict[str, str], asked_by: str) -> dict[str, str]:
    for op in per_op:
        if op not in BACKENDS:
            raise ValueError(
                f"{asked_by}: an op must be one of {', '.join(BACKENDS)}, got {op!r}; correct it"
            )
    everything = dict.fromkeys(BACKENDS, name) if name else {}
    return {**everything, **per_op}
