from collections.abc import Iterator

import pytest
import torch
from torch import distributed

from tests.models import tiny
from tests.models.conftest import Build
from triptych_models.generate import generate, model_inputs
from triptych_models.qwen3_vl import Qwen3VL

NEW = 6


@pytest.fixture
def group() -> Iterator[None]:
    """A group of one rank, which synced generation asks whether it is done."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def greedy_by_packed_forward(model: Qwen3VL, doc: tiny.Document) -> list[int]:
    """The reference: the whole document through the packed forward for every new token."""
    new: list[int] = []
    for _ in range(NEW):
        ids = torch.cat((doc.input_ids, torch.tensor(new, dtype=torch.int64)))
        after = int(doc.position_ids.max()) + 1 + torch.arange(len(new))
        positions = torch.cat((doc.position_ids, after.expand(3, -1)), 1)
        longer = tiny.Document(
            ids, positions, torch.full_like(ids, -100), doc.image_grid_thw, doc.pixel_values
        )
        with torch.no_grad():
            logits = model.logits(**tiny.inputs_only(tiny.pack([longer], len(ids))))
        new.append(int(logits[0, -1].argmax()))
    return new


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("which", [[0, 1, 2, 3], [0, 3], [2]])
@pytest.mark.parametrize("synced", [False, True])
def test_generate_equals_greedy_by_packed_forward(
    build: Build, documents: list[tiny.Document], which: list[int], synced: bool
) -> None:
    model = build()
    prompts = [documents[i] for i in which]
    generated = generate(
        model,
        prompts,
        max_new_tokens=NEW,
        eos_token_id=tiny.VOCAB - 1,
        pad_token_id=tiny.PAD,
        synced=synced,
    )
    assert generated == [greedy_by_packed_forward(model, doc) for doc in prompts]
    assert model.training


def test_generate_stops_before_eos(build: Build, documents: list[tiny.Document]) -> None:
    model = build()
    settings = {"max_new_tokens": NEW, "pad_token_id": tiny.PAD}
    free = generate(model, documents[:1], eos_token_id=tiny.VOCAB - 1, **settings)[0]
    stopped = generate(model, documents[:1], eos_token_id=[tiny.EOS, free[3]], **settings)[0]
    assert stopped == free[: free.index(free[3])]


def test_generate_after_a_step_leaves_the_packed_forward_as_it_was(
    build: Build, documents: list[tiny.Document]
) -> None:
    model = build()
    batch = tiny.pack(documents, 96)
    before = model(**batch).loss_sum
    generate(model, documents, max_new_tokens=2, eos_token_id=tiny.EOS, pad_token_id=tiny.PAD)
    assert torch.equal(model(**batch).loss_sum, before)


@pytest.mark.usefixtures("group")
def test_no_prompts_keep_in_step_only_when_synced(build: Build) -> None:
    model = build()
    settings = {"max_new_tokens": 2, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    assert generate(model, [], **settings) == []
    assert generate(model, [], synced=True, **settings) == []
    inputs = model_inputs(model, [], tiny.PAD, force_image=True)
    assert inputs["input_ids"].tolist() == [[tiny.IMAGE, tiny.PAD]]
    assert inputs["attention_mask"].tolist() == [[0, 1]]
