"""Bagel as plain formulas, one document after the other: the reference.

Of arXiv 2505.14683 and the names of BAGEL-7B-MoT's tensors, with nothing of ours but those: every
token goes to the weights of its kind, and attention has a dense mask.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import tiny
from triptych_models.bagel.layout import lay_out

PATCH, SIDE, LATENT_SIDE, CHANNELS = 4, 5, 6, 4
WORDS_BEGIN, WORDS_END = 296, 297
TEXT, SEEN, DRAWN = 0, 1, 2


@dataclass
class BagelDocument(tiny.Document):
    """A document whose tokens are text, those of images that are seen, or latents."""

    kinds: Tensor = field(default_factory=lambda: torch.zeros(0))
    """(n,)"""
    latent_grids: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.int64))
    latents: Tensor = field(default_factory=lambda: torch.zeros(0, 4 * CHANNELS))
    latent_noise: Tensor = field(default_factory=lambda: torch.zeros(0, 4 * CHANNELS))
    latent_times: Tensor = field(default_factory=lambda: torch.zeros(0))


def write_bagel_model_dir(directory: Path, **fields: Any) -> Path:
    """config.json of a Bagel of two layers and two blocks, with its tower's one that is unused."""
    tiny.write_qwen2_model_dir(directory)
    text = json.loads((directory / "config.json").read_text())
    config = {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": "bagel",
        "llm_config": text | {"qk_norm": True, "layer_module": "Qwen2MoTDecoderLayer"},
        "vit_config": {
            "num_hidden_layers": 3,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_attention_heads": 2,
            "image_size": SIDE * PATCH,
            "patch_size": PATCH,
        },
        "vae_config": {"downsample": 8, "z_channels": CHANNELS},
        "max_latent_size": LATENT_SIDE,
        "vit_max_num_patch_per_side": SIDE,
        "text_start_token_id": WORDS_BEGIN,
        "text_end_token_id": WORDS_END,
        "image_token_id": tiny.IMAGE,
        "vision_start_token_id": tiny.START,
        "vision_end_token_id": tiny.END,
    }
    (directory / "config.json").write_text(json.dumps(config | fields))
    preprocessor = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


Part = int | tuple[int, int] | tuple[int, int, float]


def bagel_document(seed: int, *parts: Part) -> BagelDocument:
    """A number of words, images (h, w) that are seen, latents (h, w, time) that are drawn."""
    rng = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    kinds: list[int] = []
    seen, drawn, times = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, 280, (part,), generator=rng).tolist()
            kinds += [TEXT] * part
            continue
        count = part[0] * part[1]
        ids += [tiny.START, *[tiny.IMAGE] * count, tiny.END]
        kinds += [TEXT, *[SEEN if len(part) == 2 else DRAWN] * count, TEXT]
        if len(part) == 2:
            seen.append([1, *part])
        else:
            drawn.append(list(part[:2]))
            times += [part[2]] * count
    input_ids = torch.tensor(ids)
    labels = torch.cat((input_ids[1:], torch.tensor([-100])))
    labels[::2] = -100
    labels[torch.tensor(kinds) != TEXT] = -100
    labels[labels == tiny.IMAGE] = -100
    patches = sum(h * w for _, h, w in seen)
    pixels = torch.randint(0, 256, (patches, 3 * PATCH**2), generator=rng)
    return BagelDocument(
        input_ids,
        torch.arange(len(ids)).expand(3, -1),
        labels,
        torch.tensor(seen, dtype=torch.int64).view(-1, 3),
        pixels.to(torch.uint8),
        torch.tensor(kinds),
        torch.tensor(drawn, dtype=torch.int64).view(-1, 2),
        torch.randn(len(times), 4 * CHANNELS, generator=rng),
        torch.randn(len(times), 4 * CHANNELS, generator=rng),
        torch.tensor(times),
    )


def bagel_documents() -> list[BagelDocument]:
    """Text; a picture that is seen; all in one, with latents as data and twice as noise; text.

    Behind noisy latents comes text, which must not see them.
    """
    return [
        bagel_document(0, 9),
        bagel_document(1, 3, (2, 3), 4),
        bagel_document(2, 2, (1, 2), 3, (2, 2, 0.0), 2, (2, 3, 0.3), 4, (1, 3, 0.8), 2),
        bagel_document(3, 5),
    ]


def pack_bagel(documents: list[BagelDocument], seq_len: int) -> dict[str, Any]:
    """One packed row, laid out as data workers do it."""
    batch = tiny.pack(documents, seq_len)
    batch["position_ids"] = batch["position_ids"][0]
    kinds = torch.cat([doc.kinds for doc in documents])
    if "pixel_values" in batch:
        batch["image_positions"] = (kinds == SEEN).nonzero().flatten()
    if (kinds == DRAWN).any():
        batch["latent_positions"] = (kinds == DRAWN).nonzero().flatten()
        for name in ("latent_grids", "latents", "latent_noise", "latent_times"):
            batch[name] = torch.cat([getattr(doc, name) for doc in documents])
    return lay_out(batch, CONFIG)


