"""The one call that builds an autoencoder ready to train."""

import torch
from torch import Tensor

from ..diffusion.model import default_dtype
from ..freeze import freeze
from ..weights import Gather, whole
from .config import AdversaryConfig, PerceptualConfig, RAEModelConfig
from .encoder import load_encoder, make_decoder
from .features import VitFeatures, load_vit
from .perceptual import load_perceptual
from .rae import RAE, Judges, SumOverRanks
from .weights import initialize, load_decoder


def nothing(tensor: Tensor) -> None:
    """The sum over the ranks of one."""


def build_rae(
    config: RAEModelConfig,
    perceptual: PerceptualConfig,
    adversary: AdversaryConfig,
    *,
    dtype: torch.dtype,
    gather: Gather = whole,
    sum_over_ranks: SumOverRanks = nothing,
) -> RAE:
    """Build the model, fill its weights and freeze what the config says.

    Frozen networks are of dtype, as is the decoder; the discriminator is fp32. gather is as in
    `families.build_model`. Raises ValueError for folders that do not hold what they must.
    """
    model = assemble(config, perceptual, adversary, dtype=dtype, sum_over_ranks=sum_over_ranks)
    initialize(model, config.seed, gather)
    if config.init == "pretrained":
        assert config.path is not None
        load_decoder(model, config.path, gather)
    if config.compile == "layers":
        model.compile_layers()
    return model


def assemble(
    config: RAEModelConfig,
    perceptual: PerceptualConfig,
    adversary: AdversaryConfig,
    *,
    dtype: torch.dtype,
    sum_over_ranks: SumOverRanks = nothing,
) -> RAE:
    """The same without first weights of what trains."""
    encoder = load_encoder(config, dtype)
    latents = (config.input_size // encoder.net.config.patch_size) ** 2
    with default_dtype(dtype):
        decoder = make_decoder(config, encoder.net.config.hidden_size, latents)
    judges = Judges(
        load_perceptual(perceptual, config.seed, dtype) if perceptual.is_on else None,
        perceptual.weight,
        load_vit(adversary, "adversary", [-1, *adversary.depths], config.seed, dtype)
        if adversary.is_on
        else None,
        adversary,
    )
    _check_sides(judges, decoder.image_size)
    model = RAE(encoder, decoder, config, judges, sum_over_ranks)
    freeze(model, config.freeze if adversary.is_on else [*{*config.freeze} - {"discriminator"}])
    return model


def _check_sides(judges: Judges, side: int) -> None:
    """Raise ValueError for a ViT that would not see all of its images, of which that of the
    perceptual distance gets reconstructions as they are."""
    if judges.features is not None and judges.adversary.image_size % judges.features.patch:
        patch, found = judges.features.patch, judges.adversary.image_size
        raise ValueError(
            f"adversary.image_size: must be a multiple of its network's patches ({patch}), got "
            f"{found}; take {found - found % patch or patch}"
        )
    compared = None if judges.perceptual is None else judges.perceptual.features
    if isinstance(compared, VitFeatures) and side % compared.patch:
        raise ValueError(
            f"perceptual.path: its network's patches must divide the images' side ({side}), got "
            f"{compared.patch}; name another network, or change model.decoder.patch_size"
        )
