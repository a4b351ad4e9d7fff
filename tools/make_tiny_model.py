"""Write the tiny models that the CPU demo and the tests use: model directories without weights.

    python tools/make_tiny_model.py [OUT_DIR]        (default: stages/configs/qwen3_vl_tiny)
    python tools/make_tiny_model.py --kind text      (default: stages/configs/qwen3_tiny)
    python tools/make_tiny_model.py --kind llava     (default: stages/configs/llava_tiny)
    python tools/make_tiny_model.py --kind mixtral   (default: runs/tiny_models/mixtral)

The directory is what `model.path` names: stock transformers loads its config, tokenizer and
processor, and builds the model with random weights. Sizes that differ in the real models differ
here too (heads * head_dim != hidden_size, fewer kv heads than heads, two DeepStack layers), so that
a mix-up shows. The same versions give the same bytes; nothing is downloaded.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import tiny_bagel
import tiny_omni
import tiny_vlms
from assemble_vlm import CHATML
from tiny_checks import check, check_bagel, check_text
from tiny_languages import LANGUAGES, language_config
from tiny_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, VOCAB_SIZE, train_tokenizer

CONFIGS = Path(__file__).parent.parent / "stages/configs"
KINDS = {
    "vision": "qwen3_vl_tiny",
    "text": "qwen3_tiny",
    "llava": "llava_tiny",
    "qwen2_5_vl": "qwen2_5_vl_tiny",
    "internvl": "internvl_tiny",
    "llava_onevision": "llava_onevision_tiny",
    "llavaonevision1_5": "llavaonevision1_5_tiny",
    "qwen2_5_omni": "qwen2_5_omni_tiny",
    "bagel": "bagel_tiny",
    "qwen3_omni": "qwen3_omni_tiny",
    "aero": "aero_tiny",
}
"""Kinds whose folders are shipped."""
SIGLIP_SIDE = 32  # pixels: 16 tokens an image
PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 8, 2, 2


@click.command()
@click.argument("out_dir", required=False, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--kind",
    default="vision",
    type=click.Choice([*KINDS, *LANGUAGES]),
    help="A Qwen3-VL, a Qwen3 before any chat, a LLaVA (SigLIP's tower before that Qwen3), …; a "
    "family of language models, named by its model_type.",
)
def main(out_dir: Path | None, kind: str) -> None:
    """Write the model directory, then load it with transformers and run it once."""
    shipped = CONFIGS / KINDS[kind] if kind in KINDS else Path("runs/tiny_models") / kind
    out_dir = out_dir or shipped
    out_dir.mkdir(parents=True, exist_ok=True)
    special = {
        "qwen2_5_omni": tiny_omni.SPECIAL_TOKENS,
        "aero": tiny_omni.SPECIAL_TOKENS,
        "qwen3_omni": [*SPECIAL_TOKENS, *tiny_omni.MORE_TOKENS],
    }
    tokenizer = train_tokenizer(special.get(kind, SPECIAL_TOKENS))
    tokenizer.save(str(out_dir / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    files: Callable[[dict[str, int]], dict[str, Any]] = {
        "vision": vision_files,
        "text": text_files,
        "llava": llava_files,
        "qwen2_5_vl": qwen2_5_vl_files,
        "internvl": internvl_files,
        "llava_onevision": onevision_files,
        "llavaonevision1_5": onevision1_5_files,
        "qwen2_5_omni": qwen2_5_omni_files,
        "bagel": bagel_files,
        "qwen3_omni": qwen3_omni_files,
        "aero": aero_files,
    }.get(kind, partial(language_files, kind))
    for name, content in files(ids).items():
        (out_dir / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if kind == "text" or kind in LANGUAGES:
        check_text(out_dir)
    elif kind in special:
        template = {
            "qwen2_5_omni": tiny_omni.TEMPLATE,
            "qwen3_omni": tiny_omni.qwen3_template(),
            "aero": tiny_omni.aero_template(),
        }[kind]
        (out_dir / "chat_template.jinja").write_text(template, encoding="utf-8")
        click.echo((tiny_omni.check_aero if kind == "aero" else tiny_omni.check)(out_dir))
    else:
        templates = {
            "llava": CHATML,
            "internvl": tiny_vlms.INTERNVL_TEMPLATE,
            "llava_onevision": tiny_vlms.ONEVISION_TEMPLATE,
        }
        template = templates.get(kind, CHAT_TEMPLATE)
        (out_dir / "chat_template.jinja").write_text(template, encoding="utf-8")
        (check_bagel if kind == "bagel" else check)(out_dir)


def vision_files(ids: dict[str, int]) -> dict[str, Any]:
    """The small files of a Qwen3-VL."""
    return {
        "config.json": model_config(ids),
        "generation_config.json": generation_config(ids),
        "tokenizer_config.json": with_processor(tokenizer_config()),
        "preprocessor_config.json": image_config(),
        "video_preprocessor_config.json": video_config(),
    }


def text_files(ids: dict[str, int]) -> dict[str, Any]:
    """The small files of a Qwen3, as base models have them: documents end by <|endoftext|>."""
    return {
        "config.json": text_config(ids),
        "generation_config.json": generation_config(ids),
        "tokenizer_config.json": tokenizer_config() | {"eos_token": "<|endoftext|>"},
    }


def language_files(kind: str, ids: dict[str, int]) -> dict[str, Any]:
    """The small files of another family's base model."""
    return text_files(ids) | {"config.json": language_config(kind, text_config(ids))}


