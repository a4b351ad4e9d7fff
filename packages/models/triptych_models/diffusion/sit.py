"""SiT: a transformer over the patches of noisy latents, told time and class by adaLN-Zero.

Ma et al., arXiv 2401.08740; the architecture is DiT's (Peebles and Xie, arXiv 2212.09748). Names
and shapes of parameters are those of the official checkpoints.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych_kernels import gate_add, layer_norm, modulate
from triptych_kernels.gate_add import gate_add_ref
from triptych_kernels.layer_norm import layer_norm_ref
from triptych_kernels.modulate import modulate_ref

from .config import SiTConfig

EPS = 1e-6
FREQUENCIES = 256  # of a time


class Ops(NamedTuple):
    """What stands between the products of a block."""

    norm: Callable[..., Tensor]
    modulate: Callable[..., Tensor]
    gate_add: Callable[..., Tensor]


KERNELS = Ops(layer_norm, modulate, gate_add)
# In compiled blocks, where the compiler fuses them with what is around.
PLAIN = Ops(layer_norm_ref, modulate_ref, gate_add_ref)


class SiT(nn.Module):
    """(latents (N, C, S, S), times (N,), labels (N,)) -> a prediction of the latents' shape.

    Label `num_classes` stands for none.
    """

    pos_embed: Tensor

    def __init__(self, config: SiTConfig, ops: Ops = KERNELS) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.x_embedder = PatchEmbedder(config.channels, width, patch)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        # A constant: checkpoints of the official layout hold it, ours need not.
        table = torch.from_numpy(position_table(width, config.image_size // patch))
        self.register_buffer("pos_embed", table, persistent=False)
        self.blocks = nn.ModuleList(
            Block(width, config.num_heads, ops) for _ in range(config.num_layers)
        )
        self.final_layer = FinalLayer(width, patch * patch * config.out_channels, ops)

    def forward(
        self,
        latents: Tensor,
        times: Tensor,
        labels: Tensor,
        run_block: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        x = self.x_embedder(latents)  # (N, T, D)
        x = x + self.pos_embed.to(x.dtype)
        condition = self.t_embedder(times) + self.y_embedder(labels)  # (N, D)
        for block in self.blocks:
            x = run_block(block, x, condition=condition) if run_block else block(x, condition)
        return self._unpatch(self.final_layer(x, condition))

    def _unpatch(self, x: Tensor) -> Tensor:
        """Tokens (N, T, P * P * C') -> (N, C, S, S), of C' the first C channels."""
        patch, side = self.config.patch_size, self.config.image_size // self.config.patch_size
        x = x.view(len(x), side, side, patch, patch, -1)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (N, C', side, P, side, P)
        x = x.reshape(len(x), -1, side * patch, side * patch)
        return x[:, : self.config.channels]


class PatchEmbedder(nn.Module):
    """(N, C, S, S) -> (N, T, D), rows of patches one after the other."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        x: Tensor = self.proj(latents.to(self.proj.weight.dtype))
        # Or all blocks would go on in the convolution's layout, token beside token.
        return x.flatten(2).transpose(1, 2).contiguous()


class TimeEmbedder(nn.Module):
    """Times in [0, 1], (N,) -> (N, D), by way of cosines and sines of 128 frequencies.

    The official models are given t itself, not 1000 t.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        steps = torch.arange(half, device=times.device, dtype=times.dtype)
        angles = times[:, None] * torch.exp(-math.log(10000.0) / half * steps)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedded: Tensor = self.mlp(waves.to(self.mlp[0].get_parameter("weight").dtype))
        return embedded


class LabelEmbedder(nn.Module):
    """Labels (N,) -> (N, D); the table's last row stands for no label."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_table(labels)
        return embedded


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition: the identity at first."""

    def __init__(self, width: int, num_heads: int, ops: Ops) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.mlp = MLP(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.ops = ops

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        norm, scaled, gated = self.ops
        parts = self.adaLN_modulation(condition).chunk(6, dim=-1)  # each (N, D)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        x = gated(x, self.attn(scaled(norm(x, eps=EPS), shift, scale)), gate)
        return gated(x, self.mlp(scaled(norm(x, eps=EPS), mlp_shift, mlp_scale)), mlp_gate)


class Attention(nn.Module):
    """Every token of an image sees all of them; q, k and v are one projection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, head_dim)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, tokens, width))
        return out


class MLP(nn.Module):
    """Two layers around a GELU, by its tanh formula."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class FinalLayer(nn.Module):
    """(N, T, D) -> (N, T, values of a patch)."""

    def __init__(self, width: int, values: int, ops: Ops) -> None:
        super().__init__()
        self.linear = nn.Linear(width, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.ops = ops

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        out: Tensor = self.linear(self.ops.modulate(self.ops.norm(x, eps=EPS), shift, scale))
        return out


def position_table(width: int, side: int) -> np.ndarray:
    """(1, side * side, width) fp32: half for the column, half for the row, each sin then cos."""
    omega = 1.0 / 10000.0 ** (np.arange(width // 4) / (width // 4))
    angles = np.arange(side)[:, None] * omega  # (side, width / 4)
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (side, width / 2)
    columns, rows = np.tile(line, (side, 1)), np.repeat(line, side, axis=0)
    return np.concatenate([columns, rows], axis=1)[None].astype(np.float32)


def sit_flops(config: SiTConfig) -> tuple[float, float, float]:
    """Forward FLOPs of an image: of products, of those whose input needs no gradient, of attention.

    Two a multiply-add. The papers count multiply-adds: 118.6 G for XL/2 at 256².
    """
    tokens, width = config.num_tokens, config.hidden_size
    pixels = config.patch_size**2
    first = tokens * pixels * config.channels * width + FREQUENCIES * width
    block = 12 * tokens * width**2 + 6 * width**2
    last = tokens * width * pixels * config.out_channels + 2 * width**2
    products = first + width**2 + config.num_layers * block + last
    attention = config.num_layers * 2 * tokens**2 * width
    return 2.0 * products, 2.0 * first, 2.0 * attention
