"""Where things lie in a transformers model: the same question has another answer per family."""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

Score = Literal["softmax", "sigmoid"]


def decoder(hf: PreTrainedModel) -> Any:
    """The language model: embed_tokens, rotary_emb, layers and norm."""
    return getattr(hf.model, "language_model", hf.model)


def tower(hf: PreTrainedModel) -> Any:
    """The vision tower, or None in a model of text alone."""
    return getattr(hf.model, "visual", getattr(hf.model, "vision_tower", None))


def ear(hf: PreTrainedModel) -> Any:
    """The audio tower, or None in a model that does not hear."""
    return getattr(hf.model, "audio_tower", None)


def text_config(config: PretrainedConfig) -> Any:
    """The section on the language model; the config itself in a model of text alone."""
    return getattr(config, "text_config", config)


def head_dim(text: Any) -> int:
    """Width of an attention head, where the language model's section does not say it, too."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


class MixtureShape(NamedTuple):
    """Of the sparse layers of a mixture of experts; 0 is the width of a shared expert not there.

    In DeepSeek-V3's kind (arXiv 2412.19437) scores are sigmoids, experts are chosen by
    score + bias, and what the shared expert gives counts whole; else scores are a softmax.
    """

    num_experts: int
    top_k: int
    width: int
    normalize: bool  # the chosen experts' weights sum up to 1
    shared_width: int
    score: Score = "softmax"
    scale: float = 1.0  # of the chosen experts' weights

    @property
    def has_bias(self) -> bool:
        """Whether experts are chosen by score + bias."""
        return self.score == "sigmoid"

    @property
    def has_shared_gate(self) -> bool:
        """Whether what the shared expert gives is weighted."""
        return self.shared_width > 0 and self.score == "softmax"


def experts_key(text: Any) -> str:
    """Where the language model's section has the number of experts."""
    return "n_routed_experts" if hasattr(text, "n_routed_experts") else "num_experts"


def mixture_shape(text: Any) -> MixtureShape:
    """What the language model's section says of experts."""
    if experts_key(text) == "n_routed_experts":
        return MixtureShape(
            text.n_routed_experts,
            text.num_experts_per_tok,
            text.moe_intermediate_size,
            text.norm_topk_prob,
            text.n_shared_experts * text.moe_intermediate_size,
            "sigmoid",
            text.routed_scaling_factor,
        )
    return MixtureShape(
        text.num_experts,
        text.num_experts_per_tok,
        getattr(text, "moe_intermediate_size", None) or text.intermediate_size,
        getattr(text, "norm_topk_prob", True),
        getattr(text, "shared_expert_intermediate_size", 0),
    )


class StoredExperts(NamedTuple):
    """How a family's directories hold a layer's experts.

    block is the sparse block's name in a layer. Experts are one by one, under these names, or all
    stacked in one tensor, (E, 2F, H) and (E, H, F), or of transposed matrices.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    is_stacked: bool = False
    is_transposed: bool = False


Prefixes = tuple[tuple[str, str], ...]

# How names of tensors begin: in transformers' modules, and in published folders (by which
# transformers 5 reads and writes them: conversion_mapping.py).
_LLAVA = (
    ("model.language_model.", "language_model.model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
_QWEN = (("model.visual.", "visual."), ("model.language_model.", "model."))
_OMNI = (("model.audio_tower.", "audio_tower."), *_QWEN)
STORED_PREFIXES: dict[str, Prefixes] = {
    "bagel": (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vit_model.vision_model."),
        *(
            (f"model.{name}.", f"{name}.")
            for name in (
                "connector",
                "vit_pos_embed",
                "time_embedder",
                "vae2llm",
                "llm2vae",
                "latent_pos_embed",
            )
        ),
    ),
    "aero": (
        ("model.language_model.", "language_model.model."),
        ("model.audio_tower.", "audio_tower."),
        ("model.multi_modal_projector.", "audio_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "internvl": (*_LLAVA, ("model.vision_tower.", "vision_tower.")),
    "llava_onevision": (
        *_LLAVA,
        ("model.vision_tower.", "vision_tower."),
        ("model.image_newline", "image_newline"),
    ),
    "llavaonevision1_5": (
        ("model.visual.class_token.embedding", "visual.class_embedding"),
        ("model.visual.class_token.angles", "visual.class_pos_emb"),
        *_QWEN,
    ),
    "qwen2_5_omni_thinker": _OMNI,
    "qwen2_5_vl": _QWEN,
    "qwen3_omni_moe_thinker": _OMNI,
}
_OLD_TOWER = "vision_tower.vision_model."  # as transformers 4 wrote it
_THINKER = "thinker."  # before the names in a folder that speaks, too


def stored_prefixes(config: PretrainedConfig, stored: Collection[str]) -> Prefixes:
    """What to rename for a folder of these tensors: nothing where it has the modules' names."""
    pairs = STORED_PREFIXES.get(config.model_type, ())
    if any(name.startswith(_THINKER) for name in stored):
        return tuple((own, _THINKER + name) for own, name in (*pairs, ("lm_head.", "lm_head.")))
    if any(name.startswith(_OLD_TOWER) for name in stored):
        pairs = tuple((own, name.replace("vision_tower.", _OLD_TOWER)) for own, name in pairs)
    is_own = any(name.startswith(own) for name in stored for own, _ in pairs)
    return () if is_own else pairs


def stored_name(name: str, prefixes: Prefixes) -> str:
    """A tensor's name in a folder."""
    for own, published in prefixes:
        if name.startswith(own):
            return published + name.removeprefix(own)
    return name
