"""Put a vision-language model together: a tower, a fresh projector, a language model.

    python tools/assemble_vlm.py --vision Qwen3-VL-2B --language Qwen3-1.7B --output runs/start
    python tools/assemble_vlm.py --vision VL --language LM --projector mlp --output runs/start

The tower is that of a Qwen3-VL folder, the language model a Qwen3 folder; the output is a Qwen3-VL
folder that stock transformers loads, and `stages/align.py` trains the projector of. Its logits on
text are the language model's. The projector is Qwen3-VL's: a LayerNorm and two layers, for the
features and for each DeepStack tap. pixel_unshuffle merges neighbouring patches into one token as
the tower's model did (2x2 in published ones), mlp makes a token of every patch. A single linear
layer, resamplers and the towers of other families are not offered: no stock architecture has them
before a Qwen3.

Tokenizer and generation come from the language model, media rules and chat template from the
tower's model. Special tokens that these need and the tokenizer lacks are added; their embeddings
are the mean of all others. OUTPUT is whole or absent.
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

    from triptych_models.assemble import Projector, Source

CHUNK = 1 << 26  # bytes of a tensor that is copied, read at a time
FOLDER = click.Path(path_type=Path)
MEDIA_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
FROM_LANGUAGE = ("vocab.json", "merges.txt", "special_tokens_map.json")
FROM_VISION = ("chat_template.jinja", "chat_template.json", "processor_config.json")
MEDIA_RULES = ("preprocessor_config.json", "video_preprocessor_config.json")


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.option("--vision", required=True, type=FOLDER, help="a Qwen3-VL folder")
@click.option("--language", required=True, type=FOLDER, help="a Qwen3 folder")
@click.option(
    "--projector",
    default="pixel_unshuffle",
    type=click.Choice(["pixel_unshuffle", "mlp"]),
    help="what becomes a token: neighbouring patches together, or each patch",
)
@click.option("--output", required=True, type=FOLDER, help="a new folder")
@click.option("--seed", default=0, help="of the projector")
@click.option(
    "--max-shard-bytes", default=5 * 10**9, type=click.IntRange(min=1), help="of a file of weights"
)
def main(
    vision: Path, language: Path, projector: Any, output: Path, seed: int, max_shard_bytes: int
) -> None:
    """Write OUTPUT, a Qwen3-VL of the two models' parts and a fresh projector."""
    try:
        size = assemble(vision, language, output, projector, seed, max_shard_bytes)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{output}: {size:,} bytes, projector: {projector}")


def assemble(
    vision: Path,
    language: Path,
    output: Path,
    projector: Projector = "pixel_unshuffle",
    seed: int = 0,
    max_shard_bytes: int = 5 * 10**9,
) -> int:
    """Write the folder; returns the bytes of its weights.

    Raises ValueError if `output` exists, or a folder is not of the family it must be of.
    """
    from triptych_models.assemble import vlm_config
    from triptych_models.read_config import read_config

    if output.exists():
        raise ValueError(f"--output: must not exist, got {output}; name a new directory")
    tower = read_family(read_config, vision, "qwen3_vl", "--vision")
    text = read_family(read_config, language, "qwen3", "--language")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was cut off
    partial.mkdir(parents=True)
    vocabulary = write_tokenizer(vision, language, partial)
    config = vlm_config(
        tower,
        text,
        projector,
        vocab_size=max(text.vocab_size, 1 + max(vocabulary.values())),
        token_ids={key: vocabulary[token] for key, token in MEDIA_TOKENS.items()},
    )
    size = write_weights(vision, language, partial, config, seed, max_shard_bytes)
    write_media_rules(vision, partial, config["vision_config"]["spatial_merge_size"])
    for name, folder in [
        *((name, language) for name in (*FROM_LANGUAGE, "generation_config.json")),
        *((name, vision) for name in FROM_VISION),
    ]:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, partial / name)
    facts = {"vision": str(vision), "language": str(language), "projector": projector, "seed": seed}
    write_json(partial / "assembly.json", facts)
    partial.rename(output)
    return size


def read_family(read: Any, folder: Path, family: str, option: str) -> Any:
    """The folder's configuration; ValueError that names the option if it is of another family."""
    file = folder / "config.json"
    found = json.loads(file.read_text()).get("model_type") if file.is_file() else "no config.json"
    if found != family:
        raise ValueError(f"{option}: must be a folder of a {family}, got {folder} ({found})")
    return read(folder, family)


def write_tokenizer(vision: Path, language: Path, out: Path) -> dict[str, int]:
    """The language model's tokenizer with all special tokens of media and chats; -> its ids."""
    from tokenizers import AddedToken, Tokenizer

    for folder, option in ((vision, "--vision"), (language, "--language")):
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{option}: must hold a tokenizer.json, got {folder}")
    tokenizer = Tokenizer.from_file(str(language / "tokenizer.json"))
    settings, of_vision = (read_json(f / "tokenizer_config.json") for f in (language, vision))
    needed = [*MEDIA_TOKENS.values(), *template_tokens(vision, of_vision)]
    known = tokenizer.get_vocab(with_added_tokens=True)
    missing = [token for token in dict.fromkeys(needed) if token not in known]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in missing])
    tokenizer.save(str(out / "tokenizer.json"))
    settings.pop("chat_template", None)
    settings.pop("added_tokens_decoder", None)  # as in tokenizer.json, less what was added
    settings |= {k: of_vision[k] for k in ("eos_token", "chat_template") if k in of_vision}
    settings["processor_class"] = "Qwen3VLProcessor"
    write_json(out / "tokenizer_config.json", settings)
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
            stored |= {(part, name): opened[f].get_slice(name) for name, f in files.items()}
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
