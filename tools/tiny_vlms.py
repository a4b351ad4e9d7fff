"""Small files of tiny Qwen2.5-VL, InternVL, LLaVA-OneVision and LLaVA-OneVision-1.5 folders, which
make_tiny_model.py writes."""

from typing import Any

SIDE = 32  # pixels of an InternVL's tile: 16 patches, 4 tokens
INTERNVL_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {{- '<|image_pad|>\\n' if part.type == 'image' else part.text -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
ONEVISION_TEMPLATE = INTERNVL_TEMPLATE.replace(
    "'<|image_pad|>\\n' if part.type == 'image' else part.text",
    "'<|image_pad|>\\n' if part.type == 'image' else "
    "'<|video_pad|>\\n' if part.type == 'video' else part.text",
)
_QWEN2 = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}


def qwen2_5_vl_config(ids: dict[str, int], vocab_size: int) -> dict[str, Any]:
    """config.json as published: all of the text on top. Of the tower's four blocks one attends to
    whole images, the others within windows of 2 x 2 tokens."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vocab_size": vocab_size,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        **_QWEN2,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [12, 10, 10]},
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 192,
            "window_size": 32,
            "fullatt_block_indexes": [3],
            "tokens_per_second": 2,
        },
    }


def qwen2_5_vl_images(images: dict[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json as published: bounds on pixels stand on top."""
    images = images | {"processor_class": "Qwen2_5_VLProcessor"}
    size = images.pop("size")
    return images | {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}


def qwen2_5_vl_videos(images: dict[str, Any]) -> dict[str, Any]:
    """video_preprocessor_config.json as transformers writes it, with small bounds on a frame."""
    return images | {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "size": {"shortest_edge": 1024, "longest_edge": 4096},
        "do_sample_frames": True,
        "fps": 2,
    }


def internvl_files(ids: dict[str, int], vocab_size: int) -> dict[str, Any]:
    """config.json and what its processor reads; the tokenizer names the borders of an image."""
    text = {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        **_QWEN2,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0},
    }
    tower = {
        "model_type": "internvl_vision",
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 2,
        "attention_bias": True,
        "image_size": [SIDE, SIDE],
        "patch_size": [8, 8],
    }
    size = {"height": SIDE, "width": SIDE}
    return {
        "config.json": {
            "architectures": ["InternVLForConditionalGeneration"],
            "model_type": "internvl",
            "text_config": text,
            "vision_config": tower,
            "image_token_id": ids["<|image_pad|>"],
            "image_seq_length": 4,
            "tie_word_embeddings": True,
        },
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "processor_class": "InternVLProcessor",
            "size": size,
            "max_patches": 4,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "InternVLVideoProcessor",
            "size": size,
        },
    }


def internvl_tokens() -> dict[str, str]:
    """What tokenizer_config.json's extra_special_tokens call the tokens of images."""
    return {
        "start_image_token": "<|vision_start|>",
        "end_image_token": "<|vision_end|>",
        "context_image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }


def onevision1_5_config(ids: dict[str, int], text: dict[str, Any]) -> dict[str, Any]:
    """config.json of a LLaVA-OneVision-1.5 as published; text is a Qwen3's."""
    rope = text.pop("rope_parameters")
    return {
        "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
        "model_type": "llavaonevision1_5",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "tie_word_embeddings": True,
        "text_config": text
        | {
            "model_type": "LLaVAOneVision1_5_text",
            "eos_token_id": ids["<|im_end|>"],
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None,
        },
        "vision_config": {
            "model_type": "rice_vit",
            "depth": 4,
            "embed_dim": 128,
            "hidden_size": 128,
            "hidden_act": "gelu",
            "intermediate_size": 512,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "layer_norm_eps": 1e-05,
            "text_hidden_size": 192,
        },
    }


def onevision_files(ids: dict[str, int], vocab_size: int, tower: dict[str, Any]) -> dict[str, Any]:
    """config.json of a LLaVA-OneVision with up to 2 x 2 tiles, and what its processor reads."""
    text = {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        **_QWEN2,
        "rope_theta": 10000.0,
    }
    resolutions = [[SIDE * rows, SIDE * cols] for rows in (1, 2) for cols in (1, 2)]
    half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    size = {"height": SIDE, "width": SIDE}
    ratio = "anyres_max_3"
    return {
        "config.json": {
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "model_type": "llava_onevision",
            "text_config": text,
            "vision_config": {
                **tower,
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
            },
            "image_token_index": ids["<|image_pad|>"],
            "video_token_index": ids["<|video_pad|>"],
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": resolutions,
            "vision_aspect_ratio": ratio,
            "tie_word_embeddings": True,
        },
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "num_image_tokens": (SIDE // 8) ** 2,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": ratio,
        },
        "preprocessor_config.json": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "size": size,
            "image_grid_pinpoints": resolutions,
            **half,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "size": size,
            "do_sample_frames": True,
            "fps": 1,
            **half,
        },
    }
