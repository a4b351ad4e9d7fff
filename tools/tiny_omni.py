"""Small files of a tiny Qwen2.5-Omni thinker's folder, which make_tiny_model.py writes."""

from pathlib import Path
from typing import Any

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
]
NUM_MELS = 32
TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'image' -%}
                {{- '<|vision_bos|><|IMAGE|><|vision_eos|>' -}}
            {%- elif part.type == 'audio' -%}
                {{- '<|audio_bos|><|AUDIO|><|audio_eos|>' -}}
            {%- elif part.type == 'video' -%}
                {{- '<|vision_bos|><|VIDEO|><|vision_eos|>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception('chat template: unknown content type ' ~ part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ render(message.content) ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def thinker_config(ids: dict[str, int], qwen2_5_vl: dict[str, Any]) -> dict[str, Any]:
    """config.json: the sizes of a tiny Qwen2.5-VL, and an audio tower of four layers that look at
    a third of a second at a time."""
    vision = qwen2_5_vl["vision_config"] | {"model_type": "qwen2_5_omni_vision_encoder"}
    del vision["tokens_per_second"]
    others = ("architectures", "model_type", "vision_config", "rope_scaling")
    text = {
        name: value
        for name, value in qwen2_5_vl.items()
        if name not in others and "vision" not in name and "_token_id" not in name
    }
    return {
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
        "model_type": "qwen2_5_omni_thinker",
        "audio_token_index": ids["<|AUDIO|>"],
        "image_token_index": ids["<|IMAGE|>"],
        "video_token_index": ids["<|VIDEO|>"],
        "audio_start_token_id": ids["<|audio_bos|>"],
        "audio_end_token_id": ids["<|audio_eos|>"],
        "vision_start_token_id": ids["<|vision_bos|>"],
        "vision_end_token_id": ids["<|vision_eos|>"],
        "tie_word_embeddings": True,
        "text_config": text
        | {
            "model_type": "qwen2_5_omni_text",
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "rope_scaling": {
                "rope_type": "default",
                "type": "default",
                "mrope_section": [12, 10, 10],
            },
        },
        "vision_config": vision,
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "num_mel_bins": NUM_MELS,
            "d_model": 128,
            "encoder_layers": 4,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 344,
            "n_window": 16,
            "output_dim": 192,
        },
    }


def preprocessor(images: dict[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json as published: Whisper's settings and those of images in one."""
    return images | {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": NUM_MELS,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 30,
        "n_samples": 480000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "dither": 0.0,
        "return_attention_mask": True,
    }


def media_tokens() -> dict[str, str]:
    """What tokenizer_config.json's extra_special_tokens call the tokens of media."""
    return {
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }


def check(path: Path) -> str:
    """Load the directory as a user would and run one forward pass; what was found."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import (
        AutoConfig,
        AutoProcessor,
        Qwen2_5OmniThinkerForConditionalGeneration,
    )

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(path)
    model = Qwen2_5OmniThinkerForConditionalGeneration._from_config(config)
    processor = AutoProcessor.from_pretrained(path)
    content = [{"type": "audio"}, {"type": "image"}, {"type": "text", "text": "Which digit?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    media = {"audio": [np.zeros(8000)], "images": [Image.new("RGB", (64, 64))]}
    with torch.no_grad():
        logits = model(**processor(text=[text], **media, return_tensors="pt")).logits
    total = sum(p.numel() for p in model.parameters())
    tokens, shape = len(processor.tokenizer), tuple(logits.shape)
    return f"{path}: {total:,} parameters, {tokens} tokens, logits {shape}"
