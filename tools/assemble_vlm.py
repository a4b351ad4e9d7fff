"""Put a vision-language model together: a tower, a fresh projector, a language model.

    python tools/assemble_vlm.py --vision Qwen3-VL-2B --language Qwen3-1.7B --output runs/start
    python tools/assemble_vlm.py --vision VL --language LM --projector mlp --output runs/start
    python tools/assemble_vlm.py --vision siglip2-so400m-patch14-384 --language Qwen2.5-7B \\
        --projector resampler --queries 64 --output runs/start

`stages/align.py` trains the projector of OUTPUT. On text its logits are the language model's.

The tower of a Qwen3-VL goes before a Qwen3; OUTPUT is a Qwen3-VL folder that stock transformers
loads. The projector is Qwen3-VL's: a LayerNorm and two layers, for the features and for each
DeepStack tap. pixel_unshuffle merges neighbouring patches into one token as the tower's model did
(2x2 in published ones), mlp makes a token of every patch. Stock Qwen3-VL has no other projector,
and its layers are Qwen3's: a Qwen2 has no norms on queries and keys.

The tower of a SigLIP, or of a SigLIP 2 of one image size, goes before a Qwen3, Qwen2 or Llama. With
linear or mlp, a token a patch, OUTPUT is a LLaVA folder that stock transformers loads. With
pixel_unshuffle (--factor) or resampler (--queries) it is read by triptych, and by transformers
after `import triptych_models.llava_projector`.

Tokenizer and generation come from the language model, rules for images from the tower's folder; the
chat template from the tower's too, and of a SigLIP is ChatML. Special tokens that these need and
the tokenizer lacks are added; their embeddings are the mean of all others. OUTPUT is whole or
absent.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from triptych_models.assemble import Source

CHUNK = 1 << 26  # bytes of a tensor that is copied, read at a time
FOLDER = click.Path(path_type=Path)
MEDIA_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
SIGLIP = ("siglip", "siglip_vision_model")
TEXT = ("qwen3", "qwen2", "llama")
PROJECTORS = {
    "qwen3_vl": ("pixel_unshuffle", "mlp"),
    **dict.fromkeys(SIGLIP, ("linear", "mlp", "pixel_unshuffle", "resampler")),
}
# What SigLIP has none of: Qwen's turns, an image between its two marks.
CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception('chat template: unknown content type ' ~ part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
FROM_LANGUAGE = ("vocab.json", "merges.txt", "special_tokens_map.json")
FROM_VISION = ("chat_template.jinja", "chat_template.json", "processor_config.json")
MEDIA_RULES = ("preprocessor_config.json", "video_preprocessor_config.json")


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.option("--vision", required=True, type=FOLDER, help="a Qwen3-VL or SigLIP folder")
@click.option("--language", required=True, type=FOLDER, help="a Qwen3, Qwen2 or Llama folder")
@click.option(
    "--projector",
    default="pixel_unshuffle",
    type=click.Choice(["linear", "mlp", "pixel_unshuffle", "resampler"]),
    help="what becomes a token: each patch, neighbouring ones together, or a learned query",
)
@click.option(
    "--factor",
    type=click.IntRange(min=1),
    help="SigLIP, pixel_unshuffle: patches a side merged  [default: 2]",
)
@click.option(
    "--queries",
    type=click.IntRange(min=1),
    help="SigLIP, resampler: an image's tokens  [default: 64]",
)
@click.option("--output", required=True, type=FOLDER, help="a new folder")
@click.option("--seed", default=0, help="of the projector")
@click.option(
    "--max-shard-bytes", default=5 * 10**9, type=click.IntRange(min=1), help="of a file of weights"
)
def main(vision: Path, language: Path, output: Path, projector: str, **settings: Any) -> None:
    """Write OUTPUT, a model of the two models' parts and a fresh projector."""
    try:
        size = assemble(vision, language, output, projector, **settings)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{output}: {size:,} bytes, projector: {projector}")


