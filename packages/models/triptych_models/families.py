"""The model families and the one call that builds a model ready to train."""

import torch

from .config import ModelConfig
from .experts import EVERY_EXPERT, ExpertGroup
from .freeze import freeze
from .llava import Llava
from .llava_projector import LlavaProjector
from .mixtral import Mixtral
from .mixture import Mixture
from .packed import PackedModel
from .qwen2 import Qwen2
from .qwen2_moe import Qwen2MoE
from .qwen3 import Qwen3
from .qwen3_moe import Qwen3MoE
from .qwen3_vl import Qwen3VL
from .qwen3_vl_moe import Qwen3VLMoE
from .sequence import ALONE, SequenceGroup
from .weights import Gather, initialize, load_weights, whole

FAMILIES: dict[str, type[PackedModel]] = {
    "llava": Llava,
    "llava_projector": LlavaProjector,
    "mixtral": Mixtral,
    "qwen2": Qwen2,
    "qwen2_moe": Qwen2MoE,
    "qwen3": Qwen3,
    "qwen3_moe": Qwen3MoE,
    "qwen3_vl": Qwen3VL,
    "qwen3_vl_moe": Qwen3VLMoE,
}


def build_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    gather: Gather = whole,
    sequence: SequenceGroup = ALONE,
    experts: ExpertGroup = EVERY_EXPERT,
) -> PackedModel:
    """Build the model, fill its weights and freeze what the config says.

    Parameters are in dtype, rotary frequencies in fp32. May run inside `deepspeed.zero.Init`; then
    gather must be `lambda p: deepspeed.zero.GatheredParameters(p, modifier_rank=0)`, and all ranks
    must call it. sequence, experts: with whom this rank shares its rows, and experts. Raises
    ValueError for a directory that does not hold the family or its weights, and for heads or
    experts that such a group cannot share.
    """
    model = build_shell(config, dtype=dtype, experts=experts)
    model.set_sequence(sequence)
    found = {parameter.dtype for parameter in model.parameters()}
    assert found == {dtype}, f"zero.Init must be told to keep {dtype}, made {found}"
    if config.init == "random":
        initialize(model.hf, config.seed, gather)
    else:
        load_weights(model.hf, config.path, gather)
    freeze(model, config.freeze)
    if config.compile == "layers":
        model.compile_layers()
    return model


def build_shell(
    config: ModelConfig, *, dtype: torch.dtype, experts: ExpertGroup = EVERY_EXPERT
) -> PackedModel:
    """The model of a directory with its parameters not filled in."""
    family = FAMILIES[config.find_family()]
    # The compiler fuses norms, gates and what stands around them itself: 2 % faster on an H100.
    fused = config.fuse and config.compile != "layers"
    if issubclass(family, Mixture):
        return family.from_directory(
            config.path, dtype=dtype, fused=fused, moe=config.moe, experts=experts
        )
    if experts.size > 1:
        raise ValueError(
            f"parallel.expert: must be 1 for a model without experts, got {experts.size}; "
            "take a mixture of experts"
        )
    return family.from_directory(config.path, dtype=dtype, fused=fused)
