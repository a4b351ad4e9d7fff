"""Every model family in one dict: where its class is, what of it trains, where it was run.

Imports no torch: configurations are validated by it before torch is.
"""

from typing import Literal, NamedTuple

Part = Literal["vision", "audio", "projector", "language", "generation", "router", "experts"]
Stage = Literal["align", "pretrain", "sft", "moe"]

_LANGUAGE: tuple[Part, ...] = ("language",)
_MIXTURE: tuple[Part, ...] = ("language", "router", "experts")
_SEEING: tuple[Part, ...] = ("vision", "projector", "language")
_HEARING: tuple[Part, ...] = ("audio", "projector", "language")
_OMNI: tuple[Part, ...] = ("vision", "audio", "projector", "language")
_OMNI_MIXTURE: tuple[Part, ...] = (*_OMNI, "router", "experts")
_SEEING_MIXTURE: tuple[Part, ...] = ("vision", "projector", "language", "router", "experts")


class Family(NamedTuple):
    """What there is to know of a family before its class is imported."""

    implementation: str
    """module:class, of a `packed.PackedModel`"""
    parts: tuple[Part, ...]
    """that can be frozen, and have learning rates of their own"""
    stages: tuple[Stage, ...]
    sizes: str
    """published ones that its configuration covers"""
    ran: str
    """where it was trained, and at what size; every family is tested tiny on CPUs"""
    has_bias: bool = False
    """whether experts are chosen by score + bias"""


FAMILIES: dict[str, Family] = {
    "aero": Family(
        "triptych_models.aero:Aero",
        _HEARING,
        ("align", "pretrain", "sft"),
        "Aero-1-Audio 1.5B (recordings of up to 30 seconds)",
        "1.5B on one H200",
    ),
    "bagel": Family(
        "triptych_models.bagel.model:Bagel",
        (*_SEEING, "generation"),
        ("pretrain", "sft"),
        "7B-MoT (with latents of FLUX's autoencoder, kept before)",
        "10 of 7B-MoT's 28 layers on one H200",
    ),
    "dots1": Family(
        "triptych_models.dots1:Dots1",
        _MIXTURE,
        ("pretrain", "sft", "moe"),
        "dots.llm1 142B-A14B, and what is upcycled with a shared expert",
        "tiny on CPUs",
        has_bias=True,
    ),
    "internvl": Family(
        "triptych_models.internvl:InternVL",
        _SEEING,
        ("align", "pretrain", "sft"),
        "InternVL3 and 3.5: 1B, 2B, 8B, 14B, 38B (folders ending in -hf)",
        "3-2B on one H200",
    ),
    "llava": Family(
        "triptych_models.llava:Llava",
        _SEEING,
        ("align", "pretrain", "sft"),
        "any SigLIP before a Qwen3, Qwen2 or Llama, assembled",
        "tiny on CPUs",
    ),
    "llava_onevision": Family(
        "triptych_models.llava_onevision:LlavaOnevision",
        _SEEING,
        ("align", "pretrain", "sft"),
        "LLaVA-OneVision: 0.5B, 7B, 72B (folders ending in -hf)",
        "7B on one H200",
    ),
    "llavaonevision1_5": Family(
        "triptych_models.llava_onevision1_5:LlavaOnevision15",
        _SEEING,
        ("align", "pretrain", "sft"),
        "LLaVA-OneVision-1.5: 4B, 8B (images)",
        "4B on one H200",
    ),
    "llava_projector": Family(
        "triptych_models.llava_projector:LlavaProjector",
        _SEEING,
        ("align", "pretrain", "sft"),
        "any SigLIP before a Qwen3, Qwen2 or Llama, assembled",
        "tiny on CPUs",
    ),
    "mixtral": Family(
        "triptych_models.mixtral:Mixtral",
        _MIXTURE,
        ("pretrain", "sft", "moe"),
        "8x7B, 8x22B",
        "tiny on CPUs",
    ),
    "qwen2": Family(
        "triptych_models.qwen2:Qwen2",
        _LANGUAGE,
        ("pretrain", "sft"),
        "0.5B, 1.5B, 3B, 7B, 14B, 32B, 72B (2 and 2.5)",
        "2.5-1.5B on one H200",
    ),
    "qwen2_5_omni_thinker": Family(
        "triptych_models.qwen2_5_omni:Qwen2_5Omni",
        _OMNI,
        ("align", "pretrain", "sft"),
        "2.5-Omni 3B, 7B, the thinker (text, images, videos, sound)",
        "3B on one H200",
    ),
    "qwen2_5_vl": Family(
        "triptych_models.qwen2_5_vl:Qwen2_5VL",
        _SEEING,
        ("align", "pretrain", "sft"),
        "3B, 7B, 32B, 72B",
        "3B on one H200",
    ),
    "qwen2_moe": Family(
        "triptych_models.qwen2_moe:Qwen2MoE",
        _MIXTURE,
        ("pretrain", "sft", "moe"),
        "A2.7B, 57B-A14B",
        "tiny on CPUs",
    ),
    "qwen3": Family(
        "triptych_models.qwen3:Qwen3",
        _LANGUAGE,
        ("pretrain", "sft"),
        "0.6B, 1.7B, 4B, 8B, 14B, 32B",
        "0.6B, 1.7B and 4B on one H100; 1.7B on two H200",
    ),
    "qwen3_5": Family(
        "triptych_models.qwen3_5_vl:Qwen35VL",
        _SEEING,
        ("align", "pretrain", "sft"),
        "0.8B, 9B, 27B, as published",
        "12 of 9B's 32 layers on one H200",
    ),
    "qwen3_5_moe": Family(
        "triptych_models.qwen3_5_vl:Qwen35VLMoE",
        _SEEING_MIXTURE,
        ("align", "pretrain", "sft", "moe"),
        "35B-A3B, 397B-A17B, as published",
        "tiny on CPUs",
    ),
    "qwen3_5_moe_text": Family(
        "triptych_models.qwen3_5_moe:Qwen35MoE",
        _MIXTURE,
        ("pretrain", "sft", "moe"),
        "35B-A3B, its language model",
        "4 of 35B-A3B's 40 layers on one H200",
    ),
    "qwen3_5_text": Family(
        "triptych_models.qwen3_5:Qwen35",
        _LANGUAGE,
        ("pretrain", "sft"),
        "0.8B, 9B, 27B, their language models; any plain Gated DeltaNet",
        "a Gated DeltaNet of 1.3B on one H200",
    ),
    "qwen3_moe": Family(
        "triptych_models.qwen3_moe:Qwen3MoE",
        _MIXTURE,
        ("pretrain", "sft", "moe"),
        "30B-A3B, 235B-A22B",
        "6 layers of 30B-A3B on one H100",
    ),
    "qwen3_next": Family(
        "triptych_models.qwen3_next:Qwen3Next",
        _MIXTURE,
        ("pretrain", "sft", "moe"),
        "80B-A3B",
        "tiny on CPUs",
    ),
    "qwen3_omni_moe_thinker": Family(
        "triptych_models.qwen3_omni_moe:Qwen3OmniMoE",
        _OMNI_MIXTURE,
        ("align", "pretrain", "sft", "moe"),
        "3-Omni 30B-A3B, the thinker (text, images, videos, sound)",
        "6 of 30B-A3B's 48 layers on one H200",
    ),
    "qwen3_vl": Family(
        "triptych_models.qwen3_vl:Qwen3VL",
        _SEEING,
        ("align", "pretrain", "sft"),
        "2B, 4B, 8B, 32B",
        "2B on one H100 and two H200",
    ),
    "qwen3_vl_moe": Family(
        "triptych_models.qwen3_vl_moe:Qwen3VLMoE",
        _SEEING_MIXTURE,
        ("align", "pretrain", "sft", "moe"),
        "30B-A3B, 235B-A22B",
        "6 layers of 30B-A3B on one H200",
    ),
}