def tiny_config() -> Any:
    from triptych_models.bagel.config import BagelConfig

    ids = {"vision_start_token_id": tiny.START, "vision_end_token_id": tiny.END}
    sides = {"max_latent_size": LATENT_SIDE, "vit_max_num_patch_per_side": SIDE}
    return BagelConfig(**ids, **sides)


CONFIG = tiny_config()


def blocks(doc: BagelDocument) -> list[tuple[int, int, bool]]:
    """Begin, end and whether it is noisy of each image, the tokens around it included."""
    found, at, time = [], 0, 0
    while at < len(doc.kinds):
        kind = int(doc.kinds[at])
        if kind == TEXT:
            at += 1
            continue
        end = at
        while doc.kinds[end] == kind:  # a token of text is behind every image
            end += 1
        found.append((at - 1, end + 1, kind == DRAWN and bool(doc.latent_times[time] > 0)))
        time += (end - at) * (kind == DRAWN)
        at = end
    return found


def visible(doc: BagelDocument) -> Tensor:
    """(n, n) bool: which tokens each one sees."""
    n = len(doc.kinds)
    sees = torch.ones(n, n, dtype=torch.bool).tril()
    for start, end, is_noisy in blocks(doc):
        sees[start:end, start:end] = True
        if is_noisy:
            sees[end:, start:end] = False
    return sees


def places(doc: BagelDocument) -> list[int]:
    """Rotary positions: an image has one."""
    inside = {at for start, end, _ in blocks(doc) for at in range(start + 1, end)}
    found, at = [], -1
    for token in range(len(doc.kinds)):
        at += token not in inside
        found.append(at)
    return found


def straight(stock: Any, model: Any, doc: BagelDocument) -> tuple[Tensor, Tensor]:
    """Logits (n, V) and velocities (latents, values) of one document."""
    p, config = dict(stock.named_parameters()), stock.config
    text, body = config.llm_config, "model.language_model."
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    size, eps = text.hidden_size // heads, text.rms_norm_eps
    is_drawn = doc.kinds == DRAWN
    x = p[f"{body}embed_tokens.weight"][doc.input_ids]
    x = x.index_put((doc.kinds == SEEN,), see(p, model, doc))
    x = x.index_put((is_drawn,), draw(p, doc))

    def norm(name: str, x: Tensor) -> Tensor:
        return p[name] * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def either(run: Callable[[str, Tensor], Tensor], name: str, x: Tensor) -> Tensor:
        """Each token by the weights that are its own."""
        name, dot, end = name.partition(".weight")
        text, drawn = (
            run(f"{name}{kind}{dot}{end}", x[which])
            for kind, which in (("", ~is_drawn), ("_moe_gen", is_drawn))
        )
        out = text.new_zeros(len(x), *text.shape[1:])
        return out.index_put((~is_drawn,), text).index_put((is_drawn,), drawn)

    def mlp(name: str, x: Tensor) -> Tensor:
        gated = F.silu(linear(f"{name}.gate_proj", x)) * linear(f"{name}.up_proj", x)
        return linear(f"{name}.down_proj", gated)

    def turn(x: Tensor) -> Tensor:
        theta = text.rope_parameters["rope_theta"]
        steps = theta ** (torch.arange(0, size, 2).float() / size)
        angle = (torch.tensor(places(doc))[:, None] / steps).to(x.dtype)[:, None]
        first, second = x.chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    for index in range(text.num_hidden_layers):
        layer = f"{body}layers.{index}."
        attn = f"{layer}self_attn."
        inner = either(norm, f"{layer}input_layernorm.weight", x)
        q = either(linear, f"{attn}q_proj", inner).unflatten(1, (heads, size))
        k, v = (
            either(linear, f"{attn}{name}_proj", inner).unflatten(1, (kv_heads, size))
            for name in "kv"
        )
        q = turn(either(norm, f"{attn}q_norm.weight", q))
        k = turn(either(norm, f"{attn}k_norm.weight", k))
        if stock.config.sparse_attention is None:
            mixed = dense(q, k, v, visible(doc)).flatten(1)
        else:
            gates = either(linear, f"{attn}g_proj", inner).sigmoid().unflatten(1, (heads, 3))
            settings = stock.config.sparse_attention
            mixed = sparse(q, k, v, gates, visible(doc), **settings).flatten(1)
        x = x + either(linear, f"{attn}o_proj", mixed)
        inner = either(norm, f"{layer}post_attention_layernorm.weight", x)
        x = x + either(mlp, f"{layer}mlp", inner)
    out = either(norm, f"{body}norm.weight", x)
    return F.linear(out, p["lm_head.weight"]), linear("model.llm2vae", out[is_drawn])


