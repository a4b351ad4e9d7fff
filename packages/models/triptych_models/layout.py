"""Where things lie in a transformers model: the same question has another answer per family."""

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel


def decoder(hf: PreTrainedModel) -> Any:
    """The language model: embed_tokens, rotary_emb, layers and norm."""
    return getattr(hf.model, "language_model", hf.model)


def tower(hf: PreTrainedModel) -> Any:
    """The vision tower, or None in a model of text alone."""
    return getattr(hf.model, "visual", None)


def text_config(config: PretrainedConfig) -> Any:
    """The section on the language model; the config itself in a model of text alone."""
    return getattr(config, "text_config", config)
