"""The contracts between packages that never import each other."""

import inspect
import json

import pytest
import torch

from tests.tiny import ROOT, make_model_dir, make_shards
from triptych_core.loop import HOST_KEYS, LABEL_KEYS
from triptych_data.config import DataConfig
from triptych_data.loader import PackLoader
from triptych_data.processor import Processor
from triptych_data.shards.write import write_shards
from triptych_models.config import ModelConfig
from triptych_models.families import build_shell
from triptych_models.masked_diffusion.config import DiffusionConfig
from triptych_models.masked_diffusion.noise import MaskRow
from triptych_models.qwen3 import Qwen3
from triptych_models.qwen3_vl import Qwen3VL

TEXT_MODEL = ROOT / "stages/configs/qwen3_tiny"

OF_JOINED = {"sample_epochs", "streams"}  # of rows that are joined of two streams, as a Bagel's


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    path = tmp_path_factory.mktemp("contract")
    processor = Processor.from_directory(make_model_dir(path / "model"))
    shards = str(make_shards(path / "data", 9))
    config = DataConfig(shards=[shards], seq_len=256, num_workers=0)
    loader = PackLoader(config, processor, rank=0, world_size=1)
    return [batch for batch, _ in zip(loader, range(8), strict=False)]


def test_every_key_of_a_batch_is_taken_by_forward_or_dropped_by_the_loop(batches):
    taken = set(inspect.signature(Qwen3VL.forward).parameters)
    taken |= set(inspect.signature(Qwen3VL.hidden_states).parameters)
    made = {key for batch in batches for key in batch}
    assert "pixel_values" in made
    assert made - taken == LABEL_KEYS - OF_JOINED
    assert made >= HOST_KEYS - {"audio_lengths"}  # of recordings, of which these chats have none


def test_a_model_of_text_alone_takes_every_key_of_a_batch_of_documents(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a b", "c")))
    write_shards(tmp_path / "x.jsonl", tmp_path / "shards")
    config = DataConfig(shards=[str(tmp_path / "shards")], seq_len=64, num_workers=0)
    processor = Processor.from_directory(TEXT_MODEL)
    batch = next(iter(PackLoader(config, processor, rank=0, world_size=1)))
    assert batch["position_ids"].shape == (1, 64)
    taken = set(inspect.signature(Qwen3.forward).parameters)
    taken |= set(inspect.signature(Qwen3.hidden_states).parameters)
    assert batch.keys() - taken == LABEL_KEYS - OF_JOINED
    of_diffusion = {"target_weights", "num_masked"}
    assert batch.keys() >= taken - {"self", "batch", "sequence", "settings"} - of_diffusion
    finish = MaskRow(DiffusionConfig(), mask_token_id=511, seed=0)
    masked = next(iter(PackLoader(config, processor, rank=0, world_size=1, finish=finish)))
    assert masked.keys() == batch.keys() | of_diffusion


def test_a_processor_of_another_model_is_refused(tmp_path):
    images = make_model_dir(tmp_path / "vl")
    models = {}
    for name, path in (("vl", images), ("text", TEXT_MODEL)):
        config = ModelConfig(path=path, init="random")
        models[name] = build_shell(config, dtype=torch.float32)
        models[name].check_processor(Processor.from_directory(path))
    with pytest.raises(ValueError, match="a model of text alone must have no preprocessor files"):
        models["text"].check_processor(Processor.from_directory(images))
    with pytest.raises(ValueError, match="patch_size of the processor files must be"):
        models["vl"].check_processor(Processor.from_directory(TEXT_MODEL))
    processor = Processor.from_directory(TEXT_MODEL)
    processor.vocab_size = 513
    with pytest.raises(ValueError, match=r"ids must be below config.json's vocab_size \(512\)"):
        models["text"].check_processor(processor)


def test_shapes_and_types_are_those_of_the_readme(batches):
    for batch in batches:
        length = batch["input_ids"].shape[1]
        assert batch["input_ids"].shape == batch["shift_labels"].shape == (1, length)
        assert batch["position_ids"].shape == (3, 1, length)
        assert batch["cu_seqlens"].dtype == torch.int32
        assert batch["cu_seqlens"][0] == 0
        assert batch["cu_seqlens"][-1] == length
        assert batch["num_targets"] == int((batch["shift_labels"] != -100).sum())
        documents = len(batch["sample_keys"]) + (batch["num_tokens"] < length)
        assert len(batch["cu_seqlens"]) == documents + 1
        if "pixel_values" in batch:
            assert batch["pixel_values"].dtype == torch.uint8
            patches = int(batch["image_grid_thw"].prod(dim=1).sum())
            assert len(batch["pixel_values"]) == patches == int(batch["vision_cu_seqlens"][-1])


def test_minus_100_is_ignored_everywhere():
    from triptych_data.text.chat import IGNORE_INDEX
    from triptych_kernels import linear_cross_entropy

    default = inspect.signature(linear_cross_entropy).parameters["ignore_index"].default
    assert IGNORE_INDEX == default == -100
