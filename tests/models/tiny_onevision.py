"""A tiny LLaVA-OneVision on disk, documents with images in tiles and videos, stock's logits."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models import tiny
from triptych_data.media.taps import Taps, frame_taps, join_taps, square_taps, tiled_taps
from triptych_data.media.tiling import TilingRules, tile_layout

SIDE, VIDEO = 3, 295  # features a side of a tile
TILE = tiny.LLAVA_SIDE
RULES = TilingRules(TILE, SIDE, tuple((TILE * h, TILE * w) for h in (1, 2) for w in (1, 2)), 2)
Medium = tuple[str, int, int]
"""an image with its width and height, or a video with its frames and 0"""


def write_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """A LLaVA-OneVision whose tower's last features are used, as published, before a Qwen2."""
    tiny.write_qwen2_model_dir(directory, tied=tied)
    text = json.loads((directory / "config.json").read_text())
    tiny.write_llava_model_dir(directory, tied=tied)
    config = json.loads((directory / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2
    config |= {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "text_config": text,
        "video_token_index": VIDEO,
        "vision_feature_layer": -1,
        "image_grid_pinpoints": [list(size) for size in RULES.resolutions],
        "vision_aspect_ratio": f"anyres_max_{RULES.max_tiles}",
    }
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


@dataclass
class Document(tiny.Document):
    """A document, the taps of its image tokens, and what stock is told of its media."""

    taps: Taps = field(default_factory=lambda: Taps(torch.zeros(0, 4).long(), torch.zeros(0, 4)))
    media: Sequence[Medium] = ()


def document(seed: int, *, words: int, media: Sequence[Medium] = ()) -> Document:
    """Text, then each medium followed by text; every second token is a target."""
    rng = torch.Generator().manual_seed(seed)
    ids, taps, counts = torch.randint(0, 280, (words,), generator=rng).tolist(), [], []
    for kind, width, height in media:
        if kind == "video":
            taps.append(frame_taps(width, SIDE))
            counts.append(width)
        elif len([medium for medium in media if medium[0] == "image"]) > 1:
            taps.append(square_taps(SIDE))
            counts.append(1)
        else:
            layout = tile_layout(width, height, RULES)
            taps.append(tiled_taps(layout, SIDE))
            counts.append(1 + layout.grid[0] * layout.grid[1])
            assert len(taps[-1].features) == layout.num_tokens
        ids += [VIDEO if kind == "video" else tiny.IMAGE] * len(taps[-1].features)
        ids += torch.randint(0, 280, (words,), generator=rng).tolist()
    input_ids = torch.tensor(ids)
    shift_labels = torch.cat((input_ids[1:], torch.tensor([-100])))
    shift_labels[::2] = -100
    tiles = sum(counts)
    pixels = torch.randint(0, 256, (tiles * SIDE**2, 3 * tiny.LLAVA_PATCH**2), generator=rng)
    starts = [sum(counts[:i]) * SIDE**2 for i in range(len(counts))]
    return Document(
        input_ids,
        torch.arange(len(ids)).expand(3, -1),
        shift_labels,
        torch.tensor([[1, SIDE, SIDE]] * tiles, dtype=torch.int64).view(-1, 3),
        pixels.to(torch.uint8),
        *([join_taps(taps, starts)] if taps else []),
        media=media,
    )


def documents() -> list[Document]:
    """Text; an image that is shrunk; a slim one and a video; two images, text."""
    return [
        document(0, words=9),
        document(1, words=2, media=[("image", 40, 40)]),
        document(2, words=2, media=[("video", 3, 0), ("image", 40, 13)]),
        document(3, words=1, media=[("image", 9, 9), ("image", 50, 20)]),
        document(4, words=5),
    ]


def pack(documents: list[Document], seq_len: int) -> dict[str, Any]:
    """One packed row as a LLaVA-OneVision takes it."""
    batch: dict[str, Any] = tiny.pack_llava([*documents], seq_len)
    if "pixel_values" not in batch:
        return batch
    ends = torch.tensor([0, *(len(doc.pixel_values) for doc in documents)]).cumsum(0).tolist()
    taps = join_taps([doc.taps for doc in documents], ends[:-1])
    ids = batch["input_ids"][0]
    positions = ((ids == tiny.IMAGE) | (ids == VIDEO)).nonzero().flatten()
    return batch | {
        "image_positions": positions,
        "image_taps": taps.features,
        "image_tap_weights": taps.weights,
    }


def logits(stock: Any, model: Any, doc: Document) -> Tensor:
    """Logits of one document; stock takes whole tiles and sizes, and lays features out itself."""
    inputs: dict[str, Any] = {"input_ids": doc.input_ids[None]}
    if len(doc.pixel_values):
        patches = doc.pixel_values.view(len(doc.pixel_values), 3, -1).to(stock.dtype) / 255
        mean, std = (torch.tensor(x)[:, None] for x in (model.image_mean, model.image_std))
        tiles = model.whole_images(((patches - mean) / std).flatten(1))
        inputs |= stock_media(doc.media, tiles)
    found: Tensor = stock(**inputs).logits[0]
    return found


def stock_media(media: Sequence[Medium], tiles: Tensor) -> dict[str, Any]:
    """What stock takes of media whose tiles and frames (N, 3, H, W) stand one after another."""
    images = [(height, width) for kind, width, height in media if kind == "image"]
    squares, start, inputs = [], 0, dict[str, Any]()
    for kind, width, height in media:
        count = width
        if kind == "image" and len(images) > 1:
            count = 1
        elif kind == "image":
            rows, cols = tile_layout(width, height, RULES).grid
            count = 1 + rows * cols
        mine, start = tiles[start : start + count], start + count
        if kind == "video":
            inputs["pixel_values_videos"] = mine[None]
        else:
            squares.append(mine)
    if images:
        inputs["pixel_values"] = torch.stack(squares)
        inputs["image_sizes"] = torch.tensor(images)
        inputs["batch_num_images"] = torch.tensor([len(images)])
    return inputs
