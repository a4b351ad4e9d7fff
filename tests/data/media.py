"""Real clips and sounds for the tests, encoded by PyAV."""

import io
from fractions import Fraction

import av
import numpy as np


def picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Frame `number` of every clip: (height, width, 3) uint8, a gradient and bars that count."""
    rows, cols = np.mgrid[:height, :width]
    red = 255 * rows // height
    green = (cols * 4 + number * 9) % 256
    blue = np.full_like(rows, 40)
    blue[: height // 4] = 255 * ((number >> (7 * cols[: height // 4] // width)) & 1)
    return np.stack([red, green, blue], axis=2).astype(np.uint8)


def clip(
    count: int = 50,
    *,
    rate: int | Fraction = 24,
    size: tuple[int, int] = (64, 48),
    kind: str = "mp4",
    codec: str = "libx264",
    gop: int = 12,
    times: list[int] | None = None,
    rotation: int = 0,
    heard: float = 0.0,
) -> bytes:
    """A clip of `count` pictures; `times` in milliseconds make its rate variable. `heard` seconds
    of a sine come with it."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.gop_size = gop
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        track = None
        if heard:
            track = container.add_stream(
                "flac" if kind == "matroska" else "aac", rate=16_000, layout="mono"
            )
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None:
            add_sound(container, track, wave(heard, 16_000, 700.0)[None])
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """All frames of a clip in order, (T, H, W, 3) uint8, not turned."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def sound(
    seconds: float = 1.0,
    *,
    rate: int = 16_000,
    kind: str = "wav",
    codec: str = "pcm_s16le",
    channels: int = 1,
    hertz: float = 440.0,
) -> bytes:
    """A sine of amplitude one half, the same on all channels."""
    buffer = io.BytesIO()
    layout = "mono" if channels == 1 else "stereo"
    with av.open(buffer, "w", format=kind) as container:
        options = {"strict": "experimental"} if codec == "vorbis" else {}
        stream = container.add_stream(codec, rate=rate, layout=layout, options=options)
        add_sound(container, stream, np.tile(wave(seconds, rate, hertz), (channels, 1)))
    return buffer.getvalue()


def wave(seconds: float, rate: int, hertz: float) -> np.ndarray:
    """A sine (n,) of amplitude one half."""
    found: np.ndarray = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return found


def add_sound(
    container: av.container.OutputContainer, stream: av.AudioStream, planes: np.ndarray
) -> None:
    """Encode planes (channels, n) as a stream of a file."""
    rate, layout = stream.rate, "mono" if len(planes) == 1 else "stereo"
    convert = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
    size = stream.codec_context.frame_size or 1024
    for start in range(0, planes.shape[1], size):
        part = np.ascontiguousarray(planes[:, start : start + size].astype(np.float32))
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
        frame.rate, frame.pts = rate, start
        for converted in convert.resample(frame):
            container.mux(stream.encode(converted))
    container.mux(stream.encode())
