"""Which backend an op runs on, and why.

A request is taken from, in this order: the op's `backend=` argument, `use_backend(...)`, the
environment variable TRIPTYCH_KERNELS_BACKEND. A request that cannot be met raises; it never falls
back. Without a request the first backend of `BACKENDS` that can run the tensor is taken.

Under torch.compile, and for fake tensors, a backend with kernels of its own, or with loops over
documents, experts or chunks, is one node, a torch.library op. The references of the element-wise
ops stay plain torch there: Inductor fuses them with what is around them, which a node would stop.
"""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ENVIRONMENT = "TRIPTYCH_KERNELS_BACKEND"


def _has_file(package: str, *path: str) -> bool:
    """Whether a package that can be imported holds a file; does not import it."""
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    return any(Path(folder, *path).is_file() for folder in folders)


def _version(package: str) -> tuple[int, ...]:
    """Of an installed package, as numbers: (3, 6, 0); zeros where it does not say."""
    try:
        digits = re.match(r"\d+(\.\d+)*", importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        digits = None
    return tuple(int(part) for part in digits[0].split(".")) if digits else (0, 0, 0)


# Plain constants and not functions: torch.compile traces through `choose`.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_VERSION = _version("triton") if _HAS_TRITON else (0, 0, 0)
_HAS_FLASH2 = _has_file("flash_attn", "flash_attn_interface.py")
# Its backward on Hopper tells flash-attn-4 from the early form of it that flash-attn 2.8 carries.
_HAS_FLASH4 = _has_file("flash_attn", "cute", "flash_bwd_sm90.py") and all(
    importlib.util.find_spec(needed) for needed in ("cutlass", "quack")
)
_HAS_TILELANG = importlib.util.find_spec("tilelang") is not None
_HAS_FLA = importlib.util.find_spec("fla") is not None
# Whether the parts of fla's gated delta rule are those that `gated_delta_rule_fla` was written for,
# and fla does not itself take other kernels (Qwen's FlashQLA).
FLA_KEEPS_FORWARD = (
    _version("fla-core") == (0, 6, 0) and importlib.util.find_spec("flash_qla") is None
)
_INTERPRETS = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_HALVES = (torch.float16, torch.bfloat16)
# Those whose gradients were checked on an H100; others are widened to the next with zeros. At 72
# and 80 the gradients of flash-attn-4 4.0.0b36 are wrong without a word.
FLASH4_WIDTHS = (32, 64, 128)
# Widened from 72 to 128 it takes 0.6 (4,096 tokens), 0.86 (1,024), 1.3 (256) and 1.7 (64) of
# varlen's time on an H200.
WIDENED_LEN = 1024
SHORT = "short documents"  # a need that only says what does not pay
_MAX_NORM_WIDTH = 65536  # one program holds a whole row in registers

# Set by `use_backend`. A plain global and not a ContextVar: activation checkpointing re-runs the
# forward on autograd's own threads, which would not see a context variable.
_requests: dict[str, str] = {}
# Set by `assume_device`.
_assumed: torch.device | None = None

# Why a backend cannot take a tensor of this device, dtype and last dimension; "" when it can. A
# fourth argument, the names of what a call needs (`choose(..., needs=)`), comes when there are any.
_Reason = Callable[..., str]


def _always(
    device: torch.device, dtype: torch.dtype, width: int, needs: tuple[str, ...] = ()
) -> str:
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


def _needs_flash(
    device: torch.device, dtype: torch.dtype, width: int, needs: tuple[str, ...] = ()
) -> str:
    if device.type != "cuda":
        return f"needs a CUDA tensor, got {device.type}"
    if dtype not in _HALVES:
        return f"needs float16 or bfloat16, got {dtype}"
    if width % 8 or width > 256:
        return f"needs a head_dim that is a multiple of 8 and at most 256, got {width}"
    return ""


def _needs_varlen(
    device: torch.device, dtype: torch.dtype, width: int, needs: tuple[str, ...] = ()
) -> str:
    if "softcap" in needs:
        return "torch.nn.attention.varlen has no softcap"
    return _needs_flash(device, dtype, width)


def _needs_sdpa(
    device: torch.device, dtype: torch.dtype, width: int, needs: tuple[str, ...] = ()
) -> str:
    beyond = [need for need in needs if need in ("softcap", "lse", "key lengths")]
    return f"scaled_dot_product_attention has no {' and no '.join(beyond)}" if beyond else ""


def _needs_flash2(
    device: torch.device, dtype: torch.dtype, width: int, needs: tuple[str, ...] = ()
) -> str:
    if not _HAS_FLASH2:
        return "the package flash-attn is not installed"
    return _needs_flash(device, dtype, width)


def _needs_flash4(
    device: torch.device, dtype: torch.dtype, width: int, needs: tuple[str, ...] = ()
) -> str:
    if not _HAS_FLASH4:
        return "the package flash-attn-4 (or its nvidia-cutlass-dsl or quack-kernels) is missing"
    if why_not := _needs_flash(device, dtype, width):
        return why_not
    if not torch.cuda.is_available():
        return "needs a CUDA device, there is none"
    major = torch.cuda.get_device_properties(device).major
    if major not in (9, 10, 11):
        return f"needs compute capability 9.x to 11.x, got {major}.x"
    if width > FLASH4_WIDTHS[-1]:
        return f"needs a head_dim of at most {FLASH4_WIDTHS[-1]}, got {width}"
    if width not in FLASH4_WIDTHS and SHORT in needs:
        return f"widens heads of {width}, which does not pay in documents of below {WIDENED_LEN}"
    return ""


def _needs_fla(device: torch.device, dtype: torch.dtype, width: int) -> str:
    if not _HAS_FLA:
        return "the package fla-core (flash-linear-attention) is not installed"
    if device.type != "cuda":
        return f"needs a CUDA tensor, got {device.type}"
    if dtype not in _HALVES:
        return f"needs float16 or bfloat16, got {dtype}"
    return ""


def _needs_sound_fla(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """fla itself raises in the backward, where Triton miscompiles it (fla issue 640)."""
    if why_not := _needs_fla_and_narrow_heads(device, dtype, width):
        return why_not
    on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9
    if on_hopper and (3, 4, 0) <= _TRITON_VERSION < (3, 7, 1) and not _HAS_TILELANG:
        return "on Hopper needs triton 3.7.1 or newer, or tilelang: its backward is wrong otherwise"
    return ""


def _needs_fla_and_narrow_heads(device: torch.device, dtype: torch.dtype, width: int) -> str:
    if width > 256:
        return f"needs a head_dim of at most 256, got {width}"
    return _needs_fla(device, dtype, width)


def _needs_fla_and_its_shapes(
    device: torch.device, dtype: torch.dtype, width: int, needs: tuple[str, ...] = ()
) -> str:
    """`needs` say what is wrong with the shapes, which one tensor does not show."""
    return _needs_fla_and_narrow_heads(device, dtype, width) or "; ".join(needs)


def _needs_triton_and_halves(device: torch.device, dtype: torch.dtype, width: int) -> str:
    if not _INTERPRETS and dtype not in _HALVES:
        return f"needs float16 or bfloat16, got {dtype}"
    return _needs_triton(device, dtype, width)


def _needs_grouped_mm(device: torch.device, dtype: torch.dtype, width: int) -> str:
    # On CUDA torch's grouped_mm has a kernel for bfloat16; else it loops and waits for the device.
    taken = (torch.bfloat16,) if device.type == "cuda" else (*_HALVES, torch.float32)
    if dtype not in taken:
        return f"needs {' or '.join(str(d)[6:] for d in taken)}, got {dtype}"
    if width * dtype.itemsize % 16:
        return f"needs widths that are multiples of {16 // dtype.itemsize}, got {width}"
    return ""


def _needs_grouped_mm_and_triton(device: torch.device, dtype: torch.dtype, width: int) -> str:
    return _needs_grouped_mm(device, dtype, width) or _needs_triton(device, dtype, width)


def _needs_float32_states(
    device: torch.device, dtype: torch.dtype, width: int, needs: tuple[str, ...] = ()
) -> str:
    return f"torch's fused AdamW has no {' and no '.join(needs)}" if needs else ""


def _needs_triton_for_masters(
    device: torch.device, dtype: torch.dtype, width: int, needs: tuple[str, ...] = ()
) -> str:
    """AdamW's: the parameters are float32 whatever the rest is."""
    return _needs_triton(device, dtype, width)


# op -> its backends, the preferred first, the plain reference last.
BACKENDS: dict[str, dict[str, _Reason]] = {
    # flash4 takes 0.5 to 0.6 of varlen's time on an H100. flash2 is varlen's kernel; not run here.
    "attention": {
        "flash4": _needs_flash4,
        "varlen": _needs_varlen,
        "flash2": _needs_flash2,
        "sdpa": _needs_sdpa,
        "reference": _always,
    },
    "linear_cross_entropy": {"triton": _needs_triton, "chunked": _always, "reference": _always},
    "rms_norm": {
        "triton": _needs_triton_and_narrow_rows,
        "reference": _always,
        "torch": _always,  # rounds otherwise: on request only
    },
    "add_rms_norm": {"triton": _needs_triton_and_narrow_rows, "reference": _always},
    "gated_rms_norm": {"triton": _needs_triton_and_narrow_rows, "reference": _always},
    "layer_norm": {
        "torch": _always,
        "triton": _needs_triton_and_narrow_rows,
        "reference": _always,
    },
    "swiglu": {"triton": _needs_triton, "reference": _always},
    "geglu": {"triton": _needs_triton, "reference": _always},
    "rope": {"triton": _needs_triton, "reference": _always},
    "modulate": {"triton": _needs_triton, "reference": _always},
    "gate_add": {"triton": _needs_triton, "reference": _always},
    # triton takes 0.56 of fla's time on an H200, and half its memory.
    "causal_conv1d": {"triton": _needs_triton, "fla": _needs_fla, "reference": _always},
    "gated_delta_rule": {
        "fla": _needs_sound_fla,
        "chunked": _always,
        "reference": _always,
    },
    "native_sparse_attention": {"fla": _needs_fla_and_its_shapes, "reference": _always},
    "moe_mlp": {
        "triton": _needs_grouped_mm_and_triton,
        "grouped": _needs_grouped_mm,
        "reference": _always,
    },
    "newton_schulz": {"triton": _needs_triton_and_halves, "reference": _always},
    "weighted_sum": {"triton": _needs_triton, "chunked": _always, "reference": _always},
    "adamw": {
        "triton": _needs_triton_for_masters,
        "torch": _needs_float32_states,
        "reference": _always,
    },
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


@contextmanager
def assume_device(device: str) -> Iterator[None]:
    """Choose backends within a `with` block as on `device`, "cuda", for fake tensors of the CPU.

    To plan on one machine what another will do: autograd cannot run on fake tensors of a device
    that is not there. Packages are still those of this machine.
    """
    global _assumed
    before, _assumed = _assumed, torch.device(device)
    try:
        yield
    finally:
        _assumed = before


def choose(
    op: str, x: torch.Tensor, backend: str | None = None, needs: tuple[str, ...] = ()
) -> str:
    """Name the backend on which `op` runs for a tensor like `x`.

    `needs` names what this call asks of the op beyond its plain form ("softcap", say); the op's
    reasons must then take it as their fourth argument.

    Raises ValueError when the backend that was asked for does not exist or cannot take `x`.
    """
    name, asked_by = requested(op, backend)
    device = _assumed or x.device
    if name is None:
        return first_able(op, device, x.dtype, x.shape[-1], needs)
    reasons = BACKENDS[op]
    # Who asks for a backend gets it where it does not pay, too.
    needs = tuple(need for need in needs if need != SHORT)
    if name not in reasons:
        raise ValueError(
            f"{asked_by}: the backend of {op} must be one of {', '.join(reasons)}, got {name!r}; "
            f"name one of these, or leave the choice open"
        )
    if why_not := reasons[name](device, x.dtype, x.shape[-1], *([needs] if needs else [])):
        raise ValueError(
            f"{asked_by}: the backend of {op} must be able to run here, got {name!r}, which "
            f"cannot: {why_not}; change that, or leave the choice open"
        )
    return name


def is_requested(op: str) -> bool:
    """Whether `use_backend` or the environment asks for a backend of `op`."""
    return requested(op, None)[0] is not None


def is_traced(x: torch.Tensor) -> bool:
    """Whether the op must be one node of a graph (torch.compile, fake tensors) for a tensor `x`.

    Only then is the torch.library op called: beside an H100 it took 0.2 ms of host time more per
    forward and backward than an autograd.Function on the same kernels (0.75 against 0.55 ms).
    """
    return torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter)


def first_able(
    op: str, device: torch.device, dtype: torch.dtype, width: int, needs: tuple[str, ...] = ()
) -> str:
    """The backend that is taken when the choice is open."""
    for name, reason in BACKENDS[op].items():
        if not reason(device, dtype, width, *([needs] if needs else [])):
            return name
    raise AssertionError(f"{op} has no reference backend")


def requested(op: str, backend: str | None) -> tuple[str | None, str]:
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
