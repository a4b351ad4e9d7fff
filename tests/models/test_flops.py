import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models import tiny
from tests.models.conftest import Build
from triptych_models.qwen3_vl import Qwen3VL

ATTENTION = "scaled_dot_product"
TEXT_LAYERS, TEXT_DIM, VISION_LAYERS, VISION_DIM = 2, 64, 2, 32


def counted(model: Qwen3VL, batch: dict) -> int:
    """Matmul FLOPs torch sees in forward and backward, all but attention; every row a target."""
    inputs = tiny.inputs_only(batch)
    with FlopCounterMode(display=False) as counter:
        model.logits(**inputs).float().sum().backward()
    with FlopCounterMode(display=False) as rotary:  # old releases make the angles by matmul
        model.hf.model.language_model.rotary_emb(torch.zeros(1), inputs["position_ids"])
    everything = counter.get_flop_counts()["Global"].items()
    linear = sum(n for operator, n in everything if ATTENTION not in str(operator))
    return linear - rotary.get_total_flops()


def attention_flops(batch: dict, *, language: int, vision: int) -> float:
    """By formula: 2 matmuls, 2 FLOPs per multiply-add, × (forward + 2 × backward) as told."""
    lengths = batch["cu_seqlens"].diff().tolist()
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    frames = batch["vision_cu_seqlens"].diff().tolist() if "vision_cu_seqlens" in batch else []
    squares = sum(n * n for n in frames)
    return 4.0 * (
        language * TEXT_LAYERS * TEXT_DIM * pairs + vision * VISION_LAYERS * VISION_DIM * squares
    )


@pytest.mark.parametrize(
    ("frozen", "language", "vision"),
    [
        ([], 3, 3),
        (["vision"], 3, 1),
        (["vision", "language"], 3, 1),
        (["vision", "projector"], 3, 1),
        (["projector"], 3, 3),
    ],
)
def test_flops_equal_what_torch_counts(
    build: Build, documents: list[tiny.Document], frozen: list[str], language: int, vision: int
) -> None:
    model = build(freeze=frozen)
    batch = tiny.pack(documents, 96)
    batch["num_targets"] = 96  # the counted model computes every row's logits
    expected = counted(model, batch) + attention_flops(batch, language=language, vision=vision)
    assert model.flops(batch) == expected


def test_head_counts_rows_with_a_target(build: Build, documents: list[tiny.Document]) -> None:
    model = build()
    batch = tiny.pack(documents, 96)
    fewer = model.flops(batch | {"num_targets": batch["num_targets"] - 1})
    assert model.flops(batch) - fewer == 3 * 2 * 32 * tiny.VOCAB


def test_dummy_image_of_a_text_only_row_is_not_counted(
    build: Build, documents: list[tiny.Document]
) -> None:
    model = build()
    batch = tiny.pack(documents[:1], 32)
    layer = 32 * (2 * 64 + 2 * 32 + 3 * 48)
    linear = 3 * 2 * (TEXT_LAYERS * layer * 32 + 32 * tiny.VOCAB * batch["num_targets"])
    assert model.flops(batch) == linear + attention_flops(batch, language=3, vision=3)


def test_all_frozen_costs_forward_only(build: Build, documents: list[tiny.Document]) -> None:
    batch = tiny.pack(documents, 96)
    frozen = build(freeze=["vision", "projector", "language"]).flops(batch)
    embedding = 2 * tiny.PATCH_DIM * 32 * len(batch["pixel_values"])  # no gradient to pixels
    assert build().flops(batch) == 3 * frozen - embedding
    assert isinstance(frozen, float)
    assert not torch.is_tensor(frozen)
