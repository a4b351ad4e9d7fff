"""Of models that hear, what test_families does not see: whole folders, chunks, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as stock_omni

from tests.models import tiny_audio
from tests.models.proofs import PROOFS
from triptych_models.audio_tower import lay_out
from triptych_models.config import ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model
from triptych_models.packed import PackedModel
from triptych_models.sequence import SequenceGroup

WRITERS = {
    "qwen2_5_omni": tiny_audio.write_qwen2_5_omni_model_dir,
    "qwen3_omni_moe": tiny_audio.write_qwen3_omni_model_dir,
}
BESIDE = {"qwen2_5_omni": "token2wav.x.weight", "qwen3_omni_moe": "code2wav.x.weight"}


@pytest.fixture(params=WRITERS)
def whole(request: pytest.FixtureRequest) -> str:
    """The model_type of a folder that speaks, too."""
    return str(request.param)


@pytest.fixture
def model(tmp_path: Path, whole: str) -> PackedModel:
    folder = WRITERS[whole](tmp_path / "tiny")
    return build_model(ModelConfig(path=folder, init="random"), dtype=torch.float32)


def test_a_whole_folder_is_read_for_its_thinker(
    model: PackedModel, whole: str, tmp_path: Path
) -> None:
    """Names and configuration as the hub has them, beside the talker's; as stock's thinker does."""
    export(model.hf, tmp_path / "thinker", tmp_path / "tiny", dtype=torch.float32)
    tensors = load_file(tmp_path / "thinker/model.safetensors")
    folder = tmp_path / "whole"
    folder.mkdir()
    stored = {f"thinker.{name}": tensor for name, tensor in tensors.items()}
    stored |= {"talker.model.norm.weight": torch.ones(4), BESIDE[whole]: torch.ones(2)}
    shutil.copy(tmp_path / "tiny/preprocessor_config.json", folder)
    config = {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": whole,
        "thinker_config": json.loads((tmp_path / "thinker/config.json").read_text()),
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    assert ModelConfig(path=folder).find_family() == f"{whole}_thinker"
    read = build_model(ModelConfig(path=folder), dtype=torch.float32)
    stock, found = type(read).hf_class.from_pretrained(folder, output_loading_info=True)  # type: ignore[attr-defined]
    assert not found["missing_keys"] and not found["unexpected_keys"]
    for name, parameter in model.hf.named_parameters():
        assert torch.equal(parameter, read.hf.get_parameter(name)), name
        assert torch.equal(parameter, stock.get_parameter(name)), name
    export(read.hf, tmp_path / "again", folder, dtype=torch.float32)
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert again["model_type"] == f"{whole}_thinker"
    assert load_file(tmp_path / "again/model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("lengths", [[1], [2, 3], [8], [16, 9, 7], [5, 24, 1, 23]])
def test_chunks_are_stocks(lengths: list[int]) -> None:
    each = torch.tensor(lengths)
    chunks = lay_out(each, 8)
    features = torch.arange(1.0, 1 + sum(lengths))[None]  # of one band
    padded, cut = stock_omni.chunk_and_pad_features(features, each, 4)
    ours = torch.nn.functional.pad(features.T, (0, 0, 0, 1))[chunks.frames].mT
    widest = padded.shape[2]
    assert torch.equal(ours[:, :, :widest], padded) and not ours[:, :, widest:].any()
    assert chunks.is_frame.sum(1).tolist() == cut.tolist()
    assert torch.equal(chunks.cu_seqlens, stock_omni.get_audio_cu_seqlens(cut))
    assert torch.equal(chunks.pooled, stock_omni.get_pool_indices(each))
    halved = (widest - 1) // 2 + 1  # what stock has of a chunk, where we have 4
    kept = stock_omni.get_valid_indices(cut)
    assert torch.equal(chunks.kept, kept // halved * 4 + kept % halved)


def test_positions_are_fp32_in_a_bf16_model(model: PackedModel) -> None:
    before = model.hf.model.audio_tower.positional_embedding.positional_embedding
    after = model.bfloat16().hf.model.audio_tower.positional_embedding.positional_embedding
    assert after.dtype == torch.float32 and torch.equal(before, after)


@pytest.mark.parametrize("family", ["aero", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_ranks_that_share_a_row_share_its_recordings(family: str, tmp_path: Path) -> None:
    """Each is heard once; features come as many as there are tokens, in their order."""
    proof = PROOFS[family]
    config = ModelConfig(path=proof.write(tmp_path / "tiny"), init="random")
    model: Any = build_model(config, dtype=torch.float32)
    row, parts = proof.pack(proof.documents(), 112), []
    for rank in range(4):
        model.sequence = SequenceGroup("", 4, rank)
        parts.append(model.take_part(row))
    heard = [part for part in parts if "audio_features" in part]
    assert 1 < len(heard) < 5
    for name in ("audio_features", "audio_lengths"):
        assert torch.equal(torch.cat([part[name] for part in heard]), row[name])
    places = [part["audio_positions"] + 28 * rank for rank, part in enumerate(parts)]
    assert torch.equal(torch.cat(places), row["audio_positions"])
    sends, receives = (torch.tensor([part[f"audio_{n}"] for part in parts]) for n in WAYS)
    assert torch.equal(sends, receives.T)
    assert sends.sum(1).tolist() == [
        int(model.audio_tokens(part["audio_lengths"]).sum()) if "audio_lengths" in part else 0
        for part in parts
    ]
    assert receives.sum(1).tolist() == [len(part["audio_positions"]) for part in parts]


WAYS = ("sends", "receives")
