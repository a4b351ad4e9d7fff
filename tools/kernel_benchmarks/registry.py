"""Every benchmark by name: add one here, and tools/bench_kernels.py runs it."""

from . import matmuls, optimizer, rows
from .op import Op

OPS: dict[str, Op] = {
    "linear_cross_entropy": matmuls.LINEAR_CROSS_ENTROPY,
    "attention": matmuls.ATTENTION,
    "rms_norm": rows.RMS_NORM,
    "add_rms_norm": rows.ADD_RMS_NORM,
    "layer_norm": rows.LAYER_NORM,
    "swiglu": rows.SWIGLU,
    "geglu": rows.GEGLU,
    "rope": rows.ROPE,
    "modulate": rows.MODULATE,
    "moe": matmuls.MOE,
    "newton_schulz": matmuls.NEWTON_SCHULZ,
    "adamw": optimizer.ADAMW,
    "adamw_half_states": optimizer.ADAMW_HALF_STATES,
    "weighted_sum": rows.WEIGHTED_SUM,
}
