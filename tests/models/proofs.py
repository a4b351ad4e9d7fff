"""What each family's proofs need: an entry of about ten lines, run by test_families.py.

`write` makes a tiny folder; `documents` are a memorisation set in which every modality occurs, and
a document of text alone; `pack` puts some of them into one row; `logits` are stock's for one of
them.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.models import straight_rice, tiny, tiny_audio, tiny_onevision
from tests.models.stock import stock_logits
from tests.models.straight_bagel import (
    bagel_documents,
    pack_bagel,
    straight_logits,
    straight_loss,
    visible,
    write_bagel_model_dir,
)
from triptych_models.layout import decoder, head_dim, text_config

SEQ_LEN = 112


class Proof(NamedTuple):
    write: Callable[..., Path]
    documents: Callable[[], list[Any]]
    pack: Callable[[list[Any], int], dict[str, Any]]
    logits: Callable[[Any, Any, Any], Tensor] = stock_logits
    """(stock, model, document) -> (n, V)"""
    loss: Callable[[Any, Any, Any], Tensor] | None = None
    """(stock, model, document) -> () summed; None: next tokens by the logits"""
    idle: tuple[str, ...] = ()
    """what stock runs or holds behind the features that are used: it does not train"""
    rounding: float = 1e-5
    """between gradients of a parameter and stock's, as a share"""
    learns: float = 0.1
    """loss a target after 60 updates, from about 6"""
    wasted: Callable[[Any, list[int]], float] = lambda stock, lengths: 0.0
    """(stock, lengths of documents) -> FLOPs that stock spends otherwise than we count, beside
    what attention need not look at"""
    is_all_counted: Callable[[Any], bool] = lambda document: True
    """whether we count all that stock computes of a document's media: it may pad them"""


def texts() -> list[tiny.Document]:
    """Four of 9, 1, 20 and 11 tokens."""
    return [tiny.document(seed, words=words) for seed, words in enumerate((9, 1, 20, 11))]


def pictures() -> list[tiny.Document]:
    """Text, one image, two images of other shapes, text."""
    shapes = ((9, []), (5, [(1, 4, 6)]), (4, [(1, 8, 2), (1, 2, 2)]), (11, []))
    return [tiny.document(i, words=n, grids=grids) for i, (n, grids) in enumerate(shapes)]


def squares(side: int = 3, tokens: int = 9) -> list[tiny.Document]:
    """Text, one image, two images, text; all images of one size."""
    counts = [(9, 0), (1, 1), (8, 2), (5, 0)]
    settings = {"side": side, "tokens": tokens}
    return [
        tiny.llava_document(i, words=w, images=n, **settings) for i, (w, n) in enumerate(counts)
    ]


def llava_logits(stock: Any, model: Any, doc: tiny.Document) -> Tensor:
    """Logits of one document; stock takes whole images."""
    inputs: dict[str, Tensor] = {"input_ids": doc.input_ids[None]}
    if len(doc.image_grid_thw):
        patches = doc.pixel_values.view(len(doc.pixel_values), 3, -1).to(stock.dtype) / 255
        mean, std = (torch.tensor(x)[:, None] for x in (model.image_mean, model.image_std))
        inputs["pixel_values"] = model.whole_images(((patches - mean) / std).flatten(1))
    logits: Tensor = stock(**inputs).logits[0]
    return logits


