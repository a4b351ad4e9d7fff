"""The one call that builds a diffusion model ready to train."""

from importlib import import_module

import torch

from ..catalogue import DENOISERS
from ..freeze import freeze
from ..weights import Gather, whole
from .config import DiffusionModelConfig, ObjectiveConfig
from .model import DiffusionModel


def build_diffusion(
    config: DiffusionModelConfig,
    objective: ObjectiveConfig,
    *,
    dtype: torch.dtype,
    gather: Gather = whole,
) -> DiffusionModel:
    """Build the model, fill its weights and freeze what the config says.

    May run inside `deepspeed.zero.Init`; then gather is as in `families.build_model`. Raises
    ValueError for weights that are not this model's.
    """
    model = build_shell(config, objective, dtype=dtype)
    if config.init == "random":
        model.initialize(config.seed, gather)
    else:
        assert config.path is not None
        model.load(config.path, gather)
    freeze(model, config.freeze)
    if config.compile == "layers":
        model.compile_layers()
    return model


def build_shell(
    config: DiffusionModelConfig, objective: ObjectiveConfig, *, dtype: torch.dtype
) -> DiffusionModel:
    """The model with its parameters not filled in."""
    module, _, attribute = DENOISERS[config.family].implementation.partition(":")
    family = getattr(import_module(module), attribute)
    model: DiffusionModel = family.from_config(config, objective, dtype=dtype)
    return model
