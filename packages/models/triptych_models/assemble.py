"""A model of parts: one model's vision tower, a fresh projector, another's language model.

With a Qwen3-VL's tower the result is a stock architecture. In text the three rotary axes are alike,
so that a Qwen3 goes on as it was: its logits on text are its own. Features come in by way of
Qwen3-VL's merger: m x m patches side by side in one vector, LayerNorm, two layers with GELU between
them. With a SigLIP's tower see `assemble_siglip`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from .llava_projector import LlavaProjectorForConditionalGeneration
from .weights import initial_value, own_parameters

Projector = Literal["pixel_unshuffle", "mlp"]
TextIds = Mapping[str, int]

_LANGUAGE = "model.language_model."
_TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")
# What Qwen3 and Qwen3-VL's text_config both say; the rest is the rotary embedding's.
_TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "rms_norm_eps"),
    *("attention_dropout", "max_position_embeddings", "initializer_range", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


class Layout(NamedTuple):
    """How a family names its tensors: the tower's, as in its own folder, and what is drawn."""

    hf_class: type[PreTrainedModel]
    tower: str
    stored_tower: str
    projector: tuple[str, ...]


_PROJECTOR = ("model.multi_modal_projector.",)
LAYOUTS = {
    "qwen3_vl": Layout(
        Qwen3VLForConditionalGeneration,
        "model.visual.",
        "model.visual.",
        ("model.visual.merger.", "model.visual.deepstack_merger_list."),
    ),
    "llava": Layout(LlavaForConditionalGeneration, "model.vision_tower.", "", _PROJECTOR),
    "llava_projector": Layout(
        LlavaProjectorForConditionalGeneration, "model.vision_tower.", "", _PROJECTOR
    ),
}


class Source(NamedTuple):
    """Where a tensor of the new model comes from: a stored one, rows added to it, or a draw."""

    name: str
    shape: tuple[int, ...]
    part: Literal["vision", "language", "drawn"]
    stored: str
    value: Tensor | None
    """fp32, of what is drawn."""


def vlm_config(
    vision: Any, language: Any, projector: Projector, *, vocab_size: int, token_ids: TextIds
) -> dict[str, Any]:
    """config.json of the new model, from the read ones of a Qwen3-VL and a Qwen3.

    token_ids has image_token_id, video_token_id, vision_start_token_id, vision_end_token_id.
    pixel_unshuffle keeps the tower's spatial_merge_size, mlp takes every patch by itself. Raises
    ValueError if DeepStack taps more blocks than there are language layers.
    """
    tower = vision.vision_config.to_dict()
    tower["out_hidden_size"] = language.hidden_size
    if projector == "mlp":
        tower["spatial_merge_size"] = 1
    taps, layers = len(tower["deepstack_visual_indexes"]), language.num_hidden_layers
    if taps > layers:
        raise ValueError(
            f"--language: must have a layer for each of the tower's {taps} DeepStack features, got "
            f"{layers} layers; take a deeper one"
        )
    text = {key: getattr(language, key) for key in _TEXT} | {"vocab_size": vocab_size}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": language.rope_parameters["rope_theta"],
        "mrope_interleaved": True,
        "mrope_section": mrope_section(language.head_dim),
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=tower,
        architectures=["Qwen3VLForConditionalGeneration"],
        tie_word_embeddings=language.tie_word_embeddings,
        **token_ids,
    )
    return dict(config.to_diff_dict())


def mrope_section(head_dim: int) -> list[int]:
    """Frequencies of time, height and width: Qwen3-VL's 24, 20, 20 of 64, in proportion."""
    half = head_dim // 2
    space = half * 20 // 64
    return [half - 2 * space, space, space]


def sources(config: dict[str, Any], seed: int) -> Iterator[Source]:
    """Every tensor of the model of `config`, in its order; the projector's are drawn from seed."""
    layout = LAYOUTS[config["model_type"]]
    with torch.device("meta"):
        hf = layout.hf_class._from_config(AutoConfig.for_model(**config))
    hf.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    std = getattr(hf.config.vision_config, "initializer_range", 0.02)  # SigLIP's does not say it
    for module, own in own_parameters(hf):
        for name, parameter in own.items():
            shape = tuple(parameter.shape)
            if name.startswith(layout.projector):
                value = initial_value(module, name, torch.empty(shape), std, generator)
                yield Source(name, shape, "drawn", "", value)
            else:
                yield _stored(name, shape, layout)


def _stored(name: str, shape: tuple[int, ...], layout: Layout) -> Source:
    if name.startswith(layout.tower):
        stored = layout.stored_tower + name.removeprefix(layout.tower)
        return Source(name, shape, "vision", stored, None)
    return Source(name, shape, "language", name.replace(_LANGUAGE, "model."), None)


def missing_rows(source: Source, stored_shape: Sequence[int]) -> int:
    """Rows to add to a stored tensor: to embedding and head, for tokens that it did not know.

    Raises ValueError if the shapes differ otherwise.
    """
    added = source.shape[0] - stored_shape[0]
    grows = source.name in _TABLES and added >= 0
    if source.shape[1:] != tuple(stored_shape[1:]) or (added and not grows):
        raise ValueError(
            f"--{source.part}: {source.stored} must have the shape {list(source.shape)} that its "
            f"config.json says, got {list(stored_shape)}; take all files from one model"
        )
    return added
