"""What LLaVA-OneVision has of its own: shared rows of tiles, names of older folders, refusals."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist

from tests.models import tiny_onevision
from tests.models.test_text import shake
from tests.ranks import run_ranks
from triptych_models.config import ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model
from triptych_models.sequence import ALONE, SequenceGroup
from triptych_models.sequence_batch import take_part

SEQ_LEN = 112


def build(folder: Path, sequence: SequenceGroup = ALONE, **settings: Any) -> Any:
    config = ModelConfig(path=folder, **{"init": "random", "seed": 3, **settings})
    return build_model(config, dtype=torch.float32, sequence=sequence)


def test_a_row_that_two_ranks_share_is_one_row(tmp_path: Path) -> None:
    """Tiles are dealt to ranks, and a token may be made of features of tiles of both."""
    folder = tiny_onevision.write_model_dir(tmp_path / "tiny")
    assert run_ranks(errors_of_sharing, 2, folder) == ["", ""]


def errors_of_sharing(folder: Path) -> str:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    group = SequenceGroup(dist.group.WORLD.group_name, 2, dist.get_rank())
    plain, shared = build(folder).train(), build(folder, group).train()
    for model in (plain, shared):
        shake(model)
    documents, errors = tiny_onevision.documents(), ""
    for chosen in (documents, documents[:1]):  # the second has no image
        batch = tiny_onevision.pack(chosen, SEQ_LEN)
        part = take_part(batch, group)
        assert part["input_ids"].shape[1] == SEQ_LEN // 2
        for model, row in ((plain, batch), (shared, part)):
            model.zero_grad()
            model(**row).loss_sum.backward()
        for (name, p), q in zip(shared.named_parameters(), plain.parameters(), strict=True):
            if p.requires_grad:
                dist.all_reduce(p.grad)
                if (p.grad - q.grad).norm() > 1e-5 * q.grad.norm() + 1e-6:
                    errors += f"{name} "
    dist.destroy_process_group()
    return errors


def test_folders_of_transformers_4_are_read(tmp_path: Path) -> None:
    model = build(tiny_onevision.write_model_dir(tmp_path / "tiny"))
    export(model.hf, tmp_path / "old", tmp_path / "tiny", dtype=torch.float32)
    file = tmp_path / "old/model.safetensors"
    stored = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(file).items()
    }
    assert "vision_tower.vision_model.embeddings.patch_embedding.bias" in stored
    save_file(stored, file, metadata={"format": "pt"})
    again = build(tmp_path / "old", init="pretrained")
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_the_line_break_is_a_part_of_the_projector(tmp_path: Path) -> None:
    model = build(tiny_onevision.write_model_dir(tmp_path / "tiny"), freeze=["projector"])
    newline = dict(model.named_parameters())["hf.model.image_newline"]
    assert not newline.requires_grad and newline is model.line_break.vector
    assert 0.5 < newline.std() * newline.numel() ** 0.5 < 1.5  # normal(0, 1 / sqrt(hidden_size))
    model.to(torch.bfloat16)
    assert model.line_break.vector is model.hf.model.image_newline
    assert model.line_break(torch.zeros(2, 32)).dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_aspect_ratio": "pad"}, "vision_aspect_ratio must be anyres_max_ and a number"),
        ({"vision_feature_select_strategy": "default"}, "must be full for a llava_onevision"),
        ({"vision_feature_layer": [-1, -2]}, "must be the number of a block"),
    ],
)
def test_other_ones_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(tiny_onevision.write_model_dir(tmp_path / "other", **fields))
