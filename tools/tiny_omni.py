"""Small files of tiny omni thinkers' and Aero's folders, which make_tiny_model.py writes."""

from pathlib import Path
from typing import Any

from tiny_tokenizer import chat_template

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
MORE_TOKENS = ["<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"]  # Qwen3-Omni's, beside Qwen3's
NUM_MELS = 32
TEMPLATE = chat_template(
    {
        "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
        "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
        "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
    }
)


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


def qwen3_config(ids: dict[str, int], qwen3_vl: dict[str, Any]) -> dict[str, Any]:
    """config.json: a tiny Qwen3-VL's sizes, four experts in every layer but the last, and an audio
    tower of four layers that look at two seconds at a time."""
    text = qwen3_vl["text_config"] | {
        "model_type": "qwen3_omni_moe_text",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "mlp_only_layers": [3],
    }
    del text["tie_word_embeddings"]
    return {
        "architectures": ["Qwen3OmniMoeThinkerForConditionalGeneration"],
        "model_type": "qwen3_omni_moe_thinker",
        **{name: value for name, value in qwen3_vl.items() if name.endswith("_token_id")},
        "audio_token_id": ids["<|audio_pad|>"],
        "audio_start_token_id": ids["<|audio_start|>"],
        "audio_end_token_id": ids["<|audio_end|>"],
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": qwen3_vl["vision_config"]
        | {"model_type": "qwen3_omni_moe_vision_encoder"},
        "audio_config": {
            "model_type": "qwen3_omni_moe_audio_encoder",
            "num_mel_bins": NUM_MELS,
            "d_model": 128,
            "encoder_layers": 4,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 344,
            "n_window": 50,
            "n_window_infer": 200,
            "downsample_hidden_size": 32,
            "output_dim": 192,
        },
    }


def aero_config(omni: dict[str, Any]) -> dict[str, Any]:
    """config.json: the text of a tiny Qwen2.5-Omni, and a tower of four layers over 3 seconds."""
    audio = {k: v for k, v in omni["audio_config"].items() if k not in ("n_window", "output_dim")}
    text = {k: v for k, v in omni["text_config"].items() if k != "rope_scaling"}
    own = {"model_type": "qwen2_audio_encoder", "max_source_positions": 150}
    return {
        "architectures": ["AeroForConditionalGeneration"],
        "model_type": "aero",
        "audio_token_index": omni["audio_token_index"],
        "text_config": text | {"model_type": "qwen2"},
        "audio_config": audio | own,
    }


def aero_template() -> str:
    """The same template without the tokens around a recording, which an Aero's has not."""
    return TEMPLATE.replace("<|audio_bos|><|AUDIO|><|audio_eos|>", "<|AUDIO|>\\n")


def check_aero(path: Path) -> str:
    """Load the directory as a user would and run one forward pass; what was found."""
    import torch
    from transformers import AutoConfig, AutoModelForMultimodalLM, AutoTokenizer

    import triptych_models.aero  # noqa: F401  which makes it known

    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(AutoConfig.from_pretrained(path))
    tokenizer = AutoTokenizer.from_pretrained(path)
    frames, mask = torch.zeros(1, NUM_MELS, 300), torch.zeros(1, 300, dtype=torch.int64)
    mask[:, :40] = 1
    ids = tokenizer("<|AUDIO|>" * 10 + "Which digit?", return_tensors="pt")
    with torch.no_grad():
        logits = model(**ids, input_features=frames, feature_attention_mask=mask).logits
    total = sum(p.numel() for p in model.parameters())
    shape = tuple(logits.shape)
    return f"{path}: {total:,} parameters, {len(tokenizer)} tokens, logits {shape}"


def preprocessor(images: dict[str, Any], seconds: int = 30) -> dict[str, Any]:
    """preprocessor_config.json as published: Whisper's settings and those of images in one."""
    return images | {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": NUM_MELS,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": seconds,
        "n_samples": 16000 * seconds,
        "nb_max_frames": 100 * seconds,
        "padding_side": "right",
        "padding_value": 0.0,
        "dither": 0.0,
        "return_attention_mask": True,
    }


def qwen3_tokens() -> dict[str, str]:
    """What a Qwen3-Omni's tokenizer_config.json calls the tokens of media."""
    return {
        "image_token": "<|image_pad|>",
        "audio_token": "<|audio_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
    }


def qwen3_template() -> str:
    """The same template with a Qwen3-Omni's tokens."""
    template = TEMPLATE
    for name, token in media_tokens().items():
        template = template.replace(token, qwen3_tokens()[name])
    return template


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
    from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(AutoConfig.from_pretrained(path))
    processor = AutoProcessor.from_pretrained(path)
    content = [{"type": "audio"}, {"type": "image"}, {"type": "text", "text": "Which digit?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    media = {"audio": [np.zeros(8000)], "images": [Image.new("RGB", (64, 64))]}
    with torch.no_grad():
        logits = model(**processor(text=[text], **media, return_tensors="pt")).logits
    total = sum(p.numel() for p in model.parameters())
    tokens, shape = len(processor.tokenizer), tuple(logits.shape)
    return f"{path}: {total:,} parameters, {tokens} tokens, logits {shape}"