def assemble(
    vision: Path,
    language: Path,
    output: Path,
    projector: str = "pixel_unshuffle",
    *,
    factor: int | None = None,
    queries: int | None = None,
    seed: int = 0,
    max_shard_bytes: int = 5 * 10**9,
) -> int:
    """Write the folder; returns the bytes of its weights.

    factor is of pixel_unshuffle behind a SigLIP (2 if None), queries of a resampler (64). Raises
    ValueError if `output` exists, a folder is not of a family that it may be of, or the projector
    has no use for one of them.
    """
    if output.exists():
        raise ValueError(f"--output: must not exist, got {output}; name a new directory")
    family = read_family(vision, "--vision", tuple(PROJECTORS))
    read_family(language, "--language", TEXT if family in SIGLIP else ("qwen3",))
    if projector not in PROJECTORS[family]:
        raise ValueError(
            f"--projector: must be {' or '.join(PROJECTORS[family])} behind the tower of a "
            f"{family}, got {projector}; choose one, or the tower of a SigLIP"
        )
    for option, value, user in (
        ("--factor", factor, "pixel_unshuffle"),
        ("--queries", queries, "resampler"),
    ):
        if value is not None and (projector != user or family not in SIGLIP):
            raise ValueError(
                f"{option}: must be left out but for {user} behind the tower of a SigLIP, got "
                f"{value} for {projector} behind a {family}"
            )
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was cut off
    partial.mkdir(parents=True)
    vocabulary = write_tokenizer(language, partial, write_chat(vision, family, partial))
    if family in SIGLIP:
        config = config_of_siglip(
            vision, language, projector, vocabulary, factor or 2, queries or 64
        )
        write_siglip_rules(vision, partial, config)
    else:
        config = config_of_qwen3_vl(vision, language, projector, vocabulary)
        write_media_rules(vision, partial, config["vision_config"]["spatial_merge_size"])
    size = write_weights(vision, language, partial, config, seed, max_shard_bytes)
    for name in (*FROM_LANGUAGE, "generation_config.json"):
        if (language / name).is_file():
            shutil.copyfile(language / name, partial / name)
    facts = {"vision": str(vision), "language": str(language), "projector": projector, "seed": seed}
    write_json(partial / "assembly.json", facts)
    partial.rename(output)
    return size


def read_family(folder: Path, option: str, families: tuple[str, ...]) -> str:
    """The folder's model_type; ValueError that names the option if it is of none of `families`."""
    file = folder / "config.json"
    found = json.loads(file.read_text()).get("model_type") if file.is_file() else "no config.json"
    if found not in families:
        wanted = " or ".join(families)
        raise ValueError(f"{option}: must be a folder of a {wanted}, got {folder} ({found})")
    return str(found)


def config_of_qwen3_vl(
    vision: Path, language: Path, projector: Any, vocabulary: dict[str, int]
) -> dict[str, Any]:
    """config.json of a Qwen3-VL of these parts."""
    from triptych_models.assemble import vlm_config
    from triptych_models.read_config import read_config

    text = read_config(language, "qwen3")
    return vlm_config(
        read_config(vision, "qwen3_vl"),
        text,
        projector,
        vocab_size=max(text.vocab_size, 1 + max(vocabulary.values())),
        token_ids={key: vocabulary[token] for key, token in MEDIA_TOKENS.items()},
    )


def config_of_siglip(
    vision: Path,
    language: Path,
    projector: Any,
    vocabulary: dict[str, int],
    factor: int,
    queries: int,
) -> dict[str, Any]:
    """config.json of a LLaVA of these parts. Raises ValueError for what cannot be one."""
    from transformers import AutoConfig

    from triptych_models.assemble_siglip import siglip_config
    from triptych_models.families import family_class
    from triptych_models.read_config import read_config

    of_language = read_json(language / "config.json")
    text = read_config(language, of_language["model_type"])
    config = siglip_config(
        read_json(vision / "config.json"),
        of_language,
        projector,
        vocab_size=max(text.vocab_size, 1 + max(vocabulary.values())),
        image_token_id=vocabulary[MEDIA_TOKENS["image_token_id"]],
        tied=text.tie_word_embeddings,
        factor=factor,
        num_queries=queries,
    )
    family: Any = family_class(config["model_type"])
    family.check_config(AutoConfig.for_model(**config))
    return config


def write_chat(vision: Path, family: str, out: Path) -> dict[str, Any]:
    """The files that say how chats are written; -> what tokenizer_config.json says of them."""
    if family in SIGLIP:
        (out / "chat_template.jinja").write_text(CHATML)
        return {"eos_token": "<|im_end|>", "processor_class": "LlavaProcessor"}
    for name in FROM_VISION:
        if (vision / name).is_file():
            shutil.copyfile(vision / name, out / name)
    settings = read_json(vision / "tokenizer_config.json")
    kept = {key: settings[key] for key in ("eos_token", "chat_template") if key in settings}
    return kept | {"processor_class": "Qwen3VLProcessor"}


