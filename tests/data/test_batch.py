import pytest
import torch

from tests.data.packs import tiny_processor, write_mixture
from triptych_data.batch import collate
from triptych_data.shards.reader import Shards


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    shards = Shards.open(write_mixture(tmp_path_factory.mktemp("mixture"), 12))
    return [tiny_processor().encode(shards.read(i)) for i in range(12)]


def batch_of(samples, seq_len):
    return collate(samples, seq_len, pad_token_id=tiny_processor().pad_token_id)


def test_documents_lie_end_to_end(samples):
    batch = batch_of(samples, 4096)
    assert batch["input_ids"].shape == batch["shift_labels"].shape == (1, 4096)
    assert batch["position_ids"].shape == (3, 1, 4096)
    bounds = batch["cu_seqlens"].tolist()
    assert len(bounds) == len(samples) + 2 and bounds[-1] == 4096
    for sample, begin, end in zip(samples, bounds, bounds[1:], strict=False):
        assert torch.equal(batch["input_ids"][0, begin:end], sample.input_ids)
        assert torch.equal(batch["shift_labels"][0, begin:end], sample.shift_labels)
        assert torch.equal(batch["position_ids"][:, 0, begin:end], sample.position_ids)
        assert batch["shift_labels"][0, end - 1] == -100  # no target across documents
    assert batch["sample_keys"] == [sample.key for sample in samples]
    assert batch["num_targets"] == sum(sample.num_targets for sample in samples)
    assert batch["num_targets"] == int((batch["shift_labels"] != -100).sum())


def test_padding_is_a_document_of_its_own(samples):
    batch = batch_of(samples[:2], 1024)
    begin = int(batch["cu_seqlens"][-2])
    assert (batch["input_ids"][0, begin:] == tiny_processor().pad_token_id).all()
    assert (batch["shift_labels"][0, begin:] == -100).all()
    expected = torch.arange(1024 - begin).expand(3, -1)
    assert torch.equal(batch["position_ids"][:, 0, begin:], expected)


def test_full_pack_has_no_padding_document(samples):
    length = len(samples[0].input_ids)
    batch = batch_of(samples[:1], length)
    assert batch["cu_seqlens"].tolist() == [0, length]
    assert batch["max_seqlen"] == length  # not rounded beyond T


def test_images_are_concatenated(samples):
    batch = batch_of(samples, 4096)
    with_images = [sample for sample in samples if sample.pixel_values is not None]
    assert torch.equal(batch["pixel_values"], torch.cat([s.pixel_values for s in with_images]))
    grids = torch.cat([s.image_grid_thw for s in with_images])
    assert torch.equal(batch["image_grid_thw"], grids)
    patches = grids.prod(dim=1)
    assert torch.equal(batch["vision_cu_seqlens"].diff(), patches.to(torch.int32))
    assert batch["vision_cu_seqlens"][0] == 0
    assert batch["vision_max_seqlen"] % 256 == 0
    assert 0 <= batch["vision_max_seqlen"] - int(patches.max()) < 256
    tokens = batch["input_ids"][0, batch["image_positions"]]
    assert (tokens == tiny_processor().image_token_id).all()
    assert len(tokens) == int(patches.sum()) // 4


def test_dtypes(samples):
    batch = batch_of(samples, 4096)
    dtypes = {name: value.dtype for name, value in batch.items() if torch.is_tensor(value)}
    assert dtypes.pop("pixel_values") == torch.uint8
    assert dtypes.pop("cu_seqlens") == dtypes.pop("vision_cu_seqlens") == torch.int32
    assert set(dtypes.values()) == {torch.int64}
    assert type(batch["max_seqlen"]) is type(batch["vision_max_seqlen"]) is int
    assert type(batch["num_targets"]) is int


def test_text_only_pack_has_no_image_keys(samples):
    texts = [sample for sample in samples if sample.pixel_values is None]
    names = set(batch_of(texts, 2048))
    assert texts and not {name for name in names if "image" in name or "vision" in name}
    assert "pixel_values" not in names


def test_empty_pack_is_all_padding():
    batch = batch_of([], 300)
    assert batch["cu_seqlens"].tolist() == [0, 300]
    assert (batch["num_targets"], batch["sample_keys"], batch["max_seqlen"]) == (0, [], 300)
    assert batch["position_ids"][0, 0].tolist() == list(range(300))


@pytest.mark.parametrize("padding", [1, 255, 256, 257, 600])
def test_longest_document_is_rounded_up_but_not_beyond_t(samples, padding):
    length = len(samples[0].input_ids)
    longest = max(length, padding)
    expected = min(-(-longest // 256) * 256, length + padding)
    assert batch_of(samples[:1], length + padding)["max_seqlen"] == expected