def wasted_attention(config: Any, lengths: list[int]) -> float:
    """FLOPs that stock's eager attention spends on pairs no token may look at, with backward."""
    text = text_config(config)
    width = text.num_attention_heads * head_dim(text)
    pairs = sum(n * n - n * (n + 1) // 2 for n in lengths)
    layers = text.num_hidden_layers
    if "linear_attention" in (types := getattr(text, "layer_types", None) or ()):
        layers = types.count("full_attention")
    return 3 * 4.0 * layers * width * pairs


def wasted_chunks(stock: Any, lengths: list[int]) -> float:
    """Of stock's Gated DeltaNet layers: all that are no linears, less three products a token."""
    layers = [x.linear_attn for x in decoder(stock).layers if hasattr(x, "linear_attn")]
    one = copy.deepcopy(layers[0])
    weights = sum(m.weight.numel() for m in one.modules() if isinstance(m, torch.nn.Linear))
    state = one.num_v_heads * one.head_k_dim * one.head_v_dim
    with FlopCounterMode(display=False) as counter:
        for n in lengths:
            one(torch.randn(1, n, one.hidden_size, requires_grad=True)).sum().backward()
    times = 3 if one.out_proj.weight.requires_grad else 2  # frozen: no gradients of weights
    counted = counter.get_total_flops() - sum(lengths) * (times * 2 * weights + 3 * 6 * state)
    return len(layers) * counted


def wasted_on_images(stock: Any, lengths: list[int]) -> float:
    """What the pairs of Bagel's documents with images are fewer, or more, than causal ones."""
    text, pairs = stock.config.llm_config, 0
    for doc in bagel_documents():
        n = len(doc.input_ids)
        pairs += n * (n + 1) // 2 - int(visible(doc).sum()) if len(doc.image_grid_thw) else 0
    return 3 * 4.0 * text.num_hidden_layers * text.hidden_size * pairs


def write_unshuffled(directory: Path, **fields: Any) -> Path:
    """A LLaVA whose projector unshuffles 2 x 2 of its 4 x 4 patches."""
    fields |= {"model_type": "llava_projector"}
    fields |= {"projector": {"kind": "pixel_unshuffle", "factor": 2}}
    tiny.write_llava_model_dir(directory, **fields)
    config = json.loads((directory / "config.json").read_text())
    config["vision_config"]["image_size"] = 4 * tiny.LLAVA_PATCH
    (directory / "config.json").write_text(json.dumps(config))
    return directory


SIGLIP_IDLE = ("encoder.layers.2.", "post_layernorm")

PROOFS: dict[str, Proof] = {
    "aero": Proof(
        tiny_audio.write_aero_model_dir,
        tiny_audio.heard_only,
        tiny_audio.pack_heard,
        logits=tiny_audio.aero_logits,
        idle=("embed_positions.",),
        is_all_counted=lambda doc: doc.audio_lengths.tolist() == [2 * tiny_audio.PLACES],
    ),
    "bagel": Proof(
        write_bagel_model_dir,
        bagel_documents,
        pack_bagel,
        logits=straight_logits,
        loss=straight_loss,
        idle=("pos_embed.pos_embed",),
        wasted=wasted_on_images,
    ),
    "dots1": Proof(tiny.write_dots1_model_dir, texts, tiny.pack_text),
    "internvl": Proof(
        tiny.write_internvl_model_dir,
        lambda: squares(4, 4),
        tiny.pack_llava,
        logits=llava_logits,
    ),
    "llava": Proof(
        tiny.write_llava_model_dir,
        squares,
        tiny.pack_llava,
        logits=llava_logits,
        idle=SIGLIP_IDLE,
    ),
    "llava_onevision": Proof(
        tiny_onevision.write_model_dir,
        tiny_onevision.documents,
        tiny_onevision.pack,
        logits=tiny_onevision.logits,
        idle=("post_layernorm",),
    ),
    "llavaonevision1_5": Proof(
        straight_rice.write_model_dir,
        straight_rice.documents,
        tiny.pack_llava,
        logits=straight_rice.logits,
    ),
    "llava_projector": Proof(
        write_unshuffled,
        lambda: squares(4, 4),
        tiny.pack_llava,
        logits=llava_logits,
        idle=SIGLIP_IDLE,
    ),
    "mixtral": Proof(tiny.write_mixtral_model_dir, texts, tiny.pack_text),
    "qwen2": Proof(tiny.write_qwen2_model_dir, texts, tiny.pack_text),
    "qwen2_5_omni_thinker": Proof(
        tiny_audio.write_qwen2_5_omni_model_dir,
        tiny_audio.heard_and_seen,
        tiny_audio.pack,
        logits=tiny_audio.omni_logits,
        idle=("audio_bos_eos_token.",),
    ),
    "qwen2_5_vl": Proof(tiny.write_qwen2_5_vl_model_dir, pictures, tiny.pack),
    "qwen2_moe": Proof(tiny.write_qwen2_moe_model_dir, texts, tiny.pack_text),
    "qwen3": Proof(tiny.write_text_model_dir, texts, tiny.pack_text),
    "qwen3_5": Proof(
        tiny.write_qwen3_5_vl_model_dir,
        pictures,
        tiny.pack,
        wasted=wasted_chunks,
        rounding=2e-4,  # stock's delta rule is in fp32 whatever the dtype; below it the tower
    ),
    "qwen3_5_moe": Proof(
        tiny.write_qwen3_5_vl_moe_model_dir,
        pictures,
        tiny.pack,
        wasted=wasted_chunks,
        rounding=2e-4,
    ),
    "qwen3_5_moe_text": Proof(
        tiny.write_qwen3_5_moe_model_dir, texts, tiny.pack_text, wasted=wasted_chunks
    ),
    "qwen3_5_text": Proof(
        tiny.write_qwen3_5_model_dir, texts, tiny.pack_text, wasted=wasted_chunks
    ),
    "qwen3_moe": Proof(tiny.write_moe_model_dir, texts, tiny.pack_text),
    "qwen3_next": Proof(
        tiny.write_qwen3_next_model_dir, texts, tiny.pack_text, wasted=wasted_chunks
    ),
    "qwen3_omni_moe_thinker": Proof(
        tiny_audio.write_qwen3_omni_model_dir,
        tiny_audio.heard_in_chunks,
        tiny_audio.pack,
        logits=tiny_audio.omni_logits,
    ),
    "qwen3_vl": Proof(tiny.write_model_dir, pictures, tiny.pack),
    "qwen3_vl_moe": Proof(tiny.write_vl_moe_model_dir, pictures, tiny.pack),
}
