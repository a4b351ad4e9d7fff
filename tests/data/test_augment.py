import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.data.chats import encoded_image
from tests.data.packs import MODEL, tiny_processor
from tests.data.test_images import photo, save
from triptych_data.media.augment import draw_quality, vary_jpeg
from triptych_data.media.config import JpegConfig
from triptych_data.media.images import decode_image
from triptych_data.processor import Processor
from triptych_data.sample import RawSample

ALWAYS = JpegConfig(share=1.0, quality=(5, 20), seed=3)


def draws(config, count=4000, **changes):
    names = {"number": 0, "epoch": 0} | changes
    return [draw_quality(config, f"{i:09d}", **names) for i in range(count)]


def test_draws_are_even_and_as_frequent_as_asked():
    drawn = draws(JpegConfig(share=0.3, quality=(30, 39)))
    kept = [quality for quality in drawn if quality is not None]
    assert abs(len(kept) / len(drawn) - 0.3) < 0.03
    counts = np.bincount(kept, minlength=40)[30:]
    assert counts.sum() == len(kept) and counts.min() > 70 and counts.max() < 175


def test_a_draw_depends_on_sample_image_epoch_and_seed_alone():
    config = JpegConfig()
    assert draws(config) == draws(config)
    others = [draws(config, epoch=1), draws(config, number=1), draws(JpegConfig(seed=1))]
    for other in others:
        assert np.mean([a == b for a, b in zip(draws(config), other, strict=True)]) < 0.5


def test_the_draw_stays_what_it_was():
    """A resumed run must see what it would have seen: these values may never change."""
    assert draws(JpegConfig(), count=8) == [50, None, 62, None, 52, 77, 77, 94]


def test_low_quality_changes_pixels_and_nothing_else():
    image = decode_image(save(photo(64, 48)))
    varied = vary_jpeg(image, ALWAYS, "a", 0, 0)
    assert varied.shape == image.shape and varied.dtype == torch.uint8
    difference = (varied.int() - image.int()).abs().float().mean()
    assert 1 < difference < 40
    fine = vary_jpeg(image, JpegConfig(share=1.0, quality=(100, 100)), "a", 0, 0)
    assert (fine.int() - image.int()).abs().float().mean() < difference
    assert torch.equal(varied, vary_jpeg(image, ALWAYS, "a", 0, 0))


def sample():
    content = [{"type": "image", "index": 0}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    return RawSample("7", "x", {"messages": messages}, [encoded_image(96, 64)])


def test_processor_varies_images_by_epoch_and_only_then():
    processor = Processor.from_directory(MODEL, jpeg=ALWAYS)
    plain = tiny_processor().encode(sample())
    stored, first, second = (processor.encode(sample(), epoch) for epoch in (None, 0, 1))
    assert torch.equal(stored.pixel_values, plain.pixel_values)
    assert not torch.equal(first.pixel_values, plain.pixel_values)
    assert not torch.equal(first.pixel_values, second.pixel_values)
    assert torch.equal(first.input_ids, plain.input_ids)
    assert torch.equal(first.pixel_values, processor.encode(sample(), 0).pixel_values)
    prompt, _ = processor.encode_prompt(sample())
    assert torch.equal(prompt.pixel_values, plain.pixel_values), "an evaluation sees what is stored"
    assert torch.equal(tiny_processor().encode(sample(), 5).pixel_values, plain.pixel_values)


def test_variation_is_part_of_the_fingerprint():
    prints = {
        Processor.from_directory(MODEL, jpeg=jpeg).fingerprint
        for jpeg in (None, ALWAYS, JpegConfig(), JpegConfig(seed=1))
    }
    assert len(prints) == 4


@pytest.mark.parametrize("quality", [(0, 50), (60, 50), (50, 101)])
def test_qualities_out_of_range_are_refused(quality):
    with pytest.raises(ValidationError, match="two numbers from 1 to 100 in order"):
        JpegConfig(quality=quality)
