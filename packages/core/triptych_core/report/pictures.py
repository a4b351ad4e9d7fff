"""What a model draws, evaluation by evaluation: how its samples come out of noise."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

MOST = 8  # pictures shown: the first, the last, and evenly between
_PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")


def draw_pictures(evaluations: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The HTML of the pictures that evaluations hold, in order of their steps."""
    held = [e for e in evaluations if _PNG.fullmatch(str(e.get("picture") or ""))]
    if not held:
        return
    count = min(MOST, len(held))
    chosen = [held[round(i * (len(held) - 1) / max(1, count - 1))] for i in range(count)]
    yield "<h2>Samples</h2><p>Of the same noise, or the same images, each time.</p>"
    figures = [
        f'<figure class="card chart"><header><h3>step {e["step"]:,}</h3></header>'
        f'<img src="{e["picture"]}" alt="samples at step {e["step"]}" width="100%"></figure>'
        for e in chosen
    ]
    yield f'<div class="charts">{"".join(figures)}</div>'


def png_uri(pixels: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as a data URI."""
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    height, width, _ = pixels.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    data = zlib.compress(lines.tobytes(), 9)
    parts = [_chunk(b"IHDR", size), _chunk(b"IDAT", data), _chunk(b"IEND", b"")]
    encoded = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()
    return f"data:image/png;base64,{encoded}"


def _chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
