"""A LLaVA-OneVision-1.5 as its formulas say, one frame after another: the reference of its proofs.

The language model is transformers' own Qwen3; the tower is written out in matrix products.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import tiny

PATCH_DIM = 3 * 4 * 4


def write_model_dir(directory: Path, *, tied: bool = False, **fields: Any) -> Path:
    """A LLaVA-OneVision-1.5, as published folders write it: one frame a patch, a Qwen3."""
    tiny.write_text_model_dir(directory, tied=tied)
    text = json.loads((directory / "config.json").read_text())
    tiny.write_model_dir(directory)
    config = json.loads((directory / "config.json").read_text())
    vision = {
        "model_type": "rice_vit",
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": tiny.MERGE,
        "temporal_patch_size": 1,
        "text_hidden_size": 32,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
    }
    config |= {
        "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
        "model_type": "llavaonevision1_5",
        "text_config": text | {"model_type": "LLaVAOneVision1_5_text"},
        "vision_config": vision,
        "tie_word_embeddings": tied,
    }
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


def documents() -> list[tiny.Document]:
    """Text; one image; two images and what has three frames; text."""
    shapes = ((9, []), (5, [(1, 4, 6)]), (3, [(1, 8, 2), (1, 2, 2), (3, 4, 2)]), (8, []))
    return [document(i, words=n, grids=grids) for i, (n, grids) in enumerate(shapes)]


def document(seed: int, *, words: int, grids: list[tuple[int, int, int]]) -> tiny.Document:
    """As tiny's, with patches of one frame and plain positions."""
    made = tiny.document(seed, words=words, grids=grids)
    rng = torch.Generator().manual_seed(seed)
    made.pixel_values = torch.randint(0, 256, (len(made.pixel_values), PATCH_DIM), generator=rng)
    made.pixel_values = made.pixel_values.to(torch.uint8)
    made.position_ids = torch.arange(len(made.input_ids)).expand(3, -1)
    return made


def logits(stock: Any, model: Any, doc: tiny.Document) -> Tensor:
    """Logits (n, V) of one document, from the weights of stock."""
    embedded = stock.model.language_model.embed_tokens(doc.input_ids)
    if len(doc.image_grid_thw):
        pixels = doc.pixel_values.view(len(doc.pixel_values), 3, -1).to(stock.dtype) / 255
        mean, std = (torch.tensor(x)[:, None] for x in (model.image_mean, model.image_std))
        features = rice(stock, ((pixels - mean) / std).flatten(1).to(stock.dtype), doc)
        embedded = embedded.clone()
        embedded[doc.input_ids == tiny.IMAGE] = features
    positions = torch.arange(len(doc.input_ids))[None]
    states = stock.model.language_model(inputs_embeds=embedded[None], position_ids=positions)
    found: Tensor = stock.lm_head(states.last_hidden_state)[0]
    return found


def rice(stock: Any, pixels: Tensor, doc: tiny.Document) -> Tensor:
    """Features (M, H) of patches (P, patch_dim), which stand in blocks of merge_size²."""
    weights, vision = stock.model.visual.state_dict(keep_vars=True), stock.config.vision_config
    hidden, heads, merge = vision.hidden_size, vision.num_heads, vision.spatial_merge_size
    dim = hidden // heads

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def turn(x: Tensor, angles: Tensor) -> Tensor:  # (n, heads, dim)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    frequencies = torch.tensor([10000.0 ** (-4 * i / dim) for i in range(dim // 4)])
    embedding, outputs, start = weights["patch_embed.proj.weight"].flatten(1), [], 0
    for t, h, w in doc.image_grid_thw.tolist():
        block = [
            (row * merge + i, column * merge + j)
            for row in range(h // merge)
            for column in range(w // merge)
            for i in range(merge)
            for j in range(merge)
        ]
        angles = torch.stack([torch.cat((r * frequencies, c * frequencies)) for r, c in block])
        angles = torch.cat((weights["class_token.angles"], angles.to(stock.dtype)))
        for _ in range(t):
            x = pixels[start : start + h * w] @ embedding.T
            start += h * w
            x = norm(torch.cat((weights["class_token.embedding"][None], x)), "pre_layernorm")
            for i in range(vision.depth):
                y = norm(x, f"blocks.{i}.norm1")
                q, k, v = linear(y, f"blocks.{i}.attn.qkv").view(-1, 3, heads, dim).unbind(1)
                q, k = turn(q, angles).transpose(0, 1), turn(k, angles).transpose(0, 1)
                mixed = (q @ k.transpose(1, 2) / math.sqrt(dim)).softmax(-1) @ v.transpose(0, 1)
                x = x + linear(mixed.transpose(0, 1).flatten(1), f"blocks.{i}.attn.proj")
                y = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
                x = x + linear(y, f"blocks.{i}.mlp.fc2")
            y = norm(x[1:], "merger.ln_q").reshape(h * w // merge**2, -1)
            outputs.append(linear(F.gelu(linear(y, "merger.mlp.0")), "merger.mlp.2"))
    return torch.cat(outputs)
