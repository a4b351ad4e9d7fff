"""The one call that builds a model of a family ready to train."""

from importlib import import_module

import torch

from .catalogue import FAMILIES
from .config import ModelConfig
from .experts import EVERY_EXPERT, ExpertGroup
from .freeze import freeze
from .mixture import Mixture
from .packed import PackedModel
from .sequence import ALONE, SequenceGroup
from .weights import Gather, initialize, load_weights, whole


def family_class(name: str) -> type[PackedModel]:
    """The class of a family of the catalogue."""
    module, _, attribute = FAMILIES[name].implementation.partition(":")
    found: type[PackedModel] = getattr(import_module(module), attribute)
    return found


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
    family = family_class(config.find_family())
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
    model = family.from_directory(config.path, dtype=dtype, fused=fused)
    model.diffusion = config.diffusion
    return model
