"""Rotary frequencies in fp32 whatever is done to the rest of the model."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layout import decoder, ear, head_dim, text_config, tower


def restore_rotary(model: PreTrainedModel) -> None:
    """Recompute the rotary frequencies of a transformers model in fp32, on the device they are on.

    Casting a module (`model.bfloat16()`, which DeepSpeed does) casts its buffers too, and
    building one under `deepspeed.zero.Init` rounds them on the way; bf16 frequencies are off by
    up to 0.4 %, which is whole turns at long positions.
    """
    text = text_config(model.config)
    turned = int(head_dim(text) * text.rope_parameters.get("partial_rotary_factor", 1.0))
    assign(
        decoder(model).rotary_emb,
        inverse_frequencies(turned, text.rope_parameters["rope_theta"]),
    )
    if hasattr(ear(model), "positional_embedding"):
        restore_sinusoids(ear(model).positional_embedding)
    if not hasattr(tower(model), "rotary_pos_emb"):
        return
    vision = model.config.vision_config
    rope = getattr(vision, "rope_parameters", None) or {}  # fixed at 10000 before transformers 5.6
    assign(
        tower(model).rotary_pos_emb,
        inverse_frequencies(
            vision.hidden_size // vision.num_heads // 2, rope.get("rope_theta", 10000.0)
        ),
    )


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2i/dim) for i < dim/2: (dim / 2,) fp32."""
    exponents = (
        torch.arange(0, dim, 2).float() / dim
    )  # float() after: zero.Init rounds float arange
    return 1.0 / theta**exponents


def restore_sinusoids(embedding: nn.Module) -> None:
    """Compute the table of positions (length, channels) of an audio tower again, in fp32."""
    table = embedding.compute_default_singular_positional_embedding()  # type: ignore[operator]
    place: Tensor = embedding.positional_embedding  # type: ignore[assignment]
    embedding.positional_embedding = table.float().to(place.device)


def assign(rotary: nn.Module, inv_freq: Tensor) -> None:
    """Put inv_freq into the buffers that hold frequencies."""
    for name in ("inv_freq", "original_inv_freq"):
        buffer = getattr(rotary, name, None)
        if buffer is not None:
            setattr(rotary, name, inv_freq.to(buffer.device))
