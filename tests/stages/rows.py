"""Rows that layouts are compared on: ragged packs of documents, as the data package gives them.

Documents and images across every border of shared rows, a row of text alone, one whose targets are
all in the first part, one whose images are all in the last, one of nothing but padding, one of an
image alone, one without a target, one with a single target.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.models import tiny, tiny_audio
from tests.models.tiny import Document, document

SEQ_LEN = 128


def has_images(folder: Path) -> bool:
    """Whether the model in a folder sees images."""
    return "vision_config" in read(folder)


def has_experts(folder: Path) -> bool:
    """Whether the model in a folder is a mixture of experts."""
    config = read(folder)
    text = config.get("text_config", config)
    return "num_experts_per_tok" in text


def has_biases(folder: Path) -> bool:
    """Whether its experts are chosen by score + bias."""
    return "n_routed_experts" in read(folder)


def read(folder: Path) -> dict[str, Any]:
    """Its config.json."""
    return json.loads((folder / "config.json").read_text())


def documents(images: bool = True) -> list[list[Document]]:
    """The documents of eight rows, with images or of text alone."""
    text = [document(5, words=5), document(6, words=110)]
    first_only = [document(7, words=18), document(8, words=12)]
    straddling = [
        document(1, words=20),
        document(2, words=3, grids=[(1, 4, 6)]),  # its image is cut at 32
        document(3, words=4, grids=[(1, 8, 2), (1, 12, 4), (1, 2, 2), (2, 4, 4)]),
        document(4, words=11),
    ]
    last_only = [document(9, words=99), document(10, words=4, grids=[(1, 4, 4), (1, 4, 2)])]
    alone = document(13, words=0, grids=[(1, 8, 8)])
    silent = document(14, words=20, grids=[(1, 4, 4)] if images else [])
    silent.shift_labels[:] = -100
    one_target = document(12, words=90)
    one_target.shift_labels[:-3] = -100
    if images:
        return [straddling, text, first_only, last_only, [], [alone], [silent], [one_target]]
    several, short = [*text, document(11, words=3)], [document(13, words=3)]
    return [several, first_only, text[:1], text, [], short, [silent], [one_target]]


HEARD = {
    "aero": (tiny_audio.heard_only, tiny_audio.pack_heard),
    "qwen2_5_omni_thinker": (tiny_audio.heard_and_seen, tiny_audio.pack),
    "qwen3_omni_moe_thinker": (tiny_audio.heard_in_chunks, tiny_audio.pack),
}
"""Documents of models that hear, by model_type, and how they are packed."""


def heard_rows(model_type: str) -> list[dict[str, Any]]:
    """Four: of text, of recordings, of all media, of nothing but padding."""
    documents, pack = HEARD[model_type]
    text, mixed, heard, both = documents()
    return packed([[text], [heard], [both, text, mixed], []], pack)


def rows(images: bool = True) -> list[dict[str, Any]]:
    """`documents`, packed."""
    return packed(documents(images), tiny.pack if images else tiny.pack_text)


def packed(chosen: list[list[Any]], pack: Callable[[list[Any], int], Any]) -> list[dict[str, Any]]:
    """Rows of these documents, with what is counted and named."""
    made = [pack(row, SEQ_LEN) for row in chosen]
    for number, (row, held) in enumerate(zip(made, chosen, strict=True)):
        row["num_tokens"] = int((row["input_ids"] != tiny.PAD).sum())
        row["sample_keys"] = []
        row["sample_ids"] = [10 * number + i for i in range(len(held))]
    return made


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Rows for the model in a folder."""
    if "audio_config" in read(folder):
        return heard_rows(read(folder)["model_type"])
    return rows(has_images(folder))


def forward_of(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a row a model's forward takes."""
    labels = ("num_tokens", "sample_keys", "sample_ids")
    return {name: x for name, x in batch.items() if name not in labels}


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    """Of all gradients together."""
    return torch.stack([g.norm() for g in gradients.values()]).norm().item()


def build(folder: Path, **settings: Any) -> Any:
    """The model in a folder, with the random weights that all layouts begin with."""
    from triptych_models.config import ModelConfig
    from triptych_models.families import build_model

    settings = {"dtype": torch.float32} | settings
    return tilt(build_model(ModelConfig(path=folder, init="random", seed=3), **settings))


def tilt(model: Any) -> Any:
    """The model, with biases that choose experts, where it has any, as after some steps."""
    from triptych_models.expert_weights import router_biases

    for bias in router_biases(model).values():
        bias.copy_(torch.linspace(-0.02, 0.02, len(bias)))
    return model
