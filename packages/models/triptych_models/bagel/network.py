"""Bagel's network, of which transformers has the parts: Qwen2's layers twice, SigLIP's blocks.

Parameters have the names of ByteDance-Seed/BAGEL-7B-MoT (see layout.STORED_PREFIXES for how they
begin there); those that work on latents end in `_moe_gen`. Source: arXiv 2505.14683, section 2.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from triptych_kernels import attention, native_sparse_attention

from ..diffusion.sit import TimeEmbedder, position_table
from ..layout import STORED_PREFIXES, head_dim
from .config import BagelConfig

Expert = Callable[[Tensor], Tensor]


class Segments(NamedTuple):
    """Which keys which queries see: see `triptych_models.bagel.layout`."""

    queries: Tensor
    keys: Tensor
    bounds: Tensor
    longest: int


class Pattern(NamedTuple):
    """How a row attends: in text as documents, in images as wholes."""

    cu_seqlens: Tensor
    max_seqlen: int
    causal: Segments | None = None
    mutual: Segments | None = None
    order: Tensor | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """q (T, Hq, D), k and v (T, Hkv, D), in the row's token order → (T, Hq, D)."""
    if pattern.order is None:
        return attention(q, k, v, pattern.cu_seqlens, pattern.max_seqlen, causal=True)
    parts = [
        attention(
            q[queries],
            k[keys],
            v[keys],
            bounds[0],
            longest,
            causal=causal,
            cu_seqlens_k=bounds[1],
            max_seqlen_k=longest,
        )
        for (queries, keys, bounds, longest), causal in _calls(pattern)
    ]
    return torch.cat(parts)[pattern.order]


def attend_sparsely(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, pattern: Pattern, settings: dict[str, Any]
) -> Tensor:
    """As `attend`, each token to parts of what it sees, by gates (T, Hq, 3)."""
    if pattern.order is None:
        return native_sparse_attention(q, k, v, gates, pattern.cu_seqlens, **settings)
    parts = [
        native_sparse_attention(
            q[queries],
            k[keys],
            v[keys],
            gates[queries],
            bounds[0],
            cu_seqlens_k=bounds[1],
            causal=causal,
            **settings,
        )
        for (queries, keys, bounds, _), causal in _calls(pattern)
    ]
    return torch.cat(parts)[pattern.order]


def _calls(pattern: Pattern) -> list[tuple[Segments, bool]]:
    """Both kinds of segments, and whether they are causal; a row may have none of one."""
    kinds = ((pattern.causal, True), (pattern.mutual, False))
    return [(one, causal) for one, causal in kinds if one is not None and one.bounds.shape[1] > 1]


def by_expert(x: Tensor, reading: Expert, drawing: Expert, num_latents: int) -> Tensor:
    """x (1, T, …), its last num_latents tokens those of latents. Both experts always run."""
    text, latents = x.split([x.shape[1] - num_latents, num_latents], dim=1)
    return torch.cat([reading(text), drawing(latents)], dim=1)


class Gates(nn.Linear):
    """What weighs the branches of native sparse attention: at first all alike."""

    is_optional = True  # in a folder, as that of a model that was dense

    def first_value(self, name: str) -> Tensor:
        """What a parameter begins with, or has where a folder has none."""
        return torch.zeros_like(self.get_parameter(name), dtype=torch.float32, device="cpu")


class MixedAttention(nn.Module):
    """Attention that all tokens share, by projections and norms of two experts."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        text = config.llm_config
        self.sparse = config.sparse_attention
        self.head_dim = head_dim(text)
        width, heads, kv_heads = (
            text.hidden_size,
            text.num_attention_heads * self.head_dim,
            text.num_key_value_heads * self.head_dim,
        )
        for end in ("", "_moe_gen"):
            self.add_module(f"q_proj{end}", nn.Linear(width, heads))
            self.add_module(f"k_proj{end}", nn.Linear(width, kv_heads))
            self.add_module(f"v_proj{end}", nn.Linear(width, kv_heads))
            self.add_module(f"o_proj{end}", nn.Linear(heads, width, bias=False))
            self.add_module(f"q_norm{end}", Qwen2RMSNorm(self.head_dim, text.rms_norm_eps))
            self.add_module(f"k_norm{end}", Qwen2RMSNorm(self.head_dim, text.rms_norm_eps))
            if config.sparse_attention is not None:  # of a head its three branches
                self.add_module(f"g_proj{end}", Gates(width, 3 * text.num_attention_heads))

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], pattern: Pattern, num_latents: int
    ) -> Tensor:
        """x (1, T, H) → (1, T, H)."""

        def run(name: str, x: Tensor) -> Tensor:
            reading, drawing = (self.get_submodule(f"{name}{end}") for end in ("", "_moe_gen"))
            return by_expert(x, reading, drawing, num_latents)

        q, k, v = (run(f"{n}_proj", x).unflatten(-1, (-1, self.head_dim)) for n in "qkv")
        q, k = run("q_norm", q), run("k_norm", k)  # (1, T, heads, D)
        q, k = apply_rotary_pos_emb(q, k, *rotary, unsqueeze_dim=2)
        if self.sparse is None:
            out = attend(q[0], k[0], v[0], pattern)
        else:
            gates = run("g_proj", x)[0].sigmoid().unflatten(-1, (-1, 3))
            out = attend_sparsely(q[0], k[0], v[0], gates, pattern, self.sparse)
        return run("o_proj", out.flatten(1)[None])


class MixedLayer(nn.Module):
    """A layer of the mixture of transformers: all weights are there twice."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        text = config.llm_config
        self.self_attn = MixedAttention(config)
        for end in ("", "_moe_gen"):
            self.add_module(f"mlp{end}", Qwen2MLP(text))
            for name in ("input_layernorm", "post_attention_layernorm"):
                norm = Qwen2RMSNorm(text.hidden_size, text.rms_norm_eps)
                self.add_module(f"{name}{end}", norm)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        pattern: Pattern,
        num_latents: int,
    ) -> Tensor:
        """hidden_states (1, T, H), in the row's token order → (1, T, H)."""

        def run(name: str, x: Tensor) -> Tensor:
            reading, drawing = (self.get_submodule(f"{name}{end}") for end in ("", "_moe_gen"))
            return by_expert(x, reading, drawing, num_latents)

        x = run("input_layernorm", hidden_states)
        hidden_states = hidden_states + self.self_attn(x, rotary, pattern, num_latents)
        return hidden_states + run("mlp", run("post_attention_layernorm", hidden_states))


