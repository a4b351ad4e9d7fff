"""Model folders of published shapes without weights, for speed and memory measurements.

The architectures are those of the published config.json; the tokenizer is the tiny demo one, whose
ids all lie inside the real vocabulary, so that no download is needed.

    python tools/make_bench_model.py OUT_DIR [--shape qwen3-1.7b]

Or config.json alone, which bench_train.py needs no more than, of a family as it is published, with
some values set otherwise:

    python tools/make_bench_model.py OUT_DIR --published qwen3_moe --set num_hidden_layers=6
"""

import json
import shutil
from pathlib import Path
from typing import Any

import click
from published import PUBLISHED

TINY = Path(__file__).parent.parent / "stages/configs/qwen3_vl_tiny"
TEXT = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
}
ROPE = {
    "rope_type": "default",
    "rope_theta": 5_000_000,
    "mrope_interleaved": True,
    "mrope_section": [24, 20, 20],
}
VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 2048,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}


QWEN3 = {
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "qwen3-1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "qwen3-4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
QWEN3_REST = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
# The published 30B-A3B with fewer of its 48 layers: 4.36 B parameters, 0.65 B at work on a token.
QWEN3_MOE = {
    "qwen3-30b-a3b-6l": {"num_hidden_layers": 6},
    "qwen3-moe-tiny": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "intermediate_size": 64,
    },
}
QWEN3_MOE_REST = QWEN3_REST | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
QWEN2_REST = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
    "max_position_embeddings": 131072,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
QWEN2 = {
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
QWEN2_5_VL_3B = QWEN2_REST | {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1_000_000,
        "mrope_section": [16, 24, 24],
    },
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 2048,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    },
}
TEXTS = {name: QWEN3_REST | shape for name, shape in QWEN3.items()}
TEXTS |= {name: QWEN3_MOE_REST | shape for name, shape in QWEN3_MOE.items()}
TEXTS |= {name: QWEN2_REST | shape for name, shape in QWEN2.items()}
# config.json alone: of diffusers' Wan 2.1 T2V 1.3B, and of an autoencoder's encoder and judges.
BARE: dict[str, dict[str, Any]] = {
    "wan-2.1-t2v-1.3b": {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 8960,
        "num_layers": 30,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
    },
    "dinov2-with-registers-base": {
        "architectures": ["Dinov2WithRegistersModel"],
        "model_type": "dinov2_with_registers",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_register_tokens": 4,
        "patch_size": 14,
        "image_size": 518,
    },
    "dino-vits8": {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "patch_size": 8,
        "image_size": 224,
    },
}
TOKENIZER = ("tokenizer.json", "chat_template.jinja", "generation_config.json")


@click.command()
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option(
    "--shape",
    type=click.Choice(["qwen3-vl-2b", "qwen2.5-vl-3b", *TEXTS, *BARE]),
    default="qwen3-vl-2b",
)
@click.option("--published", type=click.Choice(list(PUBLISHED)), help="config.json of this family")
@click.option("--set", "values", multiple=True, help="a.b=value of config.json, JSON or a word")
def main(out_dir: Path, shape: str, published: str | None, values: tuple[str, ...]) -> None:
    """Write the folder to OUT_DIR, which must not exist."""
    if out_dir.exists():
        raise click.ClickException(f"{out_dir}: must not exist; name another folder")
    if published:
        write_published(out_dir, published, values)
    elif shape in TEXTS:
        write_text(out_dir, TEXTS[shape])
    elif shape in BARE:
        out_dir.mkdir(parents=True)
        write_json(out_dir / "config.json", BARE[shape])
    elif shape == "qwen2.5-vl-3b":
        write_qwen2_5_vl(out_dir)
    else:
        write_qwen3_vl(out_dir)


def write_published(out_dir: Path, family: str, values: tuple[str, ...]) -> None:
    """config.json of a published size, with these values."""
    config = json.loads(json.dumps({"model_type": family} | PUBLISHED[family].config))
    for word in values:
        path, _, value = word.partition("=")
        *parents, name = path.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        try:
            section[name] = json.loads(value)
        except json.JSONDecodeError:
            section[name] = value
    out_dir.mkdir(parents=True)
    write_json(out_dir / "config.json", config)


def write_text(out_dir: Path, config: dict[str, Any]) -> None:
    """A folder of text alone: config.json and the tokenizer's files."""
    out_dir.mkdir(parents=True)
    for name in TOKENIZER:
        shutil.copyfile(TINY / name, out_dir / name)
    tokenizer = json.loads((TINY / "tokenizer_config.json").read_text())
    del tokenizer["processor_class"]
    write_json(out_dir / "tokenizer_config.json", tokenizer)
    write_json(out_dir / "config.json", config)


def write_qwen3_vl(out_dir: Path) -> None:
    """A Qwen3-VL-2B folder: the demo's, widened."""
    shutil.copytree(TINY, out_dir)
    config = json.loads((out_dir / "config.json").read_text())
    config["text_config"] |= TEXT | {"rope_parameters": ROPE}
    config["vision_config"] |= VISION
    write_json(out_dir / "config.json", config)
    write_patch_size(out_dir, 16)


def write_qwen2_5_vl(out_dir: Path) -> None:
    """A Qwen2.5-VL-3B folder: the demo's image tokens and processor, published sizes."""
    shutil.copytree(TINY, out_dir)
    tiny = json.loads((out_dir / "config.json").read_text())
    tokens = {key: value for key, value in tiny.items() if key.endswith("_token_id")}
    write_json(out_dir / "config.json", QWEN2_5_VL_3B | tokens)
    write_patch_size(out_dir, 14)


def write_patch_size(out_dir: Path, size: int) -> None:
    """Processors of images and videos that cut patches of this side."""
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        processor = json.loads((out_dir / name).read_text())
        processor |= {"patch_size": size, "merge_size": 2, "temporal_patch_size": 2}
        processor["size"] = {"shortest_edge": 65536, "longest_edge": 16777216}
        write_json(out_dir / name, processor)


def write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")


if __name__ == "__main__":
    main()
