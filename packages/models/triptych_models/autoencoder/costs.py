"""FLOPs of an autoencoder's step: products of what trains by formula, of what is frozen counted.

Frozen networks are run once, without numbers, for one image; only products and convolutions count.
"""

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .config import DecoderConfig


class Costs(NamedTuple):
    """Of frozen networks, for an image; backward is to the image, no weight has a gradient."""

    encoder: int
    perceptual: int
    perceptual_backward: int
    features: int
    features_backward: int
    tokens: int
    """of a discriminator's feature"""

    @classmethod
    def measure(cls, frozen: Mapping[str, nn.Module], side: int, adversary_side: int) -> Self:
        """Of those there are, with the sides of images that they see."""
        encoder, _, _ = _count(frozen["encoder"], side, backward=False)
        judge, seen = frozen.get("perceptual"), frozen.get("features")
        features = None if judge is None else judge.get_submodule("features")
        forward, backward, _ = (0, 0, 0) if features is None else _count(features, side)
        found = (0, 0, 0) if seen is None else _count(seen, adversary_side)
        return cls(encoder, forward, backward, *found)


def decoder_flops(config: DecoderConfig, latents: int, channels: int) -> int:
    """Forward and backward of an image's latents (L, C), which need no gradient."""
    width, tokens = config.hidden_size, latents + 1
    first = latents * channels * width
    block = tokens * (4 * width**2 + 2 * width * config.intermediate_size)
    attention = 2 * tokens**2 * width
    last = latents * width * 3 * config.patch_size**2
    return 2 * (2 * first + 3 * (config.num_layers * (block + attention) + last))


def discriminator_flops(
    num_layers: int, channels: int, tokens: int, kernel_size: int
) -> tuple[int, int]:
    """Of an image's features: forward and backward to them alone; and of two images' forward and
    backward to weights alone.
    """
    first, rest = channels**2, kernel_size * channels**2 + channels
    scale = 2 * num_layers * tokens
    return scale * 2 * (first + rest), 2 * scale * (2 * first + 3 * rest)


def _count(
    net: Callable[..., Tensor | list[Tensor]], side: int, *, backward: bool = True
) -> tuple[int, int, int]:
    """FLOPs forward and backward, and the tokens of what comes out first."""
    ghost = copy.deepcopy(net).to("meta")  # type: ignore[attr-defined]
    images = torch.zeros(1, 3, side, side, device="meta", requires_grad=backward)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            out = ghost(images)
        layers = [out] if isinstance(out, Tensor) else out
        if not backward:
            return forward.get_total_flops(), 0, layers[0].shape[1]
        with FlopCounterMode(display=False) as counter:
            torch.stack([layer.sum() for layer in layers]).sum().backward()
    return forward.get_total_flops(), counter.get_total_flops(), layers[0].shape[1]
