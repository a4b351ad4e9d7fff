"""What a media file is: its format, how large and long it will be seen, whether it decodes."""

import io
import struct
import warnings
import zlib
from typing import NamedTuple

from PIL import Image

from triptych_data.media import clips

FORMATS = ("JPEG", "PNG", "WEBP")
"""All that Pillow may try: its other decoders are no business of files from the internet."""
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's format to a member's suffix; MPO is a JPEG that carries more pictures, from phones."""
MEDIA_SUFFIXES = {*SUFFIXES.values(), "jpeg", *clips.VIDEO_SUFFIXES, *clips.AUDIO_SUFFIXES}
"""What a member's name may end in; `probe_media` looks at the content alone."""
MAX_PIXELS = 89_478_485
"""Pillow's own bound, 256 MiB of RGB; what unpacks to more is taken for a decompression bomb."""
BLANK_PIXELS = 1 << 24
"""What an image may unpack to however small its file is: decoding takes up to 15 bytes a pixel."""
PIXELS_PER_BYTE = 64
"""Of larger ones: photographs have 4 to 40, a file of one colour a thousand and more."""
MAX_SCANS = 100
"""Scans of a JPEG, each of which decodes the whole picture; encoders write some ten."""
ORIENTATION = 0x0112
BROKEN = (OSError, SyntaxError, ValueError, IndexError, TypeError, OverflowError, EOFError)
"""What Pillow's decoders raise on damaged files, beside struct.error and zlib.error."""


class MediaInfo(NamedTuple):
    """`kind` of `sample.KINDS`, `suffix` by content, as in a member's name; sizes in pixels after
    orientation, `frames` of a video, `seconds` of video and audio; 0 where there is no such.
    `sound`: seconds of the sound of a video, where that is heard."""

    kind: str
    suffix: str
    width: int = 0
    height: int = 0
    frames: int = 0
    seconds: float = 0.0
    sound: float | None = None


def probe_media(
    data: bytes, kind: str, where: str, *, decode: bool = True, sound: bool = False
) -> MediaInfo:
    """What `data` is as a medium of `kind`, of `sample.KINDS`; with `decode` damage is looked for,
    with `sound` also what of a video is heard.

    Raises ValueError for what is not of that kind, is damaged or too large to decode.
    """
    if kind == "image":
        return probe_image(data, where, decode=decode)
    try:
        if kind == "video":
            seen = MediaInfo(kind, *clips.probe_video(data, decode=decode))
            return seen._replace(sound=clips.probe_sound(data)) if sound else seen
        heard = clips.probe_audio(data)
        return MediaInfo(kind, heard.suffix, seconds=heard.seconds)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def probe_image(
    data: bytes, where: str, *, decode: bool = True, max_pixels: int = MAX_PIXELS
) -> MediaInfo:
    """Format and size of an encoded image, decoded in full to find damage unless `decode` is False.

    Raises ValueError for what is not a JPEG, PNG or WebP, is damaged, or has over `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns between once and twice its bound; ours is checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        with image:
            width, height = image.size
            if width * height <= max_pixels:
                check_effort(data, width, height)
                if decode:
                    image.load()
                turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
                size = (height, width) if turned else (width, height)
                return MediaInfo("image", SUFFIXES[image.format or ""], *size)
    except (*BROKEN, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{where}: an image must be a whole JPEG, PNG or WebP file, got {len(data)} bytes that "
            f"Pillow cannot decode ({error}); replace the file"
        ) from error
    raise ValueError(
        f"{where}: an image must have at most {max_pixels} pixels, got {width} x {height}; "
        "shrink it"
    )


def check_effort(data: bytes, width: int, height: int) -> None:
    """Raise ValueError for an image far harder to decode than its bytes let expect."""
    if width * height > max(BLANK_PIXELS, PIXELS_PER_BYTE * len(data)):
        raise ValueError(
            f"{width} x {height} pixels in {len(data)} bytes, over {PIXELS_PER_BYTE} a byte"
        )
    scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
    if scans > MAX_SCANS:
        raise ValueError(f"{scans} scans, over {MAX_SCANS}")
