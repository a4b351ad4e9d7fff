"""Media of a sample as HTML: images, the frames that are sampled from videos, sound to play."""

import base64
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from triptych_data.media import clips
from triptych_data.media.probe import FORMATS, MediaInfo, probe_media
from triptych_data.processor import Processor
from triptych_data.sample import RawSample, media_parts

LARGEST_SIDE = 800
"""Larger images are shrunk for the page, so that it stays light; the shards keep them."""
MOST_FRAMES = 24
"""Of a video; more are thinned out."""
FRAME_SIDE = 200
LARGEST_SOUND = 4_000_000
"""Bytes of an audio file that goes into the page."""


def figures(raw: RawSample, processor: Processor) -> str:
    """The media of a sample in the order of its text, with what they measure and become."""
    parts = media_parts(raw.json)
    shown = [_figure(i, kind, raw.media[at], processor) for i, (kind, at) in enumerate(parts)]
    return f'<div class="images">{"".join(shown)}</div>' if shown else ""


def data_uri(data: bytes) -> str:
    """An image as a `data:` URI, shrunk to at most LARGEST_SIDE pixels a side."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        kind = "jpeg" if image.format == "MPO" else str(image.format).lower()
        if max(image.size) > LARGEST_SIDE:
            return _thumbnail(ImageOps.exif_transpose(image).convert("RGB"), LARGEST_SIDE)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _figure(number: int, kind: str, data: bytes, processor: Processor) -> str:
    try:
        info = probe_media(data, kind, "", decode=False)
        shown = "".join(_shown(number, info, data, processor))
        caption = f"{kind} {number}: {_measures(info)}{_tokens(info, processor)}"
    except ValueError:  # its text says why
        shown, caption = "", f"{kind} {number}: cannot be decoded"
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _shown(number: int, info: MediaInfo, data: bytes, processor: Processor) -> Iterator[str]:
    if info.kind == "image":
        yield f'<img src="{data_uri(data)}" alt="image {number}" loading="lazy">'
    elif info.kind == "video":
        for seconds, uri in _frames(info, data, processor):
            yield f'<img class="frame" src="{uri}" alt="{seconds:.1f} s" title="{seconds:.1f} s">'
    elif len(data) <= LARGEST_SOUND:
        uri = f"data:audio/{info.suffix};base64,{base64.b64encode(data).decode()}"
        yield f'<audio controls preload="none" src="{uri}"></audio>'


def _frames(info: MediaInfo, data: bytes, processor: Processor) -> Iterator[tuple[float, str]]:
    """Times and thumbnails of frames that the model sees; of a second each if it takes none."""
    seconds = np.array(processor.frame_times(info) or np.arange(0, info.seconds, 1.0))
    chosen = seconds[np.linspace(0, len(seconds) - 1, min(len(seconds), MOST_FRAMES)).astype(int)]
    with clips.open_video(data) as video:
        for time, frame in zip(chosen.tolist(), clips.frames_at(video, chosen), strict=True):
            yield time, _thumbnail(Image.fromarray(frame), FRAME_SIDE)


def _thumbnail(image: Image.Image, side: int) -> str:
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _measures(info: MediaInfo) -> str:
    size = f"{info.width} × {info.height} px" if info.kind != "audio" else ""
    length = f"{info.seconds:.1f} s" if info.kind != "image" else ""
    frames = f"{info.frames:,} frames" if info.kind == "video" else ""
    return ", ".join(filter(None, (size, length, frames)))


def _tokens(info: MediaInfo, processor: Processor) -> str:
    try:
        return f", {processor.media_tokens(info):,} tokens"
    except ValueError:  # a kind that the model does not take
        return ""
