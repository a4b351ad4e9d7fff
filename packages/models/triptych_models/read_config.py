"""config.json of a model directory, refused where we would not compute what it says."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN

from .catalogue import THINKER_OF
from .foreign_config import read_foreign
from .layout import text_config


def read_config(
    path: Path, model_type: str, rope_types: tuple[str, ...] = ("default",)
) -> PretrainedConfig:
    """Read config.json; ValueError unless it is of model_type and packed rows can be exact.

    That takes plain rotary positions, no dropout in attention and no sliding window.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"model.path: must hold a config.json, got {path}; name a model directory")
    read_foreign(file)
    # What values of a wrong kind make transformers raise is of any kind.
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{file}: must be a configuration that transformers reads without code of the folder, "
            f"got {type(error).__name__}: {reason}; download it again"
        ) from error
    if THINKER_OF.get(config.model_type) == model_type:
        config = config.thinker_config
    if config.model_type != model_type:
        raise ValueError(
            f"{file}: model_type must be {model_type}, got {config.model_type}; "
            "set model.family to what the directory holds"
        )
    text = text_config(config)
    activation = getattr(text, "hidden_act", "silu")
    if activation not in ACT2FN:
        raise ValueError(
            f"{file}: hidden_act must be an activation of transformers, got {activation!r}; "
            "download it again"
        )
    where = f"{file}: {'' if text is config else 'text_config.'}"
    if text.rope_parameters["rope_type"] not in rope_types:
        raise ValueError(
            f"{where}rope_parameters.rope_type must be {' or '.join(rope_types)}, got "
            f"{text.rope_parameters['rope_type']}; scaled rotary positions are not supported"
        )
    if text.attention_dropout:
        raise ValueError(
            f"{where}attention_dropout must be 0, got {text.attention_dropout}; "
            "packed attention has no dropout"
        )
    switch = "use_sliding_window" if hasattr(text, "use_sliding_window") else "sliding_window"
    layers = getattr(text, "layer_types", None) if switch == "sliding_window" else None
    is_used = layers is None or "sliding_attention" in layers
    if is_used and (window := getattr(text, switch, None)):
        raise ValueError(
            f"{where}{switch} must be false or null, got {window}; "
            "packed attention looks at whole documents"
        )
    return config


def check_values(
    kind: str, values: Iterable[tuple[str, Any, tuple[Any, ...]]], remedy: str
) -> None:
    """Raise ValueError unless each value of config.json (name, given, wanted) is one of those that
    a model of this kind is computed with."""
    for name, given, wanted in values:
        if given not in wanted:
            words = " or ".join(map(str, wanted))
            raise ValueError(
                f"model.path: config.json's {name} must be {words} for {kind}, got {given}; "
                f"{remedy}"
            )