# Whole folders, by their model_type, of which a family is the part that is computed here.
THINKER_OF: dict[str, str] = {
    "qwen2_5_omni": "qwen2_5_omni_thinker",
    "qwen3_omni_moe": "qwen3_omni_moe_thinker",
}


class GenerativeFamily(NamedTuple):
    """What there is to know of a family of images or videos before its class is imported."""

    implementation: str
    """module:class"""
    parts: tuple[str, ...]
    stages: tuple[str, ...]
    sizes: str
    ran: str


# Each a `diffusion.model.DiffusionModel`.
DENOISERS: dict[str, GenerativeFamily] = {
    "sit": GenerativeFamily(
        "triptych_models.diffusion.sit_model:SiTModel",
        ("embedders", "blocks", "head"),
        ("diffusion",),
        "S, B, L, XL, with patches of 1, 2, 4, 8",
        "XL/2 at 256² on one H200",
    ),
    "wan": GenerativeFamily(
        "triptych_models.diffusion.wan_model:WanModel",
        ("embedders", "blocks", "head"),
        ("diffusion",),
        "2.1 1.3B and 14B (T2V, I2V, V2V), 2.2 5B (TI2V)",
        "2.1 1.3B on one H200",
    ),
}

AUTOENCODERS: dict[str, GenerativeFamily] = {
    "rae": GenerativeFamily(
        "triptych_models.autoencoder.rae:RAE",
        ("embedders", "blocks", "head", "discriminator"),
        ("rae",),
        "decoders B, L, XL on DINOv2 with registers (S, B, L), SigLIP2-B, MAE-B",
        "XL on DINOv2-B on one H200",
    ),
}
