"""Video and audio files through PyAV: what they hold, their frames, their waveform."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from av import VideoCodecContext, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

VIDEO_SUFFIXES = ("mp4", "mov", "webm", "mkv", "avi")
AUDIO_SUFFIXES = ("wav", "flac", "mp3", "ogg", "m4a")
MAX_FRAME_PIXELS = 8192 * 8192
"""A frame of more is taken for a decompression bomb."""
MAX_AUDIO_SAMPLES = 2**29
"""Over all channels, 2 GiB as they are decoded: 3 hours of stereo at 24 kHz."""

# Seconds by which a frame's time may be off: webm and mkv round times to milliseconds.
_ROUNDING = 0.002
# FFmpeg also reads play lists and the like, which name other files: none of these here.
_VIDEO_FORMATS = "mov,mp4,matroska,webm,avi"
_AUDIO_FORMATS = "wav,flac,mp3,ogg,mov,mp4"


class VideoInfo(NamedTuple):
    """`suffix` by content; the size in pixels as it will be seen, turned; the frames that are
    stored and the seconds they last."""

    suffix: str
    width: int
    height: int
    frames: int
    seconds: float


class AudioInfo(NamedTuple):
    """`suffix` by content, and the seconds of what is decoded."""

    suffix: str
    seconds: float


class Video(NamedTuple):
    """An open video: the presentation times of its frames, in order, and those of its key frames
    with the time to seek to, (n,) int64 each in units of `base` seconds."""

    container: "InputContainer"
    stream: "VideoStream"
    times: np.ndarray
    key_times: np.ndarray
    key_offsets: np.ndarray
    last_duration: int
    base: Fraction


def probe_video(data: bytes, *, decode: bool = True) -> VideoInfo:
    """What a video file holds: frames are counted in the container, and the first one is decoded.

    With `decode` the last one is decoded too, which finds a damaged tail. Raises ValueError for
    what is no whole mp4, mov, webm, mkv or avi file with pictures, or holds huge ones.
    """
    with open_video(data) as video:
        info = describe_video(video)
        if decode:
            next(_decode_at(video, video.times[-1:]))
        return info._replace(suffix=_video_suffix(data))


@contextmanager
def open_video(data: bytes) -> Iterator[Video]:
    """A video file's first video stream, to be decoded by one thread, and the times of its frames.

    Within, whatever FFmpeg finds wrong becomes a ValueError.
    """
    with _opened(data, "video", _VIDEO_FORMATS) as container:
        covers = import_av().stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & covers]
        if not streams:
            raise ValueError("no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise ValueError("a video of unknown codec")
        stream.codec_context.thread_count = 1  # loaders have a process per core already
        _check_size(stream.codec_context)
        yield _read_times(container, stream)


def describe_video(video: Video) -> VideoInfo:
    """Size, frames and seconds of an open video; the suffix is left empty."""
    first = next(_decode_at(video, video.times[:1]))
    width, height = first.width, first.height
    if first.rotation % 180:
        width, height = height, width
    return VideoInfo("", width, height, len(video.times), _seconds(video))


def frames_at(video: Video, seconds: np.ndarray) -> Iterator[np.ndarray]:
    """The frames shown at `seconds` (n,), ascending, from the first frame on: (H, W, 3) uint8 RGB.

    They are turned as they will be seen. Raises ValueError for a frame that cannot be decoded.
    """
    late = min(_ROUNDING, _seconds(video) / len(video.times) / 2)
    ticks = (video.times - video.times[0]) * float(video.base)
    numbers = np.searchsorted(ticks, seconds + late, side="right") - 1
    for frame in _decode_at(video, video.times[numbers]):
        pixels = frame.to_ndarray(format="rgb24")
        yield np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))  # counterclockwise


def probe_audio(data: bytes) -> AudioInfo:
    """What an audio file holds: it is decoded in full, as only that tells how long it is.

    Raises ValueError for what is no whole wav, flac, mp3, ogg or m4a file with sound.
    """
    num_samples, rate = 0, 1
    for rate, samples in _decode_audio(data):  # noqa: B007 - of the last part, as of all
        num_samples += samples.shape[1]
    return AudioInfo(_audio_suffix(data), num_samples / rate)


def probe_sound(data: bytes) -> float:
    """Seconds of the sound of a video file, which is decoded in full; 0 if it has none.

    Raises ValueError as `read_audio`.
    """
    num_samples, rate = 0, 1
    for rate, samples in _decode_audio(data, "video"):  # noqa: B007 - as in `probe_audio`
        num_samples += samples.shape[1]
    return num_samples / rate


def read_audio(
    data: bytes, max_seconds: float | None = None, kind: str = "audio"
) -> tuple[int, np.ndarray]:
    """The sound of a file: its rate in Hz and its samples (channels, n) float32 in [-1, 1].

    What comes after `max_seconds` may be left out. `kind` is also "video": of one without sound n
    is 0. Raises ValueError for a file that is no sound, is damaged or changes its rate or channels.
    """
    rate, parts, num_samples = 1, list[np.ndarray](), 0
    for rate, samples in _decode_audio(data, kind):
        parts.append(samples)
        num_samples += samples.shape[1]
        if max_seconds is not None and num_samples >= max_seconds * rate:
            break
    return rate, np.concatenate(parts or [np.zeros((1, 0), dtype=np.float32)], axis=1)


def import_av() -> ModuleType:
    """PyAV, which brings FFmpeg. Raises ImportError that says how to install it."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "video and audio need PyAV, got no module named av; "
            "run: pip install 'triptych-data[video,audio]'"
        ) from error
    return av