def llava_files(ids: dict[str, int]) -> dict[str, Any]:
    """The small files of a LLaVA, as assemble_vlm.py puts it together: a token a patch."""
    from triptych_models.assemble_siglip import siglip_config, siglip_processor

    config = siglip_config(
        siglip(),
        text_config(ids),
        "mlp",
        vocab_size=VOCAB_SIZE,
        image_token_id=ids["<|image_pad|>"],
        tied=True,
    )
    side = {"height": SIGLIP_SIDE, "width": SIGLIP_SIDE}
    return {
        "config.json": config,
        "generation_config.json": generation_config(ids),
        "tokenizer_config.json": with_processor(tokenizer_config(), "LlavaProcessor"),
        "processor_config.json": siglip_processor(config, "<|image_pad|>"),
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor",
            "size": side,
            "do_convert_rgb": True,
            "resample": 3,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    }


def qwen2_5_vl_files(ids: dict[str, int]) -> dict[str, Any]:
    """The small files of a Qwen2.5-VL; for videos too, where the hub's leave it to the defaults."""
    return {
        "config.json": tiny_vlms.qwen2_5_vl_config(ids, VOCAB_SIZE),
        "generation_config.json": generation_config(ids),
        "tokenizer_config.json": with_processor(tokenizer_config(), "Qwen2_5_VLProcessor"),
        "preprocessor_config.json": tiny_vlms.qwen2_5_vl_images(image_config()),
        "video_preprocessor_config.json": tiny_vlms.qwen2_5_vl_videos(video_config()),
    }


def internvl_files(ids: dict[str, int]) -> dict[str, Any]:
    """The small files of an InternVL with a Qwen2."""
    tokenizer = with_processor(tokenizer_config(), "InternVLProcessor")
    return {
        **tiny_vlms.internvl_files(ids, VOCAB_SIZE),
        "generation_config.json": generation_config(ids),
        "tokenizer_config.json": tokenizer | {"extra_special_tokens": tiny_vlms.internvl_tokens()},
    }


def onevision_files(ids: dict[str, int]) -> dict[str, Any]:
    """The small files of a LLaVA-OneVision with the LLaVA's tower, all of which runs."""
    return {
        **tiny_vlms.onevision_files(ids, VOCAB_SIZE, siglip()),
        "generation_config.json": generation_config(ids),
        "tokenizer_config.json": with_processor(tokenizer_config(), "LlavaOnevisionProcessor"),
    }


def qwen2_5_omni_files(ids: dict[str, int]) -> dict[str, Any]:
    """The small files of a Qwen2.5-Omni's thinker."""
    processor = {"processor_class": "Qwen2_5OmniProcessor"}
    tokenizer = with_processor(tokenizer_config(), processor["processor_class"])
    seen = {
        "<|image_pad|>": ids["<|IMAGE|>"],
        "<|video_pad|>": ids["<|VIDEO|>"],
        "<|vision_start|>": ids["<|vision_bos|>"],
        "<|vision_end|>": ids["<|vision_eos|>"],
    }
    sizes = tiny_vlms.qwen2_5_vl_config(ids | seen, VOCAB_SIZE)
    return {
        "config.json": tiny_omni.thinker_config(ids, sizes),
        "generation_config.json": generation_config(ids),
        "tokenizer_config.json": tokenizer | {"extra_special_tokens": tiny_omni.media_tokens()},
        "preprocessor_config.json": tiny_omni.preprocessor(
            tiny_vlms.qwen2_5_vl_images(image_config()) | processor
        ),
        "video_preprocessor_config.json": tiny_vlms.qwen2_5_vl_videos(video_config()) | processor,
    }


def bagel_files(ids: dict[str, int]) -> dict[str, Any]:
    """The small files of a Bagel."""
    return {
        **tiny_bagel.bagel_files(ids, VOCAB_SIZE, image_config()),
        "generation_config.json": generation_config(ids),
        "tokenizer_config.json": with_processor(tokenizer_config(), "Qwen2VLProcessor"),
    }


