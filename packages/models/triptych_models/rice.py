"""RICE: a ViT over images of any resolution, each frame with a class token whose angle is learned.

The tower of LLaVA-OneVision-1.5 (arXiv 2507.20025, 2509.23661), which transformers 5.22 does not
ship; blocks and merger are its Qwen2-VL's. A frame attends to itself and its class token. Rotary
angles are those of rows and columns, as in Qwen2-VL; the class token's are a parameter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PretrainedConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger, Qwen2VLVisionBlock

from .rotary import inverse_frequencies
from .vision import block_order, to_device

_BLOCK_EPS = 1e-5  # of the norms in blocks; of the others by the configuration


class RiceConfig(PretrainedConfig):
    """The section vision_config of config.json."""

    model_type = "rice_vit"
    base_config_key = "vision_config"

    depth: int = 24
    embed_dim: int = 1024
    hidden_size: int = 1024
    hidden_act: str = "gelu"
    intermediate_size: int = 4096
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-05
    text_hidden_size: int = 2560

    @property
    def mlp_ratio(self) -> float:
        """What Qwen2-VL's blocks ask for."""
        return self.intermediate_size / self.embed_dim

    @property
    def out_hidden_size(self) -> int:
        """Qwen2.5-VL's name of the language model's width."""
        return self.text_hidden_size


class Rice(nn.Module):
    """The tower and its merger, by the names of published folders."""

    def __init__(self, config: RiceConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config)
        self.class_token = ClassToken(config)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.depth))
        self.merger = PatchMerger(
            config.text_hidden_size, config.hidden_size, config.spatial_merge_size
        )
        self.merger.ln_q.eps = config.layer_norm_eps

    def forward(self, pixels: Tensor, grid_thw: Tensor) -> Tensor:
        """Features (M, H) of patches (P, patch_dim); grid_thw (num_images, 3)."""
        frames = torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])
        cu_seqlens = nn.functional.pad(frames.cumsum(0), (1, 0)).to(pixels.device, torch.int32)
        return rice_features(self, pixels, grid_thw.cpu(), cu_seqlens, int(frames.max()), _call)


class PatchEmbedding(nn.Module):
    """Patches (P, channels * patch_size**2) to (P, hidden)."""

    def __init__(self, config: RiceConfig) -> None:
        super().__init__()
        side = config.patch_size
        self.shape = (config.in_channels, side, side)
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, side, stride=side, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = pixels.to(self.proj.weight.dtype).view(-1, *self.shape)
        embedded: Tensor = self.proj(patches)
        return embedded.flatten(1)


class ClassToken(nn.Module):
    """A learned token before the patches of each frame, and its rotary angles."""

    def __init__(self, config: RiceConfig) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.angles = nn.Parameter(torch.empty(1, config.hidden_size // config.num_heads // 2))

    def forward(
        self, patches: Tensor, angles: Tensor, order: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """patches (P, hidden), their angles (P, head_dim / 2) fp32, order (F + P,) of F class
        tokens and all patches → (F + P, hidden), and cos and sin (F + P, head_dim)."""
        frames = len(order) - len(patches)
        tokens = torch.cat((self.embedding.expand(frames, -1), patches))[order]
        turned = torch.cat((self.angles.float().expand(frames, -1), angles))[order]
        turned = torch.cat((turned, turned), -1)
        return tokens, (turned.cos(), turned.sin())


class Places(NamedTuple):
    """Where the F class tokens and P patches of a row stand."""

    order: Tensor
    """(F + P,) int64: which of class tokens and then patches stands at each place"""
    kept: Tensor
    """(P,) int64: where each patch stands"""
    angles: Tensor
    """(P, head_dim / 2) fp32: of its row, then of its column"""


def rice_features(
    visual: Rice,
    pixels: Tensor,
    grid_thw: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    run_layer: Callable[..., Tensor],
) -> Tensor:
    """Features that replace the image tokens.

    pixels (P, patch_dim) float, grid_thw (num_images, 3) on the host, cu_seqlens
    (num_frames + 1,) int32 → (M, H), M = P / merge_size².
    """
    head_dim = visual.config.hidden_size // visual.config.num_heads
    with unset_fake_temporarily():  # it depends on values, also where a plan runs on fake tensors
        places = places_of(grid_thw, visual.config.spatial_merge_size, head_dim)
    places = Places(*(to_device(x, pixels.device) for x in places))
    patches = visual.patch_embed(pixels)
    hidden_states, rotary = visual.class_token(patches, places.angles, places.order)
    hidden_states = visual.pre_layernorm(hidden_states)
    more = torch.arange(len(cu_seqlens), device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    for block in visual.blocks:
        hidden_states = run_layer(
            block,
            hidden_states,
            cu_seqlens=cu_seqlens + more,
            max_seqlen=max_seqlen + 1,
            position_embeddings=rotary,
        )
    features: Tensor = visual.merger(hidden_states[places.kept])
    return features


def places_of(grid_thw: Tensor, merge_size: int, head_dim: int) -> Places:
    """Places of images whose grids are grid_thw (num_images, 3), in patches, on the host."""
    lengths, coordinates = [], []
    for t, h, w in grid_thw.tolist():
        lengths += [h * w] * t
        coordinates += [torch.stack(block_order(h, w, merge_size), 1)] * t
    frequencies = inverse_frequencies(head_dim // 2, 10000.0)
    angles = (torch.cat(coordinates)[:, :, None] * frequencies).flatten(1)
    frame_of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    kept = torch.arange(len(frame_of)) + frame_of + 1  # as many class tokens before it
    order = torch.empty(len(lengths) + len(frame_of), dtype=torch.int64)
    order[kept] = torch.arange(len(frame_of)) + len(lengths)
    firsts = torch.tensor([0, *lengths[:-1]]).cumsum(0) + torch.arange(len(lengths))
    order[firsts] = torch.arange(len(lengths))
    return Places(order, kept, angles)


def _block(config: RiceConfig) -> Qwen2VLVisionBlock:
    block = Qwen2VLVisionBlock(config)
    block.norm1.eps = block.norm2.eps = _BLOCK_EPS
    return block


def _call(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    called: Tensor = layer(hidden_states, **kwargs)
    return called
