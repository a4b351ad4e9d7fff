"""Images for autoencoders: the same whoever reads them, cut as asked, resumed at any position."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.data.chats import chat, write_chats, write_jsonl
from tests.data.media import clip
from triptych_data.media.probe import probe_media
from triptych_data.pixels.batches import Cut, cut_out
from triptych_data.pixels.config import PixelDataConfig
from triptych_data.pixels.loader import PixelLoader, first_pixels, heldout_pixels
from triptych_data.sample import dump_json
from triptych_data.shards.tarwriter import TarWriter
from triptych_data.shards.write import write_shards

SIDE, NOISE = 8, (4, 3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Of twelve chats, of which some have no image and some two."""
    path = tmp_path_factory.mktemp("pixels")
    write_shards(write_chats(path / "raw"), path / "shards", samples_per_shard=5)
    return path / "shards"


def open_loader(shards: Path, rank: int = 0, world_size: int = 1, **fields) -> PixelLoader:
    config = PixelDataConfig(
        **{"shards": [str(shards)], "batch_size": 2, "num_workers": 0} | fields
    )
    shape = {"side": SIDE, "noise_shape": NOISE}
    return PixelLoader(config, rank=rank, world_size=world_size, **shape)


def test_every_image_is_a_sample(shards: Path):
    loader = open_loader(shards, batch_size=5)
    count = loader.describe()["images"]
    held = list(heldout_pixels(loader._config, [str(shards)], 0, 1, SIDE))
    found = [image for batch in held for image in batch["sample_ids"]]
    assert found == list(range(count))
    by_sample = loader.batches.places[:, 0].tolist()
    assert max(map(by_sample.count, by_sample)) == 2  # of one chat
    assert len(set(by_sample)) < 12  # not of those without
    assert sum(batch["num_targets"] for batch in held) == count
    first = first_pixels(loader._config, [str(shards)], 3, SIDE)
    assert torch.equal(first, held[0]["pixels"][:3])


@pytest.mark.parametrize("told", [True, False])
def test_images_beside_a_video_that_is_heard_are_found(tmp_path: Path, told: bool):
    """Also by an index from before, which has no row for its sound."""
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    for name, colour in colours.items():
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "a.mp4").write_bytes(clip(8, heard=0.4))
    parts = [{"type": "video", "index": 0, "sound": True}]
    parts += [{"type": "image", "index": number} for number in (1, 2)]
    content = [*parts, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Red."}]
    data = [(tmp_path / name).read_bytes() for name in ("a.mp4", "red.png", "blue.png")]
    measures = [
        probe_media(each, kind, "x", sound=told)
        for kind, each in zip(("video", "image", "image"), data, strict=True)
    ]
    with TarWriter(tmp_path / "shard-000000.tar") as tar:
        tar.add("a", dump_json({"messages": messages}), data, measures, 9)
        tar.finish()
    (batch,) = heldout_pixels(open_loader(tmp_path)._config, [str(tmp_path)], 0, 1, SIDE)
    found = [tuple(each.tolist()) for each in batch["pixels"][:, :, 4, 4]]
    assert found == list(colours.values())


@pytest.mark.parametrize("more", [{}, {"num_workers": 2}, {"shorter_side": 11, "flip": True}])
def test_ranks_and_workers_share_one_order(shards: Path, more: dict):
    alone = list(islice(open_loader(shards, batch_size=4, **more), 6))
    pairs = [list(islice(open_loader(shards, rank, 2, **more), 6)) for rank in (0, 1)]
    for whole, *halves in zip(alone, *pairs, strict=True):
        for name in ("pixels", "noise", "levels", "draws", "weights"):
            together = torch.cat([half[name] for half in halves])
            assert torch.equal(whole[name], together), name
    assert alone[0]["noise"].shape == (4, *NOISE)
    later = {tuple(batch["sample_ids"]) for batch in alone}
    assert len(later) == 6  # epochs are in orders of their own


def test_a_position_is_gone_on_from(shards: Path):
    loader = open_loader(shards)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state = loader.state_dict()
    expected = next(batches)
    again = open_loader(shards)
    again.load_state_dict(state)
    found = next(iter(again))
    assert torch.equal(found["pixels"], expected["pixels"])
    assert torch.equal(found["draws"], expected["draws"])
    other = open_loader(shards, shorter_side=20)
    with pytest.raises(ValueError, match="cut"):
        other.load_state_dict(state)


def test_a_square_is_cut_out_of_the_resized_image():
    image = torch.arange(16).view(1, 1, 16).expand(3, 8, 16).to(torch.uint8)
    left = cut_out(image, Cut(8, 8, anywhere=True, flip=False), 0.0, 0.0, 0.9)
    assert torch.equal(left[0, 0], torch.arange(8))
    right = cut_out(image, Cut(8, 8, anywhere=True, flip=True), 0.0, 0.999, 0.1)
    assert torch.equal(right[0, 0], torch.arange(15, 7, -1))
    middle = cut_out(image, Cut(8, 8, anywhere=False, flip=False), 0.0, 0.0, 0.1)
    assert torch.equal(middle[0, 0], torch.arange(4, 12))
    small = cut_out(image, Cut(4, 4, anywhere=True, flip=False), 0.0, 0.0, 0.1)
    assert small.shape == (3, 4, 4)


def test_a_slim_image_is_a_hole_and_shards_without_images_are_refused(tmp_path: Path):
    Image.new("RGB", (900, 4)).save(tmp_path / "slim.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    records = [chat(image="slim.png"), chat(image="good.png")]
    write_shards(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "a")
    batch = next(iter(open_loader(tmp_path / "a", max_bad_rate=1.0)))
    assert batch["num_targets"] == len(batch["sample_keys"]) == 1
    assert batch["weights"].sum() == 1
    assert "at most 200 times" in batch["holes"][0].message
    write_shards(write_jsonl(tmp_path / "b.jsonl", [chat()]), tmp_path / "b")
    with pytest.raises(ValueError, match=r"data.shards: must hold images, got none"):
        open_loader(tmp_path / "b")
    with pytest.raises(ValueError, match=r"data.shorter_side: must be at least .* 8 pixels, got 7"):
        open_loader(tmp_path / "a", shorter_side=7)
