"""op -> (its cases for accuracy, its cases of a training step's size)."""

from collections.abc import Callable, Iterator

from . import (
    attention,
    elementwise,
    linear_attention,
    linear_cross_entropy,
    matmuls,
    norms,
    optimizer,
)
from .case import Case

_Cases = Callable[[], Iterator[Case]]

CASES: dict[str, tuple[_Cases, _Cases]] = {
    "attention": (attention.cases, attention.timed),
    "linear_cross_entropy": (linear_cross_entropy.cases, linear_cross_entropy.timed),
    "rms_norm": (norms.rms_norm_cases, norms.rms_norm_timed),
    "add_rms_norm": (norms.add_rms_norm_cases, norms.add_rms_norm_timed),
    "gated_rms_norm": (norms.gated_rms_norm_cases, norms.gated_rms_norm_timed),
    "layer_norm": (norms.layer_norm_cases, norms.layer_norm_timed),
    "swiglu": (elementwise.swiglu_cases, elementwise.swiglu_timed),
    "geglu": (elementwise.geglu_cases, elementwise.geglu_timed),
    "rope": (elementwise.rope_cases, elementwise.rope_timed),
    "modulate": (elementwise.modulate_cases, elementwise.modulate_timed),
    "gate_add": (elementwise.gate_add_cases, elementwise.gate_add_timed),
    "weighted_sum": (elementwise.weighted_sum_cases, elementwise.weighted_sum_timed),
    "adamw": (optimizer.adamw_cases, optimizer.adamw_timed),
    "moe_mlp": (matmuls.moe_cases, matmuls.moe_timed),
    "newton_schulz": (matmuls.newton_schulz_cases, matmuls.newton_schulz_timed),
    "gated_delta_rule": (linear_attention.delta_rule_cases, linear_attention.delta_rule_timed),
    "causal_conv1d": (linear_attention.conv_cases, linear_attention.conv_timed),
    "native_sparse_attention": (linear_attention.sparse_cases, linear_attention.sparse_timed),
}
