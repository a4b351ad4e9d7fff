"""Images that unpack to gigabytes, take forever, or are of formats with a history."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from PIL import Image

from tests.hostile.case import Case, canary, writer

# Those that claim more than memory holds, without the bytes: their sizes cost nothing to say.
DOORS = ("image", "image_shard")


def image_cases() -> Iterator[Case]:
    for name, data in {
        "png-9000.png": lambda: png(9000, 9000),
        "png-16000.png": lambda: png(16_000, 16_000),
        "png-2-to-the-31.png": lambda: png(2**31 - 1, 2**31 - 1, rows=1),
        "png-rgba-5700.png": lambda: png(5700, 5700, colour=6),
        "png-text-bomb.png": lambda: png(8, 8, chunks=[(b"zTXt", b"a\0\0" + zeros(1 << 28))]),
        "png-profile-bomb.png": lambda: png(8, 8, chunks=[(b"iCCP", b"a\0\0" + zeros(1 << 28))]),
        "png-data-beyond.png": lambda: png(8, 8, rows=1 << 22),
        "png-slim.png": lambda: png(80_000_000, 1),
        "jpeg-65500.jpg": lambda: _resized_jpeg(65_500, 65_500),
        "jpeg-9000.jpg": lambda: _jpeg(9000),
        "jpeg-scans.jpg": _scans,
        "webp-16383.webp": lambda: _webp(16_383),
        "webp-9000.webp": lambda: _webp(9000),
        "webp-animated.webp": _animated,
        "gif-bomb.jpg": lambda: _gif(20_000),
        "psd.jpg": lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3),
        "tiff.jpg": lambda: _as("TIFF"),
        "pdf.jpg": lambda: b"%PDF-1.7\n" + bytes(1000),
        "svg.jpg": lambda: (
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>'
        ),
        "eps.jpg": lambda: (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n("
            + canary().encode()
            + b") (w) file\n"
        ),
        "icns.jpg": lambda: b"icns" + struct.pack(">I", 2**31 - 1) + bytes(100),
        "truncated.png": lambda: png(64, 64)[:60],
        "empty.jpg": lambda: b"",
    }.items():
        yield Case(f"image-{name}", writer(name, data), DOORS)


def png(
    width: int,
    height: int,
    colour: int = 0,
    rows: int | None = None,
    chunks: list[tuple[bytes, bytes]] | None = None,
) -> bytes:
    """A PNG of zeros; `rows` says how many rows of data there are, if not as many as it claims."""
    bands = {0: 1, 2: 3, 6: 4}[colour]
    size = (width * bands + 1) * (height if rows is None else 1) if rows is None else rows * 16
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *(chunks or []), (b"IDAT", zeros(size)), (b"IEND", b"")]
    packed = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + packed


def zeros(size: int) -> bytes:
    """So many zero bytes, deflated."""
    packer, parts, block = zlib.compressobj(9), [], bytes(1 << 24)
    for start in range(0, size, len(block)):
        parts.append(packer.compress(block[: size - start]))
    return b"".join([*parts, packer.flush()])


def _as(kind: str, size: int = 8, **options: object) -> bytes:
    file = BytesIO()
    Image.new("RGB", (size, size)).save(file, kind, **options)
    return file.getvalue()


def _jpeg(size: int) -> bytes:
    return _as("JPEG", size, quality=1, subsampling=0, progressive=True)


def _resized_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header claims another size."""
    data = bytearray(_as("JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _scans() -> bytes:
    """A progressive JPEG with its last scan 10,000 times over: each decodes the whole picture."""
    data = _as("JPEG", 2000, progressive=True, quality=10)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 10_000 + data[-2:]


def _webp(size: int) -> bytes:
    return _as("WEBP", size, lossless=True, method=0, quality=0)


def _animated() -> bytes:
    frames = [Image.fromarray(np.full((2, 2, 3), n % 256, np.uint8)) for n in range(2000)]
    file = BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True, method=0)
    return file.getvalue()


def _gif(size: int) -> bytes:
    data = bytearray(_as("GIF"))
    data[6:10] = struct.pack("<HH", size, size)
    return bytes(data)
