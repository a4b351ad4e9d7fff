"""Projectors of a SigLIP tower: their formulas in fp64, and packed rows as stock computes them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.models import tiny
from triptych_models.config import ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model
from triptych_models.freeze import count_parameters
from triptych_models.generate import generate
from triptych_models.resampler import Resampler, grid_positions

SEQ_LEN = 96
SIDE, PATCHES, TOKENS = 16, 16, 4  # pixels and patches of an image, and the tokens it becomes
SETTINGS: dict[str, dict[str, Any]] = {
    "pixel_unshuffle": {"factor": 2},
    "resampler": {"num_queries": TOKENS, "num_heads": 2},
}


def write_folder(path: Path, kind: str, text: str = "qwen3") -> Path:
    """A model folder whose images have 4 x 4 patches and become 4 tokens."""
    projector = {"kind": kind, **SETTINGS[kind]}
    tiny.write_llava_model_dir(path, tied=True, model_type="llava_projector", projector=projector)
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["image_size"] = SIDE
    config["text_config"]["model_type"] = text
    config["architectures"] = ["LlavaProjectorForConditionalGeneration"]
    file.write_text(json.dumps(config))
    return path


def build(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    settings = {"path": folder, "init": "random", "seed": 3, **fields}
    return build_model(ModelConfig(**settings), dtype=dtype).train()


def documents() -> list[tiny.Document]:
    counts = [(9, 0), (1, 1), (8, 2), (5, 0)]
    return [
        tiny.llava_document(i, words=w, images=n, side=4, tokens=TOKENS)
        for i, (w, n) in enumerate(counts)
    ]


@pytest.fixture(params=SETTINGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", request.param)


def pixel_unshuffle_ref(x: Tensor, m: int) -> Tensor:
    """Features (N, s, s, C) to (N, s/m * s/m, m * m * C), block by block, row by row."""
    n, s, _, _ = x.shape
    blocks = [
        x[:, r : r + m, c : c + m].reshape(n, -1) for r in range(0, s, m) for c in range(0, s, m)
    ]
    return torch.stack(blocks, 1)


def test_a_pixel_unshuffle_is_its_formula(tmp_path: Path) -> None:
    model = build(write_folder(tmp_path / "model", "pixel_unshuffle"), torch.float64)
    x = torch.randn(3, PATCHES, 32, dtype=torch.float64)
    made = model.hf.model.multi_modal_projector
    merged = pixel_unshuffle_ref(x.view(3, 4, 4, 32), 2)
    normed = F.layer_norm(merged, (128,), made.norm.weight, made.norm.bias)
    hidden = F.gelu(normed @ made.linear_1.weight.T + made.linear_1.bias)
    wanted = hidden @ made.linear_2.weight.T + made.linear_2.bias
    torch.testing.assert_close(model.project(x), wanted, rtol=1e-12, atol=1e-12)


def test_a_resampler_is_its_formula() -> None:
    torch.manual_seed(0)
    made = Resampler(width=12, hidden_size=16, side=3, num_queries=4, num_heads=2).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 9, 12, dtype=torch.float64)
    found = made(x)

    def norm(v: Tensor, by: Any) -> Tensor:
        centred = v - v.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / spread * by.weight + by.bias

    def places(points: list[float]) -> Tensor:
        """By loops: sines and cosines of the row, then of the column, four wavelengths of each."""
        table = []
        for row in points:
            for column in points:
                angles = [[at * 10_000.0 ** (-i / 4) for i in range(4)] for at in (row, column)]
                table.append([f(a) for of in angles for f in (math.sin, math.cos) for a in of])
        return torch.tensor(table, dtype=torch.float64)

    keys = norm(x @ made.kv_proj.weight.T, made.kv_norm)
    for points in ([0, 1, 2], [0.25, 1.75]):  # in fp32
        at = grid_positions(len(points) ** 2, 3, keys)
        torch.testing.assert_close(at, places(points), atol=1e-6, rtol=0)
    at_keys, at_queries = grid_positions(9, 3, keys), grid_positions(4, 3, keys)
    q = (norm(made.query, made.query_norm) + at_queries) @ made.q_proj.weight.T + made.q_proj.bias
    k = (keys + at_keys) @ made.k_proj.weight.T + made.k_proj.bias
    v = keys @ made.v_proj.weight.T + made.v_proj.bias
    heads = [
        (q[:, h] @ k[..., h].mT / math.sqrt(8)).softmax(-1) @ v[..., h]
        for h in (slice(0, 8), slice(8, 16))
    ]
    attended = torch.cat(heads, -1) @ made.o_proj.weight.T + made.o_proj.bias
    wanted = norm(attended, made.post_norm) @ made.out_proj.weight.T
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def stock_loss(stock: Any, model: Any, chosen: list[tiny.Document]) -> Tensor:
    losses = []
    for doc in chosen:
        inputs = {"input_ids": doc.input_ids[None]}
        if len(doc.image_grid_thw):
            mean, std = (torch.tensor(x) for x in (model.image_mean, model.image_std))
            patches = doc.pixel_values.view(len(doc.pixel_values), 3, -1) / 255
            patches = (patches - mean[:, None]) / std[:, None]
            inputs["pixel_values"] = model.whole_images(patches.flatten(1)).to(stock.dtype)
        logits = stock(**inputs).logits[0]
        losses.append(F.cross_entropy(logits, doc.shift_labels, reduction="sum"))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("text", ["qwen3", "qwen2", "llama"])
def test_loss_and_gradients_are_those_of_the_whole_model(folder: Path, text: str) -> None:
    kind = json.loads((folder / "config.json").read_text())["projector"]["kind"]
    model = build(write_folder(folder, kind, text), torch.float64)
    config = AutoConfig.for_model(**model.hf.config.to_dict())
    stock = AutoModelForImageTextToText.from_config(config, dtype=torch.float64)
    stock.load_state_dict(model.hf.state_dict(), strict=True)
    for chosen in (documents(), documents()[:1]):
        model.zero_grad()
        stock.zero_grad()
        ours = model(**tiny.pack_llava(chosen, SEQ_LEN)).loss_sum
        theirs = stock_loss(stock, model, chosen)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
        ours.backward()
        theirs.backward()
        wanted = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
        largest = max(float(g.norm()) for g in wanted.values())
        for name, parameter in model.hf.named_parameters():
            if not parameter.requires_grad:
                assert "encoder.layers.2." in name or "post_layernorm" in name
                continue
            gradient = wanted.get(name, torch.zeros_like(parameter))  # of text: without a tower
            error = (parameter.grad - gradient).norm() / max(float(gradient.norm()), 1e-4 * largest)
            assert error < 1e-5, f"{name} off by {error:.1e}"


@pytest.mark.parametrize(
    ("frozen", "language", "vision"),
    [([], 3, 3), (["vision"], 3, 1), (["vision", "language"], 3, 1), (["projector"], 3, 3)],
    ids=str,
)
def test_flops_are_those_that_torch_counts(
    folder: Path, frozen: list[Any], language: int, vision: int
) -> None:
    """All but attention, which is by formula: torch takes the causal one for full."""
    model = build(folder, freeze=frozen)
    batch = tiny.pack_llava(documents(), SEQ_LEN) | {"num_targets": SEQ_LEN}  # logits of all rows
    with FlopCounterMode(display=False) as counter:
        model.logits(**tiny.inputs_only(batch)).sum().backward()
    everything = counter.get_flop_counts()["Global"].items()
    expected = sum(n for op, n in everything if "scaled_dot_product" not in str(op))
    pairs = sum(n * (n + 1) / 2 for n in batch["cu_seqlens"].diff().tolist())
    expected += 4.0 * (language * 2 * 64 * pairs + vision * 2 * 32 * 3 * PATCHES**2)
    if isinstance(model.hf.model.multi_modal_projector, Resampler):
        expected += 4.0 * 3 * 32 * 3 * TOKENS * PATCHES
    assert model.flops(batch) == expected


def test_an_export_is_what_auto_classes_load_and_answers_alike(
    folder: Path, tmp_path: Path
) -> None:
    model = build(folder)
    export(model.hf, tmp_path / "export", folder, dtype=torch.float32)
    stock, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(info.values()), info
    for name, ours in model.hf.named_parameters():
        assert torch.equal(ours, stock.state_dict()[name]), name
    again = build(tmp_path / "export", init="pretrained", freeze=["language", "vision"])
    assert again.trainable_parts() == {"projector"}
    counts = count_parameters(model)
    assert sum(counts.values()) == sum(p.numel() for p in stock.parameters())
    settings = {"max_new_tokens": 3, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    for prompt, answer in zip(documents(), generate(again, documents(), **settings), strict=True):
        alone = tiny.inputs_only(tiny.pack_llava([prompt], len(prompt.input_ids)))
        assert int(model.logits(**alone)[0, -1].argmax()) == answer[0]


@pytest.mark.parametrize(
    ("projector", "message"),
    [
        ({"kind": "pixel_unshuffle", "factor": 3}, r"must divide the 4 patches of a side, got 3"),
        ({"kind": "resampler", "num_queries": 5, "num_heads": 2}, r"must be a square, got 5"),
        ({"kind": "resampler", "num_queries": 4, "num_heads": 5}, r"a divisor of 32, got 5"),
        ({"kind": "resampler", "num_queries": 4}, r"must have a kind and its settings"),
        ({"kind": "q_former"}, r"must have a kind and its settings \(pixel_unshuffle: factor; "),
        (None, r"must have a kind and its settings"),
    ],
)
def test_projectors_that_cannot_be_are_refused(
    tmp_path: Path, projector: Any, message: str
) -> None:
    folder = write_folder(tmp_path / "model", "resampler")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"projector": projector}))
    with pytest.raises(ValueError, match=message):
        build(folder)
