"""Small files of a tiny Bagel folder, which make_tiny_model.py writes."""

from typing import Any

from tiny_vlms import _QWEN2 as QWEN2
from tiny_vlms import qwen2_5_vl_images


def bagel_files(ids: dict[str, int], vocab_size: int, images: dict[str, Any]) -> dict[str, Any]:
    """config.json as published, and preprocessor_config.json, which the published folder lacks.

    Latents are those of tools/make_digit_latents.py: 8 x 8 values of one channel.
    """
    text = {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        **QWEN2,
        "rope_theta": 10000.0,
        "qk_norm": True,
        "layer_module": "Qwen2MoTDecoderLayer",
        "tie_word_embeddings": False,
    }
    tower = {
        "model_type": "siglip_vision_model",
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_attention_heads": 2,
        "image_size": 128,
        "patch_size": images["patch_size"],
    }
    return {
        "config.json": {
            "architectures": ["BagelForConditionalGeneration"],
            "model_type": "bagel",
            "llm_config": text,
            "vit_config": tower,
            "vae_config": {"downsample": 1, "z_channels": 1},
            "latent_patch_size": 2,
            "max_latent_size": 4,
            "vit_max_num_patch_per_side": 128 // images["patch_size"],
            "text_start_token_id": ids["<|im_start|>"],
            "text_end_token_id": ids["<|im_end|>"],
            "image_token_id": ids["<|image_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        },
        "preprocessor_config.json": qwen2_5_vl_images(images)
        | {"processor_class": "Qwen2VLProcessor", "merge_size": 1, "temporal_patch_size": 1},
    }
