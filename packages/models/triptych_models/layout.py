"""Where things lie in a transformers model: the same question has another answer per family."""

from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedModel


def decoder(hf: PreTrainedModel) -> Any:
    """The language model: embed_tokens, rotary_emb, layers and norm."""
    return getattr(hf.model, "language_model", hf.model)


def tower(hf: PreTrainedModel) -> Any:
    """The vision tower, or None in a model of text alone."""
    return getattr(hf.model, "visual", getattr(hf.model, "vision_tower", None))


def text_config(config: PretrainedConfig) -> Any:
    """The section on the language model; the config itself in a model of text alone."""
    return getattr(config, "text_config", config)


def head_dim(text: Any) -> int:
    """Width of an attention head, where the language model's section does not say it, too."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


class MixtureShape(NamedTuple):
    """Of the sparse layers of a mixture of experts; 0 is the width of a shared expert not there."""

    num_experts: int
    top_k: int
    width: int
    normalize: bool  # the chosen experts' weights sum up to 1
    shared_width: int


def mixture_shape(text: Any) -> MixtureShape:
    """What the language model's section says of experts."""
    return MixtureShape(
        text.num_experts,
        text.num_experts_per_tok,
        getattr(text, "moe_intermediate_size", text.intermediate_size),
        getattr(text, "norm_topk_prob", True),
        getattr(text, "shared_expert_intermediate_size", 0),
    )


class StoredExperts(NamedTuple):
    """How a family's directories hold a layer's experts.

    block is the sparse block's name in a layer. Experts are one by one, under these names, or all
    stacked in one tensor of transposed matrices: (E, H, 2F) and (E, F, H).
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    is_stacked: bool = False