def qwen3_omni_files(ids: dict[str, int]) -> dict[str, Any]:
    """The small files of a Qwen3-Omni-MoE's thinker."""
    processor = {"processor_class": "Qwen3OmniMoeProcessor"}
    tokenizer = with_processor(tokenizer_config(), processor["processor_class"])
    videos = video_config() | processor | {"video_processor_type": "Qwen2VLVideoProcessor"}
    return {
        "config.json": tiny_omni.qwen3_config(ids, model_config(ids)),
        "generation_config.json": generation_config(ids),
        "tokenizer_config.json": tokenizer | {"extra_special_tokens": tiny_omni.qwen3_tokens()},
        "preprocessor_config.json": tiny_omni.preprocessor(image_config() | processor),
        "video_preprocessor_config.json": videos,
    }


def onevision1_5_files(ids: dict[str, int]) -> dict[str, Any]:
    """The small files of a LLaVA-OneVision-1.5 with that Qwen3; patches of one frame."""
    import triptych_models.llava_onevision1_5  # noqa: F401 - transformers does not know it

    text = text_config(ids)
    del text["architectures"]
    images, one_frame = tiny_vlms.qwen2_5_vl_images(image_config()), {"temporal_patch_size": 1}
    return {
        "config.json": tiny_vlms.onevision1_5_config(ids, text),
        "generation_config.json": generation_config(ids),
        "tokenizer_config.json": with_processor(tokenizer_config(), "Qwen2_5_VLProcessor"),
        "preprocessor_config.json": images | one_frame,
        "video_preprocessor_config.json": tiny_vlms.qwen2_5_vl_videos(video_config()) | one_frame,
    }


def aero_files(ids: dict[str, int]) -> dict[str, Any]:
    """The small files of an Aero: its tokenizer does not name the token of a recording."""
    processor = {"processor_class": "AeroProcessor"}
    return {
        "config.json": tiny_omni.aero_config(qwen2_5_omni_files(ids)["config.json"]),
        "generation_config.json": generation_config(ids),
        "tokenizer_config.json": with_processor(tokenizer_config(), processor["processor_class"]),
        "preprocessor_config.json": tiny_omni.preprocessor(processor, seconds=3),
    }


def model_config(ids: dict[str, int]) -> dict[str, Any]:
    """config.json: a Qwen3-VL of about 3.8 M parameters."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,  # every attention kernel knows 64
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rms_norm_eps": 1e-06,
            "max_position_embeddings": 8192,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_interleaved": True,
                "mrope_section": [12, 10, 10],  # time, height, width; together head_dim / 2
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "out_hidden_size": 192,
            "num_position_embeddings": 64,  # an 8 by 8 grid: a digit of 64 by 64 pixels
            "deepstack_visual_indexes": [1, 2],
            "initializer_range": 0.02,
        },
    }


def siglip() -> dict[str, Any]:
    """The tower's section: half a million parameters, four blocks of which three run."""
    return {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "image_size": SIGLIP_SIDE,
        "patch_size": PATCH_SIZE,
        "initializer_range": 0.02,
    }


def text_config(ids: dict[str, int]) -> dict[str, Any]:
    """config.json: a Qwen3 of about 1.9 M parameters, the Qwen3-VL's language model."""
    text = model_config(ids)["text_config"]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    own = {"model_type": "qwen3", "eos_token_id": ids["<|endoftext|>"], "rope_parameters": rope}
    return {"architectures": ["Qwen3ForCausalLM"], **text, **own}


def generation_config(ids: dict[str, int]) -> dict[str, Any]:
    """generation_config.json: greedy, ends at the turn's end."""
    return {
        "do_sample": False,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
    }


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json, as Qwen ships it."""
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 8192,
        "split_special_tokens": False,
    }


def with_processor(settings: dict[str, Any], name: str = "Qwen3VLProcessor") -> dict[str, Any]:
    """Settings of a tokenizer that belongs to a processor of images too."""
    first, *rest = settings.items()
    return dict([first, ("processor_class", name), *rest])


def image_config() -> dict[str, Any]:
    """preprocessor_config.json; "size" counts pixels per image, from 32 by 32 to 128 by 128."""
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
        "patch_size": PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def video_config() -> dict[str, Any]:
    """video_preprocessor_config.json; "size" counts pixels over all frames."""
    frame = {key: value for key, value in image_config().items() if key != "image_processor_type"}
    size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 32 * 128 * 128}
    return {"video_processor_type": "Qwen3VLVideoProcessor", **frame, "size": size}


if __name__ == "__main__":
    main()
