import io
import warnings

import pytest
from PIL import Image

from tests.data.chats import encoded_image
from triptych_data.media.probe import MediaInfo, probe_image


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_the_one_pillow_shows(kind, orientation, decode):
    data = encoded_image(30, 20, kind, orientation)
    suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
    size = (20, 30) if orientation > 4 else (30, 20)
    assert probe_image(data, "x", decode=decode) == MediaInfo("image", suffix, *size)


def test_a_phones_jpeg_with_two_pictures_is_a_jpeg():
    buffer = io.BytesIO()
    picture = Image.new("RGB", (12, 8))
    picture.save(buffer, "MPO", save_all=True, append_images=[picture])
    assert probe_image(buffer.getvalue(), "x") == MediaInfo("image", "jpg", 12, 8)


def test_a_bomb_is_refused_before_it_unpacks():
    with pytest.raises(ValueError, match=r"^x: an image must have at most 599 pixels, got 30 x 20"):
        probe_image(encoded_image(30, 20), "x", max_pixels=599)
    buffer = io.BytesIO()
    Image.new("1", (11_000, 11_000)).save(buffer, "PNG")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="at most 89478485 pixels"):
        warnings.simplefilter("error")
        probe_image(buffer.getvalue(), "x")
