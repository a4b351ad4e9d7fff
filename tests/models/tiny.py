"""A tiny Qwen3-VL on disk, documents for it, and packed rows built by hand."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB, IMAGE, START, END, PAD, EOS = 300, 290, 291, 292, 293, 294
MERGE, PATCH_DIM = 2, 3 * 2 * 4 * 4


def write_model_dir(directory: Path, *, tied: bool = False) -> Path:
    """config.json and preprocessor_config.json of a model with two layers everywhere."""
    directory.mkdir(parents=True, exist_ok=True)
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
        },
    }
    vision = {
        "model_type": "qwen3_vl_vision",
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.1,
    }
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "vision_config": vision,
        "image_token_id": IMAGE,
        "video_token_id": 295,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "tie_word_embeddings": tied,
    }
    (directory / "config.json").write_text(json.dumps(config))
    preprocessor = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


def write_qwen2_5_vl_model_dir(directory: Path, **fields: Any) -> Path:
    """A Qwen2.5-VL, as published folders write it (all of the text on top): windows of 2 x 2 merge
    blocks in the first block of the tower, whole frames in the second."""
    write_model_dir(directory)
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    config = _without_heads(write_text_model_dir(directory)) | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vision_config": vision,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "image_token_id": IMAGE,
        "video_token_id": 295,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


def write_text_model_dir(directory: Path, *, tied: bool = False) -> Path:
    """config.json of a Qwen3 with two layers, as published folders write it."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_qwen2_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """config.json of a Qwen2, as published folders write it: as `write_text_model_dir`."""
    config = _without_heads(write_text_model_dir(directory, tied=tied)) | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 2,
    }
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


_EXPERTS = {
    "num_hidden_layers": 3,
    "mlp_only_layers": [2],
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def write_moe_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """config.json of a Qwen3-MoE: three layers, the last of them dense, 4 experts, 2 a token."""
    write_text_model_dir(directory, tied=tied)
    config = json.loads((directory / "config.json").read_text()) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "norm_topk_prob": True,
        **_EXPERTS,
    }
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


def write_mixtral_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """config.json of a Mixtral, as published folders write it: two layers, 4 experts, 2 a token."""
    config = _without_heads(write_text_model_dir(directory, tied=tied)) | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


def write_qwen2_moe_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """config.json of a Qwen2-MoE: as `write_moe_model_dir`, with a shared expert."""
    config = _without_heads(write_text_model_dir(directory, tied=tied)) | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 24,
        **_EXPERTS,
    }
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


def write_dots1_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """config.json of a Dots1: three layers, the first dense; a shared expert, no aux loss."""
    write_text_model_dir(directory, tied=tied)
    config = json.loads((directory / "config.json").read_text()) | {
        "architectures": ["Dots1ForCausalLM"],
        "model_type": "dots1",
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    }
    del config["use_sliding_window"]
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


_DELTA = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}


def write_qwen3_5_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """config.json of a Qwen3.5's language model: three layers of Gated DeltaNet, one of attention.

    A quarter of a head is turned by rotary positions.
    """
    write_text_model_dir(directory, tied=tied)
    config = json.loads((directory / "config.json").read_text())
    del config["rope_theta"], config["rope_scaling"], config["use_sliding_window"]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    config |= {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "rope_parameters": rope | {"mrope_interleaved": True, "mrope_section": [1, 1, 0]},
        "head_dim": 16,
        **_DELTA,
    }
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


def write_gated_delta_net_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """A language model whose every layer is Gated DeltaNet."""
    fields = {"layer_types": ["linear_attention"] * 4} | fields
    return write_qwen3_5_model_dir(directory, tied=tied, **fields)


def write_qwen3_5_moe_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """config.json of a Qwen3.5-MoE's language model, its experts as `write_moe_model_dir`."""
    write_qwen3_5_model_dir(directory, tied=tied)
    config = json.loads((directory / "config.json").read_text())
    del config["intermediate_size"]
    config |= {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


def write_qwen3_next_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """config.json of a Qwen3-Next, as published folders write it; its third layer is dense."""
    config = json.loads((write_text_model_dir(directory, tied=tied) / "config.json").read_text())
    config |= {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 4,
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": 24,
        **_EXPERTS,
        **_DELTA,
    }
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


def _without_heads(directory: Path) -> Any:
    """A configuration that leaves head_dim to hidden_size / num_attention_heads."""
    config = json.loads((directory / "config.json").read_text())
    del config["head_dim"], config["use_sliding_window"]
    return config


def write_vl_moe_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """A Qwen3-VL-MoE with the tower of `write_model_dir` and the experts of `write_moe_model_dir`,
    two DeepStack features."""
    write_model_dir(directory, tied=tied)
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
    }
    config["text_config"] |= {"model_type": "qwen3_vl_moe_text", **_EXPERTS, **fields}
    config["vision_config"] |= {
        "model_type": "qwen3_vl_moe_vision",
        "deepstack_visual_indexes": [0, 1],
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_qwen3_5_vl_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """A Qwen3.5 as published: the tower of `write_model_dir`, which no layer taps, before the
    language model of `write_qwen3_5_model_dir`, or with fields of its mixture."""
    write_qwen3_5_model_dir(directory, tied=tied)
    text = json.loads((directory / "config.json").read_text())
    write_model_dir(directory, tied=tied)
    config = json.loads((directory / "config.json").read_text())
    del config["vision_config"]["deepstack_visual_indexes"], text["architectures"]
    config |= {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text | fields,
    }
    config["vision_config"]["model_type"] = "qwen3_5_vision"
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_qwen3_5_vl_moe_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """As `write_qwen3_5_vl_model_dir`, with the experts of `write_qwen3_5_moe_model_dir`."""
    write_qwen3_5_moe_model_dir(directory, tied=tied)
    text = json.loads((directory / "config.json").read_text())
    write_qwen3_5_vl_model_dir(directory, tied=tied)
    config = json.loads((directory / "config.json").read_text())
    del text["architectures"]
    config |= {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text | fields,
    }
    config["vision_config"]["model_type"] = "qwen3_5_moe_vision"
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@dataclass
class Document:
    """One sample as the data package would encode it; labels shifted, -100 = no target."""

    input_ids: Tensor  # (n,)
    position_ids: Tensor  # (3, n)
    shift_labels: Tensor  # (n,)
    image_grid_thw: Tensor  # (images, 3)
    pixel_values: Tensor  # (patches, patch_dim) uint8


def document(seed: int, *, words: int = 7, grids: Sequence[tuple[int, int, int]] = ()) -> Document:
    """Text, then each image followed by text; every second token is a target."""
    rng = torch.Generator().manual_seed(seed)
    ids, positions, at = [], [], 0

    def add_text(tokens: list[int]) -> None:
        nonlocal at
        for token in tokens:
            ids.append(token)
            positions.append((at, at, at))
            at += 1

    def some_words() -> list[int]:
        return torch.randint(0, 280, (words,), generator=rng).tolist()

    add_text(some_words())
    for t, h, w in grids:
        add_text([START])
        for frame in range(t):
            for row in range(h // MERGE):
                for column in range(w // MERGE):
                    ids.append(IMAGE)
                    positions.append((at + frame, at + row, at + column))
        at += max(h, w) // MERGE
        add_text([END, *some_words()])

    input_ids = torch.tensor(ids)
    shift_labels = torch.cat((input_ids[1:], torch.tensor([-100])))
    shift_labels[::2] = -100
    patches = sum(t * h * w for t, h, w in grids)
    return Document(
        input_ids,
        torch.tensor(positions).T,
        shift_labels,
        torch.tensor(grids, dtype=torch.int64).view(-1, 3),
        torch.randint(0, 256, (patches, PATCH_DIM), generator=rng).to(torch.uint8),
    )


def pack(documents: list[Document], seq_len: int) -> dict[str, Any]:
    """One packed row of seq_len tokens; the padding tail is the last document."""
    lengths = [len(d.input_ids) for d in documents]
    tail = seq_len - sum(lengths)
    assert tail >= 0
    if tail:
        nothing = torch.zeros(0, PATCH_DIM, dtype=torch.uint8)
        if documents:
            nothing = documents[0].pixel_values[:0]
        padding = Document(
            torch.full((tail,), PAD),
            torch.arange(tail).expand(3, tail),
            torch.full((tail,), -100),
            torch.zeros(0, 3, dtype=torch.int64),
            nothing,
        )
        documents = [*documents, padding]
        lengths = [*lengths, tail]
    input_ids = torch.cat([d.input_ids for d in documents])
    shift_labels = torch.cat([d.shift_labels for d in documents])
    batch = {
        "input_ids": input_ids[None],
        "shift_labels": shift_labels[None],
        "position_ids": torch.cat([d.position_ids for d in documents], 1)[:, None],
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_seqlen": seq_len,
        "num_targets": int((shift_labels != -100).sum()),
    }
    grids = torch.cat([d.image_grid_thw for d in documents])
    if len(grids):
        frames = [h * w for t, h, w in grids.tolist() for _ in range(t)]
        batch |= {
            "pixel_values": torch.cat([d.pixel_values for d in documents]),
            "image_grid_thw": grids,
            "vision_cu_seqlens": torch.tensor([0, *frames]).cumsum(0).int(),
            "vision_max_seqlen": max(frames),
            "image_positions": (input_ids == IMAGE).nonzero().flatten(),
        }
    return batch


def pack_text(documents: list[Document], seq_len: int) -> dict[str, Any]:
    """One packed row of documents of text alone, as a model of text alone takes it."""
    batch = pack(documents, seq_len)
    return batch | {"position_ids": batch["position_ids"][0]}


def inputs_only(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without what only the loss reads."""
    return {k: v for k, v in batch.items() if k not in ("shift_labels", "num_targets")}


LLAVA_SIDE, LLAVA_PATCH = 14, 4  # pixels: 3 x 3 patches and two that are cut off


def write_llava_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """config.json and preprocessor_config.json of a LLaVA: SigLIP of 3 blocks, 2 of which run."""
    write_text_model_dir(directory, tied=tied)
    text = json.loads((directory / "config.json").read_text())
    vision = {
        "model_type": "siglip_vision_model",
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 2,
        "image_size": LLAVA_SIDE,
        "patch_size": LLAVA_PATCH,
        "vision_use_head": False,
    }
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": vision,
        "image_token_index": IMAGE,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": tied,
    }
    (directory / "config.json").write_text(json.dumps(config | fields))
    preprocessor = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


def write_internvl_model_dir(directory: Path, *, tied: bool = True, **fields: Any) -> Path:
    """An InternVL: a ViT of 4 x 4 patches and a class token, four patches a token, a Qwen2 with
    dynamic rotary positions, as published folders have."""
    write_llava_model_dir(directory, tied=tied)
    write_qwen2_model_dir(directory, tied=tied)
    text = json.loads((directory / "config.json").read_text())
    vision = {
        "model_type": "internvl_vision",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 2,
        "attention_bias": True,
        "image_size": [16, 16],
        "patch_size": [LLAVA_PATCH, LLAVA_PATCH],
    }
    config = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": text | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "vision_config": vision,
        "image_token_id": IMAGE,
        "image_seq_length": 4,
        "tie_word_embeddings": tied,
    }
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


def llava_document(
    seed: int, *, words: int = 7, images: int = 0, side: int = 3, tokens: int = 9
) -> Document:
    """As `document`, with images of side x side patches, tokens each, and plain positions."""
    made = document(seed, words=words, grids=[(1, MERGE, MERGE * tokens)] * images)
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (images * side**2, 3 * LLAVA_PATCH**2), generator=rng)
    made.position_ids = torch.arange(len(made.input_ids)).expand(3, -1)
    made.image_grid_thw = torch.tensor([[1, side, side]] * images, dtype=torch.int64).view(-1, 3)
    made.pixel_values = pixels.to(torch.uint8)
    return made


def pack_llava(documents: list[Document], seq_len: int) -> dict[str, Any]:
    """One packed row as a LLaVA takes it."""
    batch = pack(documents, seq_len)
    return batch | {"position_ids": batch["position_ids"][0]}
