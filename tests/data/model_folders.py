"""Model folders with other templates and control tokens: the tiny tokenizer, real templates."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.data.packs import MODEL

TEMPLATES = Path(__file__).parent / "templates"


class Family(NamedTuple):
    """A template's control tokens: special ones, and added ones that are not special."""

    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = "<|im_end|>"
    image: str | None = None


_QWEN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
FAMILIES = {
    "qwen3": Family((), (*_QWEN, "<think>", "</think>")),
    "qwen3_vl": Family((), _QWEN),
    "gptoss": Family(
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
        eos="<|return|>",
    ),
    "phi3": Family(
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), bos="<s>", eos="<|endoftext|>"
    ),
    "smolvlm": Family(("<end_of_utterance>", "<image>"), eos="<end_of_utterance>", image="<image>"),
    "llama_like": Family(("<|start|>", "<|header|>", "<|eot|>"), bos="<bos>", eos="<|eot|>"),
    "gemma_like": Family(("<turn>", "</turn>"), bos="<bos>", eos="</turn>"),
    "deepseek_like": Family(
        ("<｜eos｜>",),
        (
            "<｜User｜>",
            "<｜Assistant｜>",
            "<｜call｜>",
            "<｜call_end｜>",
            "<｜result｜>",
            "<｜result_end｜>",
        ),
        bos="<｜bos｜>",
        eos="<｜eos｜>",
    ),
    "generation_like": Family((), ("<think>", "</think>")),
}


def family_folder(path: Path, name: str) -> Path:
    """The tiny tokenizer with the control tokens and the template of a family."""
    family = FAMILIES[name]
    template = (TEMPLATES / f"{name}.jinja").read_text()
    special = [*family.special, *([family.bos] if family.bos else []), family.eos]
    settings: dict[str, Any] = {"bos_token": family.bos, "eos_token": family.eos}
    if family.image:
        settings["extra_special_tokens"] = {"image_token": family.image}
    return model_folder(path, template, special, family.added, **settings)


def model_folder(
    path: Path,
    template: str,
    special: Sequence[str] = (),
    added: Sequence[str] = (),
    **settings: Any,
) -> Path:
    """A copy of the tiny model's tokenizer with more tokens, another template, other settings."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(MODEL / name, path / name)
    (path / "chat_template.jinja").write_text(template)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokens = tokenizer["added_tokens"]
    known = {token["content"] for token in tokens}
    for content in dict.fromkeys([*special, *added]):
        if content not in known:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            number = tokens[-1]["id"] + 1
            tokens.append(
                {"id": number, "content": content, **flags, "special": content in special}
            )
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
