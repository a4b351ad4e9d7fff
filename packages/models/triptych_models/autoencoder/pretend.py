"""An autoencoder and a batch without memory behind them, to plan a run; see `..fake`."""

from typing import Any

import torch
from torch import Tensor

from .build import assemble
from .config import AdversaryConfig, PerceptualConfig, RAEModelConfig
from .rae import RAE

USES, NUMBERS = 3, 7  # of an image's random numbers, as the loader draws them


def build_pretend_rae(
    config: RAEModelConfig,
    perceptual: PerceptualConfig,
    adversary: AdversaryConfig,
    *,
    dtype: torch.dtype,
) -> RAE:
    """The model of `build_rae` on the meta device, with what is frozen beside it.

    Of folders config.json is read alone, but for an encoder in diffusers' layout.
    """
    drawn = {"init": "random"}
    shape = config.model_copy(update={"encoder": config.encoder.model_copy(update=drawn)})
    judges = perceptual.model_copy(update=drawn), adversary.model_copy(update=drawn)
    with torch.device("meta"):
        return assemble(shape, *judges, dtype=dtype).train()


def pretend_images(model: RAE, count: int) -> dict[str, Any]:
    """A batch as the loader makes them; call it inside `fake.pretend`, or for a real model."""
    side = model.image_size
    return {
        "pixels": torch.zeros(count, 3, side, side, dtype=torch.uint8),
        "noise": torch.zeros(count, *model.noise_shape),
        "levels": torch.zeros(count),
        "draws": torch.zeros(count, USES, NUMBERS),
        "weights": torch.ones(count),
        "num_targets": count,
    }


def begin_window(model: RAE, batch: dict[str, Any], *, step: int, micro_steps: int) -> Tensor:
    """What comes before the first forward of a window; returned is what it leaves for the others.

    Of each micro-batch there are two slopes and the reconstructions, fp32, from its survey on.
    """
    model.begin_step(step)
    if micro_steps > 1:
        model.survey([batch])
    others = micro_steps - 1 if model.is_heeding else 0
    return torch.zeros(others, 3, *batch["pixels"].shape)
