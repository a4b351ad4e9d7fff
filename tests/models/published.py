"""Published configurations of the families, as far as they say more than their class's defaults.

Each with the number of parameters that the hub counts (those with layers of Gated DeltaNet, and
parts of what the hub counts whole: that stock's configuration gives), and names it stores.
"""

from typing import Any, NamedTuple

ROPE = {"rope_type": "default", "rope_theta": 1_000_000}


class Published(NamedTuple):
    name: str
    config: dict[str, Any]
    parameters: int
    stored: tuple[str, ...]
    """names of tensors that its folder has"""


_QWEN3 = {"head_dim": 128, "rms_norm_eps": 1e-6, "rope_parameters": ROPE}
_MROPE = {"rope_type": "default", "rope_theta": 5_000_000, "mrope_interleaved": True}
_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}

PUBLISHED: dict[str, Published] = {
    "internvl": Published(
        "InternVL3-1B-hf",
        {
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "qwen2",
                "vocab_size": 151674,
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0},
            },
            "vision_config": {"model_type": "internvl_vision", "attention_bias": True},
        },
        938_193_024,
        (
            "vision_tower.encoder.layer.23.lambda_1",
            "vision_tower.embeddings.patch_embeddings.projection.weight",
            "multi_modal_projector.linear_1.weight",
            "language_model.model.layers.23.self_attn.q_proj.bias",
        ),
    ),
    "llava_onevision": Published(
        "llava-onevision-qwen2-7b-ov-hf",
        {
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "qwen2",
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "rope_parameters": ROPE,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 26,
                "num_attention_heads": 16,
                "image_size": 384,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
        8_030_348_832,
        (
            "image_newline",
            "vision_tower.encoder.layers.25.mlp.fc2.bias",
            "multi_modal_projector.linear_2.weight",
            "language_model.model.layers.27.self_attn.q_proj.bias",
            "language_model.lm_head.weight",
        ),
    ),
    "qwen2": Published(
        "Qwen2.5-7B",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        7_615_616_512,
        ("model.layers.27.self_attn.q_proj.bias", "lm_head.weight"),
    ),
    "qwen3": Published(
        "Qwen3-8B",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            **_QWEN3,
        },
        8_190_735_360,
        ("model.layers.35.self_attn.q_norm.weight", "lm_head.weight"),
    ),
    "qwen2_5_vl": Published(
        "Qwen2.5-VL-7B-Instruct",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": False,
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "in_chans": 3,
                "out_hidden_size": 3584,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2,
                "temporal_patch_size": 2,
            },
        },
        8_292_166_656,
        (
            "visual.patch_embed.proj.weight",
            "visual.blocks.31.attn.qkv.bias",
            "visual.merger.mlp.2.weight",
            "model.embed_tokens.weight",
            "model.layers.27.self_attn.q_proj.bias",
            "lm_head.weight",
        ),
    ),
    "qwen2_5_omni_thinker": Published(
        "Qwen2.5-Omni-7B, its thinker",
        {
            "text_config": {
                "model_type": "qwen2_5_omni_text",
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "rope_theta": 1_000_000.0,
                "rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]},
            },
            "vision_config": {
                "model_type": "qwen2_5_omni_vision_encoder",
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "in_channels": 3,
                "out_hidden_size": 3584,
                "patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
            "audio_config": {
                "model_type": "qwen2_5_omni_audio_encoder",
                "d_model": 1280,
                "encoder_layers": 32,
                "encoder_attention_heads": 20,
                "encoder_ffn_dim": 5120,
                "num_mel_bins": 128,
                "n_window": 100,
                "output_dim": 3584,
            },
        },
        8_931_813_888,
        (
            "visual.blocks.31.attn.q.bias",
            "audio_tower.audio_bos_eos_token.weight",
            "audio_tower.layers.31.self_attn.k_proj.weight",
            "audio_tower.proj.weight",
            "model.layers.27.self_attn.q_proj.bias",
            "lm_head.weight",
        ),
    ),
    "qwen3_vl": Published(
        "Qwen3-VL-2B-Instruct",
        {
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "qwen3_vl_text",
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "tie_word_embeddings": True,
                **_QWEN3,
                "rope_parameters": _MROPE | {"mrope_section": [24, 20, 20]},
            },
            "vision_config": _TOWER
            | {
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "out_hidden_size": 2048,
                "deepstack_visual_indexes": [5, 11, 17],
            },
        },
        2_127_532_032,
        ("model.visual.deepstack_merger_list.2.norm.bias", "model.language_model.norm.weight"),
    ),
    "qwen3_moe": Published(
        "Qwen3-30B-A3B",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            **_QWEN3,
        },
        30_532_122_624,
        ("model.layers.47.mlp.experts.127.down_proj.weight", "model.layers.0.mlp.gate.weight"),
    ),
    "qwen2_moe": Published(
        "Qwen1.5-MoE-A2.7B",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "use_sliding_window": False,
        },
        14_315_784_192,
        (
            "model.layers.23.mlp.experts.59.up_proj.weight",
            "model.layers.0.mlp.shared_expert_gate.weight",
        ),
    ),
    "qwen3_next": Published(
        "Qwen3-Next-80B-A3B-Instruct",
        {"rope_parameters": ROPE | {"rope_theta": 10_000_000, "partial_rotary_factor": 0.25}},
        79_674_391_296,
        (
            "model.layers.0.linear_attn.in_proj_qkvz.weight",
            "model.layers.3.self_attn.q_norm.weight",
            "model.layers.47.mlp.experts.511.down_proj.weight",
            "model.layers.0.mlp.shared_expert_gate.weight",
        ),
    ),
    "qwen3_5_text": Published(
        "Qwen3.5-9B, its language model",
        {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}},
        8_953_803_264,
        (
            "model.layers.0.linear_attn.in_proj_qkv.weight",
            "model.layers.31.self_attn.o_proj.weight",
        ),
    ),
    "qwen3_5_moe_text": Published(
        "Qwen3.5-35B-A3B, its language model",
        {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}},
        34_660_610_688,
        ("model.layers.0.linear_attn.A_log", "model.layers.39.mlp.shared_expert.up_proj.weight"),
    ),
    "mixtral": Published(
        "Mixtral-8x7B-v0.1",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
        46_702_792_704,
        ("model.layers.31.block_sparse_moe.experts.7.w2.weight",),
    ),
    "qwen3_vl_moe": Published(
        "Qwen3-VL-30B-A3B-Instruct",
        {
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "qwen3_vl_moe_text",
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                **_QWEN3,
                "rope_parameters": _MROPE | {"mrope_section": [24, 20, 20]},
            },
            "vision_config": _TOWER | {"out_hidden_size": 2048},
        },
        31_070_754_032,
        ("model.language_model.layers.0.mlp.experts.gate_up_proj",),
    ),
}
