"""Tensor parallelism: which weights of a model are cut over ranks, and how.

The language layers' linears in pairs: the first of a pair by its outputs (whole heads; gate and up
alike), the second by its inputs, so that one sum over ranks comes after each pair (Megatron-LM,
arXiv 1909.08053). All else is whole on every rank: embeddings, norms, head, vision tower.
"""

from typing import Literal

from torch import nn

from .layout import decoder, text_config
from .packed import PackedModel

Cut = Literal["outputs", "inputs", "none"]

_CUTS: dict[str, Cut] = {
    "self_attn.q_proj": "outputs",
    "self_attn.k_proj": "outputs",
    "self_attn.v_proj": "outputs",
    "self_attn.o_proj": "inputs",
    "mlp.gate_proj": "outputs",
    "mlp.up_proj": "outputs",
    "mlp.down_proj": "inputs",
    # Whole, but each rank sees its own heads alone: gradients are a sum over ranks.
    "self_attn.q_norm": "none",
    "self_attn.k_norm": "none",
}


def tensor_cuts(model: PackedModel, size: int, sequence: int = 1) -> dict[str, Cut]:
    """What is done with the parameters that `size` ranks divide between them, by name.

    "none" is for a weight that stays whole and whose gradients are parts of a sum. `sequence` ranks
    hold a row between them. Raises ValueError where heads or MLPs cannot be cut into equal parts,
    or layers are not what is known here.
    """
    config = text_config(model.hf.config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for what in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        number, parts = (
            getattr(config, what),
            size * (sequence if what == "num_attention_heads" else 1),
        )
        if number % parts:
            times = f" times parallel.sequence ({sequence})" if parts > size else ""
            raise ValueError(
                f"parallel.tensor:{times} must divide the model's {what} ({number}), got {size}; "
                "lower it"
            )
    cuts: dict[str, Cut] = {}
    for layer in decoder(model.hf).layers:
        modules = dict(layer.named_modules())
        missing = [path for path in _CUTS if path not in modules]
        if missing or modules.keys() & {"mlp.experts", "mlp.gate", "mlp_moe_gen"}:
            raise ValueError(
                "parallel.tensor: must be 1 for layers other than attention and a gated MLP, got "
                f"{size} for {type(layer).__name__}; share the row by parallel.sequence instead"
            )
        for path, cut in _CUTS.items():
            weight = _weight(modules[path])
            if cut != "none" or weight.requires_grad:
                cuts[names[id(weight)]] = cut
    return cuts


def _weight(module: nn.Module) -> nn.Parameter:
    assert isinstance(module.weight, nn.Parameter)
    return module.weight
