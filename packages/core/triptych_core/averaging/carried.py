"""Config, tokenizer and processor: compared between inputs, and carried to the output."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from triptych_core.averaging.hf_folder import read_json
from triptych_core.averaging.layout import Shard
from triptych_core.averaging.stored import Source

# What may differ between models of one family and means nothing for their weights. Runs of other
# sequence lengths differ in max_position_embeddings.
_FREE = {
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "max_position_embeddings",
    "model_max_length",
    "processor_class",
    "tokenizer_file",
}
_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
# Weights in any form, and what belongs to a run and not to a model.
_LEFT = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
_LEFT_NAMES = {"averaging.json", "trainer_state.json", "README.md"}
_SHOWN = 8


def compare_small_files(sources: list[Source]) -> list[str]:
    """What differs without harm, in words; the first input's is taken.

    Raises:
        ValueError: inputs differ in their architecture, tokenizer or vocabulary.
    """
    folders = list(dict.fromkeys(source.small_files for source in sources if source.small_files))
    if not folders:
        raise ValueError(
            f"{sources[0].path}: must come with config.json and a tokenizer, got none beside it; "
            "name a Hugging Face directory of the model with --like"
        )
    notes: list[str] = []
    first = folders[0]
    for other in folders[1:]:
        _compare_json(first, other, "config.json", notes)
        _compare_tokenizers(first, other)
        for name in _TOKENIZER_SETTINGS:
            _compare_json(first, other, name, notes, skip={"chat_template"})
        for name in sorted(_carried(first) | _carried(other)):
            if name not in ("config.json", *_TOKENIZER_SETTINGS) and not _is_same(
                first / name, other / name
            ):
                notes.append(f"{name} of {other} is not that of {first}, which is taken")
    return notes


def small_files(source: Source, shards: list[Shard], like: Path | None) -> dict[str, bytes]:
    """The small files of the output, with the dtype of the weights noted in config.json."""
    folder = like or source.small_files
    assert folder is not None, "compare_small_files comes first"
    files = {name: (folder / name).read_bytes() for name in sorted(_carried(folder))}
    sizes: dict[str, int] = {}
    for shard in shards:
        for slot in shard.slots:
            if slot.dtype.is_floating_point:
                key = str(slot.dtype).removeprefix("torch.")
                sizes[key] = sizes.get(key, 0) + slot.num_bytes
    if sizes:
        config = json.loads(files["config.json"])
        _note_dtype(config, max(sizes, key=lambda key: sizes[key]))
        files["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _note_dtype(config: dict[str, Any], dtype: str) -> None:
    config.pop("torch_dtype", None)  # the name before transformers 5
    config["dtype"] = dtype
    for section in config.values():
        if isinstance(section, dict) and ("dtype" in section or "torch_dtype" in section):
            section.pop("torch_dtype", None)
            section["dtype"] = dtype


def _carried(folder: Path) -> set[str]:
    return {
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(_LEFT)
        and path.name not in _LEFT_NAMES
    }


def _compare_json(
    first: Path, other: Path, name: str, notes: list[str], skip: Collection[str] = ()
) -> None:
    one, two = _content(first / name), _content(other / name)
    found = [entry for entry in _differences("", one, two) if entry[0] not in skip]
    harmful = [text for key, text in found if key.rpartition(".")[2] not in _FREE]
    if harmful:
        raise ValueError(
            f"{other / name}: must say what {first / name} says, got {_listed(harmful)}; average "
            "models of one architecture and tokenizer"
        )
    notes.extend(f"{name}: {text} in {other}; the first input's is taken" for _, text in found)


def _compare_tokenizers(first: Path, other: Path) -> None:
    one, two = _content(first / "tokenizer.json"), _content(other / "tokenizer.json")
    ours, theirs = _vocabulary(one), _vocabulary(two)
    tokens = [
        f"{token!r} {_id(theirs.get(token))} not {_id(ours.get(token))}"
        for token in ours | theirs
        if ours.get(token) != theirs.get(token)
    ]
    if tokens:
        raise ValueError(
            f"{other}: must have the vocabulary of {first}, got {_listed(tokens)}; average models "
            "of one tokenizer"
        )
    if one != two:
        keys = [text for _, text in _differences("", one, two)]
        raise ValueError(
            f"{other / 'tokenizer.json'}: must be the tokenizer of {first}, got {_listed(keys)}; "
            "average models of one tokenizer"
        )
    for name in _TOKENIZER:
        if not _is_same(first / name, other / name):
            raise ValueError(
                f"{other / name}: must be that of {first}, got another or none; average models of "
                "one tokenizer"
            )


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Ids by token, those added later among them; a unigram model lists pairs."""
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or ()}
    return {**vocabulary, **added}


def _id(number: int | None) -> str:
    return "absent" if number is None else str(number)


def _content(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _differences(prefix: str, one: Any, two: Any) -> Iterator[tuple[str, str]]:
    if isinstance(one, dict) and isinstance(two, dict):
        for key in one | two:
            name = f"{prefix}.{key}" if prefix else str(key)
            yield from _differences(name, one.get(key), two.get(key))
    elif one != two:
        yield prefix, f"{prefix} {_short(two)} not {_short(one)}"


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_same(one: Path, two: Path) -> bool:
    if one.is_file() != two.is_file():
        return False
    return not one.is_file() or one.read_bytes() == two.read_bytes()


def _listed(texts: list[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