@contextmanager
def _opened(data: bytes, kind: str, formats: str) -> Iterator["InputContainer"]:
    av = import_av()
    suffixes = VIDEO_SUFFIXES if kind == "video" else AUDIO_SUFFIXES
    # No protocol: a file in memory names no other.
    options = {"format_whitelist": formats, "protocol_whitelist": ""}
    try:
        with av.open(BytesIO(data), options=options, metadata_errors="replace") as container:
            yield container
    except (av.FFmpegError, ValueError, IndexError, EOFError) as error:
        raise ValueError(
            f"{kind} must be a whole file of {', '.join(suffixes)}, got {len(data)} bytes that "
            f"cannot be decoded ({error}); replace the file"
        ) from error


def _check_size(picture: "VideoCodecContext | VideoFrame") -> None:
    if not 0 < picture.width * picture.height <= MAX_FRAME_PIXELS:
        raise ValueError(f"frames of {picture.width} x {picture.height} pixels")


def _read_times(container: "InputContainer", stream: "VideoStream") -> Video:
    """Read the times of all frames from the container, without decoding."""
    times, keys, last = [], [], (0, 0)
    for packet in container.demux(stream):
        time = packet.dts if packet.pts is None else packet.pts
        if time is None or packet.is_discard or not packet.size:  # an edit list hides a frame
            continue
        times.append(time)
        last = max(last, (time, packet.duration or 0))
        if packet.is_keyframe:
            keys.append((time, time if packet.dts is None else packet.dts))
    if not keys:
        raise ValueError("no key frame")
    key_times, key_offsets = np.array(sorted(keys), dtype=np.int64).T
    ordered = np.array(sorted(times), dtype=np.int64)
    base = stream.time_base or Fraction(1)
    return Video(container, stream, ordered, key_times, key_offsets, last[1], base)


def _decode_at(video: Video, times: np.ndarray) -> Iterator["VideoFrame"]:
    """The frames whose times are `times` (n,), ascending, each decoded from the nearest key frame.

    Raises ValueError for one that the decoder does not give, or gives damaged.
    """
    frame: VideoFrame | None = None
    frames: Iterator[VideoFrame] = iter(())
    for time in times.tolist():
        key = max(int(np.searchsorted(video.key_times, time, side="right")) - 1, 0)
        if frame is None or _time(frame) < video.key_times[key]:
            frames, frame = _seek(video, key), None
        frame = _advance(frame, frames, time)
        if frame is None or _time(frame) > time:  # some containers seek behind what was asked for
            frames = _seek(video, 0)
            frame = _advance(None, frames, time)
        if frame is None or _time(frame) != time or frame.is_corrupt:
            raise ValueError(f"no whole frame at {float(time * video.base):.3f} s")
        _check_size(frame)
        yield frame


def _decode_audio(data: bytes, kind: str = "audio") -> Iterator[tuple[int, np.ndarray]]:
    """The sound of a file in parts, at least one unless it is a video: the rate and (channels, n)
    float32."""
    av = import_av()
    with _opened(data, kind, _AUDIO_FORMATS if kind == "audio" else _VIDEO_FORMATS) as container:
        if not container.streams.audio:
            if kind == "video":
                return
            raise ValueError("no audio stream")
        stream = container.streams.audio[0]
        if stream.codec_context is None or not stream.rate:
            raise ValueError("audio of unknown codec")
        rate, num_channels = stream.rate, stream.channels
        convert = av.AudioResampler(format="fltp", layout=stream.layout, rate=rate)
        left = MAX_AUDIO_SAMPLES
        for frame in container.decode(stream):
            if frame.is_corrupt or frame.rate != rate:
                raise ValueError("a damaged part, or one of another rate")
            for part in convert.resample(frame):
                samples = part.to_ndarray()
                left -= samples.size
                if left < 0 or len(samples) != num_channels:
                    raise ValueError(f"over {MAX_AUDIO_SAMPLES} samples, or other channels")
                yield rate, samples
        if left == MAX_AUDIO_SAMPLES and kind == "audio":
            raise ValueError("no sound")


def _seek(video: Video, key: int) -> Iterator["VideoFrame"]:
    video.container.seek(int(video.key_offsets[key]), stream=video.stream)
    return video.container.decode(video.stream)


def _advance(
    frame: "VideoFrame | None", frames: Iterator["VideoFrame"], time: int
) -> "VideoFrame | None":
    """The first frame from `frame` on that is not before `time`, None if there is none."""
    while frame is None or _time(frame) < time:
        frame = next(frames, None)
        if frame is None:
            return None
    return frame


def _time(frame: "VideoFrame") -> int:
    time = frame.dts if frame.pts is None else frame.pts
    if time is None:
        raise ValueError("a frame without a time")
    return time


def _seconds(video: Video) -> float:
    """How long all frames are shown: by the stream's rate, unless that does not fit their times.

    Times may be rounded, to milliseconds in webm; the rate of a video of constant rate is not.
    """
    frames = len(video.times)
    span = Fraction(int(video.times[-1] - video.times[0])) * video.base
    rate = video.stream.average_rate
    if rate and rate > 0 and abs(span - (frames - 1) / rate) <= 1 / (2 * rate):
        return float(frames / rate)
    if frames == 1 or not span:
        return float(max(video.last_duration, 1) * video.base)
    return float(span * frames / (frames - 1))


def _video_suffix(data: bytes) -> str:
    if data[:4] == b"RIFF":
        return "avi"
    if data[:4] == b"\x1aE\xdf\xa3":  # EBML, whose header names the kind
        return "webm" if b"webm" in data[:64] else "mkv"
    return "mov" if data[8:12] == b"qt  " else "mp4"


def _audio_suffix(data: bytes) -> str:
    marks = {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg"}
    return marks.get(data[:4]) or ("m4a" if data[4:8] == b"ftyp" else "mp3")
