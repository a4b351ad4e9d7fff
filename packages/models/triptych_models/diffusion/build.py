"""The one call that builds a diffusion model ready to train."""

import torch

from ..freeze import freeze
from ..weights import Gather, whole
from .config import DiffusionModelConfig, ObjectiveConfig
from .sit import KERNELS, PLAIN
from .sit_model import SiTModel, initialize_sit
from .sit_weights import load_sit


def build_diffusion(
    config: DiffusionModelConfig,
    objective: ObjectiveConfig,
    *,
    dtype: torch.dtype,
    gather: Gather = whole,
) -> SiTModel:
    """Build the model, fill its weights and freeze what the config says.

    May run inside `deepspeed.zero.Init`; then gather is as in `families.build_model`. Raises
    ValueError for weights that are not this model's.
    """
    model = build_shell(config, objective, dtype=dtype)
    if config.init == "random":
        initialize_sit(model.net, config.seed, gather)
    else:
        assert config.path is not None
        load_sit(model.net, config.path, gather)
    freeze(model, config.freeze)
    if config.compile == "layers":
        model.compile_layers()
    return model


def build_shell(
    config: DiffusionModelConfig, objective: ObjectiveConfig, *, dtype: torch.dtype
) -> SiTModel:
    """The model with its parameters not filled in."""
    ops = PLAIN if config.compile == "layers" else KERNELS
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # of what is born inside zero.Init, too
    try:
        return SiTModel(config.sit, objective, ops)
    finally:
        torch.set_default_dtype(before)
