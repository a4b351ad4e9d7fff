"""The ops as pure functions: `import triptych_kernels.functional as F`, beside torch's own.

They are the functions of the package itself, without its modules, its optimizer and `fuse`.
"""

from .adamw import adamw_
from .add_rms_norm import add_rms_norm
from .attention import attention
from .causal_conv1d import causal_conv1d
from .gate_add import gate_add
from .gated_delta_rule import gated_delta_rule
from .gated_rms_norm import gated_rms_norm
from .geglu import geglu
from .layer_norm import layer_norm
from .linear_cross_entropy import linear_cross_entropy
from .modulate import modulate
from .moe import moe_mlp
from .moe_routing import balance_loss, expert_counts, route, z_loss
from .native_sparse_attention import native_sparse_attention
from .newton_schulz import newton_schulz
from .rms_norm import rms_norm
from .rope import apply_rope, rope_tables
from .swiglu import swiglu
from .weighted_sum import weighted_sum

__all__ = [
    "adamw_",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "balance_loss",
    "causal_conv1d",
    "expert_counts",
    "gate_add",
    "gated_delta_rule",
    "gated_rms_norm",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "modulate",
    "moe_mlp",
    "native_sparse_attention",
    "newton_schulz",
    "rms_norm",
    "rope_tables",
    "route",
    "swiglu",
    "weighted_sum",
    "z_loss",
]
