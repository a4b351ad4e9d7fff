"""Videos and sounds with headers that lie, and play lists that name other files."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from io import BytesIO

import av
import numpy as np

from tests.hostile.case import Case, canary, writer

DOORS = ("video_shard",)


def media_cases() -> Iterator[Case]:
    for name, data in {
        "playlist.mp4": lambda: b"#EXTM3U\n#EXTINF:1,\nfile://" + canary().encode() + b"\n",
        "playlist-http.mp4": lambda: b"#EXTM3U\n#EXTINF:1,\nhttp://169.254.169.254/a.ts\n",
        "concat.mp4": lambda: b"ffconcat version 1.0\nfile '" + canary().encode() + b"'\n",
        "subtitles.mp4": lambda: b"1\n00:00:00,000 --> 00:00:09,000\n" + canary().encode(),
        "dash.mp4": lambda: (
            b'<?xml version="1.0"?><MPD><BaseURL>' + canary().encode() + b"</BaseURL></MPD>"
        ),
        "sizes-of-exabytes.mp4": lambda: _mp4(lambda d: d.replace(b"moov", b"mooz", 1)),
        "atoms-for-ever.mp4": lambda: (
            struct.pack(">I4s", 20, b"ftyp") + b"isom" * 3 + struct.pack(">I4sQ", 1, b"moov", 2**63)
        ),
        "huge-table.mp4": lambda: _mp4(_huge_table),
        "rate-of-zero.mp4": lambda: _mp4(lambda d: _after(d, b"mdhd", 12, struct.pack(">I", 0))),
        "frames-16384.mp4": lambda: _claimed(16_384, 16_384),
        "frames-8192.mp4": lambda: _video(8192, 8192),
        "noise.mp4": lambda: _mp4(lambda d: d[:400] + os.urandom(len(d) - 400)),
        "ebml-of-2-to-the-56.mkv": lambda: b"\x1aE\xdf\xa3\x01" + b"\xff" * 7 + bytes(100),
        "list-of-4-GiB.avi": lambda: (
            b"RIFF" + b"\xff" * 4 + b"AVI LIST" + b"\xff" * 4 + b"hdrl" + bytes(64)
        ),
    }.items():
        yield Case(f"video-{name}", writer(name, data), DOORS)
    for name, data in {
        "channels-65535.wav": lambda: _wav(channels=65_535),
        "rate-of-zero.wav": lambda: _wav(rate=0),
        "data-of-4-GiB.wav": lambda: _wav(size=2**32 - 1),
        "silence.flac": _silence,
        "noise.mp3": lambda: b"\xff\xfb\x90\x64" + os.urandom(10_000),
        "playlist.wav": lambda: b"#EXTM3U\n#EXTINF:1,\nfile://" + canary().encode() + b"\n",
    }.items():
        yield Case(f"audio-{name}", writer(name, data), ("audio_shard",))


def _video(width: int, height: int, codec: str = "libx264") -> bytes:
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=10, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for _ in range(2):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def _mp4(change: Callable[[bytes], bytes]) -> bytes:
    return change(_video(64, 48))


def _after(data: bytes, atom: bytes, skip: int, value: bytes) -> bytes:
    at = data.index(atom) + len(atom) + skip
    return data[:at] + value + data[at + len(value) :]


def _huge_table(data: bytes) -> bytes:
    """A table of sample sizes with 2^32 - 1 entries."""
    return _after(data, b"stsz", 8, b"\xff" * 4)


def _claimed(width: int, height: int) -> bytes:
    """A small video whose container claims another size."""
    return _mp4(lambda d: _after(d, b"avc1", 24, struct.pack(">HH", width, height)))


def _wav(channels: int = 1, rate: int = 8000, size: int = 1000) -> bytes:
    body = struct.pack(
        "<IHHIIHH", 16, 1, channels, rate, rate * channels * 2 % 2**32, channels * 2 % 2**16, 16
    )
    return (
        b"RIFF" + b"\xff" * 4 + b"WAVEfmt " + body + b"data" + struct.pack("<I", size) + bytes(1000)
    )


def _silence() -> bytes:
    """Hours of silence in a few hundred kilobytes."""
    file = BytesIO()
    with av.open(file, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=8000)
        stream.layout = "mono"
        sound = np.zeros((1, 1 << 22), dtype=np.int16)
        for part in range(4):
            frame = av.AudioFrame.from_ndarray(sound, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 8000, part * sound.size
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()
