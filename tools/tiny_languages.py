"""config.json of a tiny model of each language family, which make_tiny_model.py writes."""

from typing import Any

_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_SHARED = {"shared_expert_intermediate_size": 128}
_DELTA = {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 48,
    "linear_conv_kernel_dim": 4,
}
_QUARTER = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}

LANGUAGES: dict[str, dict[str, Any]] = {
    "dots1": {
        "architectures": ["Dots1ForCausalLM"],
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 128,
        "sliding_window": None,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        **_EXPERTS,
        **_SHARED,
    },
    "qwen3_5_moe_text": {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "rope_parameters": _QUARTER,
        **_EXPERTS,
        **_SHARED,
        **_DELTA,
    },
    "qwen3_5_text": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "rope_parameters": _QUARTER,
        **_DELTA,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **_EXPERTS,
    },
    "qwen3_next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "rope_parameters": _QUARTER,
        "full_attention_interval": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **_EXPERTS,
        **_SHARED,
        **_DELTA,
    },
}
"""What each adds to the tiny Qwen3's config.json; keys are model types."""


def language_config(kind: str, qwen3: dict[str, Any]) -> dict[str, Any]:
    """config.json of a family, from the tiny Qwen3's."""
    config = qwen3 | LANGUAGES[kind] | {"model_type": kind}
    if kind in ("mixtral", "qwen2", "qwen2_moe"):  # their heads are hidden_size / heads wide
        del config["head_dim"]
        config["num_attention_heads"], config["num_key_value_heads"] = 6, 2
    return config
