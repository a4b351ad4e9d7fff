"""config.json of a vision-language model of a SigLIP tower, a fresh projector, a language model.

With a linear or two-layer projector it is transformers' LLaVA; with pixel unshuffle or a resampler
the same with another projector, see `llava_projector`. A SigLIP 2 of one image size is a SigLIP.
"""

from collections.abc import Mapping
from typing import Any, Literal

SiglipProjector = Literal["linear", "mlp", "pixel_unshuffle", "resampler"]

# Features behind the last block but one, as LLaVA takes them: the last is trained for one vector.
FEATURE_LAYER = -2
HEAD_DIM = 128  # of a resampler's heads where H allows, as in Qwen-VL


def siglip_config(
    vision: Mapping[str, Any],
    language: Mapping[str, Any],
    projector: SiglipProjector,
    *,
    vocab_size: int,
    image_token_id: int,
    tied: bool,
    factor: int = 2,
    num_queries: int = 64,
) -> dict[str, Any]:
    """config.json of the new model, from the read ones of a SigLIP and of a text model.

    factor is of pixel_unshuffle, num_queries of a resampler, tied whether embedding and head are
    one. Raises ValueError where the tower has no whole square of patches for them.
    """
    tower = dict(vision.get("vision_config", vision))
    tower |= {"model_type": "siglip_vision_model", "vision_use_head": False}
    tower = {"image_size": 224, "patch_size": 16, "hidden_size": 768} | tower  # SigLIP's defaults
    text = {key: value for key, value in language.items() if key != "architectures"}
    text |= {"vocab_size": vocab_size, "tie_word_embeddings": tied}
    hidden = int(text["hidden_size"])
    own: dict[str, Any] = {"model_type": "llava"}
    if projector in ("linear", "mlp"):
        own["projector_hidden_act"] = "linear" if projector == "linear" else "gelu"
    else:
        settings = {
            "pixel_unshuffle": {"factor": factor},
            "resampler": {"num_queries": num_queries, "num_heads": _num_heads(hidden)},
        }[projector]
        own = {"model_type": "llava_projector", "projector": {"kind": projector} | settings}
    is_stock = own["model_type"] == "llava"
    name = "LlavaForConditionalGeneration" if is_stock else "LlavaProjectorForConditionalGeneration"
    config = {
        "architectures": [name],
        **own,
        "image_token_index": image_token_id,
        "vision_feature_layer": FEATURE_LAYER,
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": tied,
        "text_config": text,
        "vision_config": tower,
    }
    return config | {"image_seq_length": tokens_per_image(config)}


def tokens_per_image(config: Mapping[str, Any]) -> int:
    """Tokens that stand for an image in a model of this config.json."""
    tower, projector = config["vision_config"], config.get("projector", {})
    side = tower["image_size"] // tower["patch_size"]
    if "num_queries" in projector:
        return int(projector["num_queries"])
    return int((side // projector.get("factor", 1)) ** 2)


def siglip_processor(config: Mapping[str, Any], image_token: str) -> dict[str, Any]:
    """processor_config.json for transformers' LlavaProcessor, and for our data."""
    tower = config["vision_config"]
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    return {
        "processor_class": "LlavaProcessor",
        "image_token": image_token,
        "patch_size": tower["patch_size"],
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": tokens_per_image(config) - patches,
    }


def _num_heads(hidden_size: int) -> int:
    """Heads of HEAD_DIM, or wider where they do not fit."""
    fits = [n for n in range(1, hidden_size // HEAD_DIM + 1) if hidden_size % n == 0]
    return max(fits, default=1)
