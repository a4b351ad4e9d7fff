"""Which backend each op would run on, and why the others would not."""

from importlib.metadata import PackageNotFoundError, version

import torch

from .dispatch import BACKENDS, FLASH4_WIDTHS, SHORT, WIDENED_LEN, first_able, requested

# Ops of one form, which torch and its compiler run on every device.
PLAIN = ("route", "balance_loss", "z_loss", "expert_counts", "rope_tables")
# distribution -> what of an op needs it.
PACKAGES = {
    "triton": "the backends called triton",
    "flash-attn-4": "attention's flash4",
    "flash-attn": "attention's flash2",
    "fla-core": "the backends called fla",
    "liger-kernel": "no op",
    "transformers": "register_attention and fuse(ops=['attention'])",
}


def explain(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16, width: int = 128
) -> str:
    """Tell per op which backend would run here, and why each other one would not.

    The answer is for tensors on `device` (by default CUDA where there is one; a device that this
    machine lacks may be asked about) of `dtype` whose last dimension is `width`. What a single
    call needs beyond that, such as attention with a soft cap, may change the choice.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    lines = [f"triptych_kernels for {dtype} on {device.type}, last dimension {width}"]
    for op in BACKENDS:
        lines += [
            f"  {op:<23} {backend:<10} {state}"
            for backend, state in _states(op, device, dtype, width).items()
        ]
    lines += [f"  {op:<23} {'torch':<10} runs, on every device" for op in PLAIN]
    lines += [f"  {name} {_version(name)}: for {what}" for name, what in PACKAGES.items()]
    return "\n".join(lines)


def taken(op: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """The backend that runs `op` here; with what keeps it off the first, where it is another.

    "varlen (not flash4: needs a head_dim of at most 128, got 256)". Arguments as `explain`'s.
    """
    asked = requested(op, None)[0]
    name = asked or first_able(op, device, dtype, width)
    if name == "flash4" and not asked and width not in FLASH4_WIDTHS:
        other = first_able(op, device, dtype, width, (SHORT,))
        return f"{name} ({other} in documents of below {WIDENED_LEN} tokens)"
    best, reason = next(iter(BACKENDS[op].items()))
    why_not = reason(device, dtype, width)
    return name if name == best or not why_not else f"{name} (not {best}: {why_not})"


def _states(op: str, device: torch.device, dtype: torch.dtype, width: int) -> dict[str, str]:
    reasons = BACKENDS[op]
    name, asked_by = requested(op, None)
    runs = name or first_able(op, device, dtype, width)
    states = {
        backend: reason(device, dtype, width) or f"could run; {runs} was taken"
        for backend, reason in reasons.items()
    }
    refused = name is not None and (name not in reasons or reasons[name](device, dtype, width))
    states[runs] = "runs" if not refused else f"refused: {states.get(runs, 'does not exist')}"
    states[runs] += f" (asked by {asked_by})" if name else ""
    return states


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "is not installed"