def write_tokenizer(language: Path, out: Path, chat: dict[str, Any]) -> dict[str, int]:
    """The language model's tokenizer with all special tokens of media and chats; -> its ids."""
    from tokenizers import AddedToken, Tokenizer

    if not (language / "tokenizer.json").is_file():
        raise ValueError(f"--language: must hold a tokenizer.json, got {language}")
    tokenizer = Tokenizer.from_file(str(language / "tokenizer.json"))
    needed = [*MEDIA_TOKENS.values(), *template_tokens(out, chat)]
    known = tokenizer.get_vocab(with_added_tokens=True)
    missing = [token for token in dict.fromkeys(needed) if token not in known]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in missing])
    tokenizer.save(str(out / "tokenizer.json"))
    settings = read_json(language / "tokenizer_config.json")
    settings.pop("chat_template", None)
    settings.pop("added_tokens_decoder", None)  # as in tokenizer.json, less what was added
    write_json(out / "tokenizer_config.json", settings | chat)
    return dict(tokenizer.get_vocab(with_added_tokens=True))


def template_tokens(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Special tokens that a chat template writes, and the one that ends an answer."""
    texts = [str(settings.get("chat_template", "")), str(settings.get("eos_token", ""))]
    files = [folder / name for name in FROM_VISION[:2]]
    texts += [file.read_text() for file in files if file.is_file()]
    return [token for text in texts for token in re.findall(r"<\|\w+\|>", text)]


def write_weights(
    vision: Path, language: Path, out: Path, config: dict[str, Any], seed: int, max_bytes: int
) -> int:
    """config.json and the weights, all in the dtype of the language model's; -> their bytes."""
    from safetensors import safe_open

    from triptych_models.assemble import sources
    from triptych_models.stream_shards import SIZES, Slot, lay_out, write_shards
    from triptych_models.weights import weight_files

    with ExitStack() as stack:
        stored: dict[tuple[str, str], Any] = {}
        for part, folder in (("vision", vision), ("language", language)):
            files = weight_files(folder)
            opened = {f: stack.enter_context(safe_open(f, "pt")) for f in sorted({*files.values()})}
            stored |= {
                (part, name.removeprefix("vision_model.")): opened[f].get_slice(name)
                for name, f in files.items()
            }
        made = list(sources(config, seed))
        wanted = [(each.part, each.stored) for each in made if each.part != "drawn"]
        if lacking := sorted(f"{name} of --{part}" for part, name in set(wanted) - stored.keys()):
            raise ValueError(f"weights: must hold every tensor, got no {', '.join(lacking)}")
        dtype = stored["language", "model.embed_tokens.weight"].get_dtype()
        if dtype not in SIZES:
            raise ValueError(f"--language: weights must be fp32, bf16 or fp16, got {dtype}")
        slots = [Slot(each.name, each.shape, dtype) for each in made]
        data = (p for m in made for p in pieces(m, stored.get((m.part, m.stored)), dtype))
        write_shards(out, lay_out(slots, max_bytes), data)
    name = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype]
    for section in (config, config["text_config"], config["vision_config"]):
        section["dtype"] = name
    write_json(out / "config.json", config)
    return sum(slot.num_bytes for slot in slots)


def pieces(source: Source, stored: Any, dtype: str) -> Iterator[Tensor]:
    """The tensor to write, a few rows at a time, and the rows that are added to it."""
    import torch

    from triptych_models.assemble import missing_rows

    to = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    if source.value is not None:
        yield source.value.to(to)
        return
    rows, *rest = stored.get_shape()
    added = missing_rows(source, [rows, *rest])
    total = torch.zeros(rest, dtype=torch.float64)
    step = max(1, CHUNK // max(1, stored[:1].nbytes))
    for begin in range(0, rows, step):
        piece = stored[begin : begin + step]
        if added:
            total += piece.double().sum(0)
        yield piece.to(to)
    if added:
        yield (total / rows).to(to).expand(added, *rest)


def write_siglip_rules(vision: Path, out: Path, config: dict[str, Any]) -> None:
    """The tower's rules for images, and how many tokens an image becomes."""
    from triptych_models.assemble_siglip import siglip_processor

    rules = read_json(vision / MEDIA_RULES[0])
    side = config["vision_config"]["image_size"]
    if rules.get("size") != {"height": side, "width": side}:
        raise ValueError(
            f"--vision: {MEDIA_RULES[0]} must say a size of {side} x {side}, as config.json, got "
            f"{rules.get('size')}; take all files from one model"
        )
    write_json(out / MEDIA_RULES[0], rules)
    processor = siglip_processor(config, MEDIA_TOKENS["image_token_id"])
    write_json(out / "processor_config.json", processor)


def write_media_rules(vision: Path, out: Path, merge_size: int) -> None:
    """The tower's rules for images and videos, for so many patches a token."""
    for name in MEDIA_RULES:
        if (vision / name).is_file():
            write_json(out / name, read_json(vision / name) | {"merge_size": merge_size})


def read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