class MixedDecoder(nn.Module):
    """Qwen2's decoder, its layers and last norm twice."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        text = config.llm_config
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(MixedLayer(config) for _ in range(text.num_hidden_layers))
        self.norm = Qwen2RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.norm_moe_gen = Qwen2RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(text)


class PackedSiglipAttention(nn.Module):
    """Stands in for SigLIP's attention and owns its projections; patches see their image."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.k_proj, self.v_proj = stock.k_proj, stock.v_proj
        self.q_proj, self.out_proj = stock.q_proj, stock.out_proj
        self.head_dim = stock.head_dim

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        *,
        cu_seqlens: Tensor,
        max_seqlen: int,
    ) -> tuple[Tensor, None]:
        """hidden_states (P, C), cu_seqlens (images + 1,) int32 → (P, C)."""
        q, k, v = (
            proj(hidden_states).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attention(q, k, v, cu_seqlens, max_seqlen, causal=False)
        return self.out_proj(out.flatten(1)), None


class SiglipEmbeddings(nn.Module):
    """Patches (P, p * p * 3) of images of any shape, with learned positions."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        vision = config.vit_config
        patch_dim = vision.num_channels * vision.patch_size**2
        self.patch_embedding = nn.Linear(patch_dim, vision.hidden_size)
        sides = (vision.image_size // vision.patch_size) ** 2
        self.position_embedding = nn.Embedding(sides, vision.hidden_size)

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        embedded: Tensor = self.patch_embedding(patches)
        return embedded + self.position_embedding(places)


class SiglipTower(nn.Module):
    """SigLIP over packed images, without the blocks behind those that are used."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        vision = config.vit_config
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = nn.Module()
        blocks = [SiglipEncoderLayer(vision) for _ in range(config.num_vit_blocks)]
        for block in blocks:
            block.self_attn = PackedSiglipAttention(block.self_attn)
        self.encoder.layers = nn.ModuleList(blocks)
        self.post_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)


class Connector(nn.Module):
    """The tower's features (P, C) to the decoder's width (P, H)."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        wide = config.llm_config.hidden_size
        self.fc1 = nn.Linear(config.vit_config.hidden_size, wide)
        self.activation_fn = ACT2FN[config.connector_act]
        self.fc2 = nn.Linear(wide, wide)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.fc2(self.activation_fn(self.fc1(features)))
        return projected


class PositionTable(nn.Module):
    """Sines and cosines of rows and columns, (side², H); stored, but not trained."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.pos_embed = nn.Parameter(torch.empty(side**2, width), requires_grad=False)

    def forward(self, places: Tensor) -> Tensor:
        return self.pos_embed[places]

    def first_value(self, name: str) -> Tensor:
        """What a parameter begins with."""
        return torch.from_numpy(position_table(self.pos_embed.shape[1], self.side))[0]


class ToLatents(nn.Linear):
    """What the decoder says of a latent patch: its velocity. At first nothing."""

    def first_value(self, name: str) -> Tensor:
        """What a parameter begins with."""
        return torch.zeros_like(self.get_parameter(name), dtype=torch.float32, device="cpu")


class BagelModel(nn.Module):
    """All of Bagel but the language model's head."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        width = config.llm_config.hidden_size
        self.language_model = MixedDecoder(config)
        self.vision_tower = SiglipTower(config)
        self.connector = Connector(config)
        self.vit_pos_embed = PositionTable(config.vit_max_num_patch_per_side, width)
        self.time_embedder = TimeEmbedder(width)
        self.vae2llm = nn.Linear(config.latent_dim, width)
        self.llm2vae = ToLatents(width, config.latent_dim)
        self.latent_pos_embed = PositionTable(config.max_latent_size, width)


class BagelForConditionalGeneration(PreTrainedModel):
    """The network in transformers' frame, for files and configuration; `bagel.model` runs it."""

    config_class = BagelConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: BagelConfig) -> None:
        super().__init__(config)
        self.model = BagelModel(config)
        text = config.llm_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.language_model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.model.language_model.embed_tokens = value


register_checkpoint_conversion_mapping(
    BagelConfig.model_type,
    [
        WeightRenaming(source_patterns=f"^{published}", target_patterns=own)
        for own, published in STORED_PREFIXES[BagelConfig.model_type]
    ],
    overwrite=True,
)