def dense(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    """Softmax attention with a mask (n, n)."""
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    sees: Tensor,
    block_size: int,
    num_selected: int,
    window: int,
) -> Tensor:
    """Native sparse attention (arXiv 2502.11089) of what each token sees, token by token.

    Blocks are those of the tokens that are seen, in their order.
    """
    group, out = q.shape[1] // k.shape[1], []
    for at, allowed in enumerate(sees):
        seen = allowed.nonzero().flatten()
        own = int((seen == at).nonzero())
        blocks = seen.split(block_size)
        means = [
            torch.stack([x[block].mean(0) for block in blocks if len(block) == block_size])
            if len(seen) >= block_size
            else x[:0]
            for x in (k, v)
        ]
        heads = []
        for head in range(q.shape[1]):
            shared = [head // group * group + other for other in range(group)]
            scores = [attend_to(q[at, other], means[0][:, head // group]) for other in shared]
            favour = torch.stack(scores).sum(0).detach()
            best, mine = favour.argsort(descending=True).tolist(), own // block_size
            order = [0, mine, max(mine - 1, 0), *best, *range(len(blocks))]
            chosen = list(dict.fromkeys(order))[:num_selected]
            picked = torch.cat([blocks[block] for block in sorted({*chosen})])
            near = seen[(torch.arange(len(seen)) - own).abs() < window]
            views = [(means[0], means[1]), (k[picked], v[picked]), (k[near], v[near])]
            found = [
                attend_to(q[at, head], keys[:, head // group]) @ values[:, head // group]
                for keys, values in views
            ]
            heads.append((gates[at, head][:, None] * torch.stack(found)).sum(0))
        out.append(torch.stack(heads))
    return torch.stack(out)


def attend_to(q: Tensor, keys: Tensor) -> Tensor:
    """Weights (K,) of a query (D,)."""
    return (keys @ q / math.sqrt(len(q))).softmax(0)


def see(p: dict[str, Tensor], model: Any, doc: BagelDocument) -> Tensor:
    """Features (P, H) of the pictures' patches."""
    body, vision = "model.vision_tower.", model.hf.config.vit_config
    dtype = p["lm_head.weight"].dtype
    found = [torch.zeros(0, model.hf.config.llm_config.hidden_size, dtype=dtype)]
    pixels = doc.pixel_values.view(-1, 3, PATCH**2).to(dtype) / 255
    mean, std = (torch.tensor(x)[:, None] for x in (model.image_mean, model.image_std))
    pixels = ((pixels - mean) / std).transpose(1, 2).flatten(1)  # as stored: p, p, 3

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, vision.layer_norm_eps)

    start = 0
    for _, h, w in doc.image_grid_thw.tolist():
        where = torch.tensor([row * SIDE + column for row in range(h) for column in range(w)])
        x = linear(f"{body}embeddings.patch_embedding", pixels[start : start + h * w])
        x = x + p[f"{body}embeddings.position_embedding.weight"][where]
        for index in range(vision.num_hidden_layers - 1):
            block = f"{body}encoder.layers.{index}."
            inner = norm(f"{block}layer_norm1", x)
            q, k, v = (
                linear(f"{block}self_attn.{name}_proj", inner).view(h * w, 2, -1) for name in "qkv"
            )
            mixed = dense(q, k, v, torch.ones(h * w, h * w, dtype=torch.bool)).flatten(1)
            x = x + linear(f"{block}self_attn.out_proj", mixed)
            inner = linear(f"{block}mlp.fc1", norm(f"{block}layer_norm2", x))
            x = x + linear(f"{block}mlp.fc2", F.gelu(inner, approximate="tanh"))
        x = linear("model.connector.fc1", norm(f"{body}post_layernorm", x))
        x = linear("model.connector.fc2", F.gelu(x, approximate="tanh"))
        found.append(x + p["model.vit_pos_embed.pos_embed"][where])
        start += h * w
    return torch.cat(found)


def draw(p: dict[str, Tensor], doc: BagelDocument) -> Tensor:
    """What stands for latent patches at their times, (L, H)."""
    dtype = p["lm_head.weight"].dtype
    where = [
        row * LATENT_SIDE + column
        for h, w in doc.latent_grids.tolist()
        for row in range(h)
        for column in range(w)
    ]

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x.to(dtype), p[f"model.{name}.weight"], p[f"model.{name}.bias"])

    times = doc.latent_times[:, None]
    angles = times * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    waves = torch.cat([angles.cos(), angles.sin()], -1)
    told = linear("time_embedder.mlp.2", F.silu(linear("time_embedder.mlp.0", waves)))
    mixed = (1 - times) * doc.latents + times * doc.latent_noise
    return linear("vae2llm", mixed) + told + p["model.latent_pos_embed.pos_embed"][where]


def straight_logits(stock: Any, model: Any, doc: BagelDocument) -> Tensor:
    return straight(stock, model, doc)[0]


def straight_loss(stock: Any, model: Any, doc: BagelDocument) -> Tensor:
    """Next tokens and velocities, summed."""
    logits, velocities = straight(stock, model, doc)
    tokens = F.cross_entropy(logits, doc.shift_labels, reduction="sum")
    wanted = doc.latent_noise - doc.latents
    errors = (velocities - wanted).square().mean(-1)
    return tokens + errors[doc.latent_times > 0].sum()
