"""The model families and the one call that builds a model ready to train."""

import torch

from .config import ModelConfig
from .freeze import freeze
from .qwen3_vl import Qwen3VL
from .weights import Gather, initialize, load_weights, whole

FAMILIES = {"qwen3_vl": Qwen3VL}


def build_model(config: ModelConfig, *, dtype: torch.dtype, gather: Gather = whole) -> Qwen3VL:
    """Build the model, fill its weights and freeze what the config says.

    Parameters are in dtype, rotary frequencies in fp32. May run inside `deepspeed.zero.Init`; then
    gather must be `lambda p: deepspeed.zero.GatheredParameters(p, modifier_rank=0)`, and all ranks
    must call it. Raises ValueError for a directory that does not hold the family or its weights.
    """
    model = FAMILIES[config.family].from_directory(
        config.path,
        dtype=dtype,
        fused=config.fuse,
    )
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
