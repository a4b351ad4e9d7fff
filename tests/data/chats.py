"""Small chats and real images for the tests of storage."""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from triptych_data.shards.write import ShardReport, write_shards


def encoded_image(
    width: int = 24, height: int = 16, kind: str = "JPEG", orientation: int = 1, shade: int = 90
) -> bytes:
    """An encoded gradient; `orientation` is EXIF's."""
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    image.paste((shade, 30, 200), (0, 0, width // 2, height // 2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif)
    return buffer.getvalue()


def chat(*, image: str | None = None, answer: str = "A cat.") -> dict[str, Any]:
    """A chat of one turn, with an image named the OpenAI way if there is one."""
    content: Any = "What is this?"
    if image is not None:
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": content},
        ]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
    }


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """Records as lines; a str goes in as it is, for broken lines."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_chats(folder: Path, count: int = 12) -> Path:
    """chats.jsonl with text-only, one-image and two-image samples, and their images."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    records: list[Any] = []
    for i in range(count):
        kind, suffix = [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")][i % 3]
        (images / f"{i}.{suffix}").write_bytes(encoded_image(16 + i, 8 + i, kind, shade=i))
        if i % 4 == 0:
            record = chat(answer=f"Nothing to see, number {i} – ünïcode.")
        elif i % 4 == 1:
            record = chat(image=f"images/{i}.{suffix}", answer=f"Picture {i}.")
        else:
            path = f"images/{i}.{suffix}"
            record = {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "<image>and<image> differ?"},
                    {"role": "assistant", "content": f"They are one, {i}."},
                ],
                "images": [path, path],
                "source": f"test/{i}",
            }
        records.append(record)
    return write_jsonl(folder / "chats.jsonl", records)


def make_shards(folder: Path, count: int = 12, samples_per_shard: int = 5) -> ShardReport:
    """`count` chats in shards under folder/shards."""
    return write_shards(
        write_chats(folder, count), folder / "shards", samples_per_shard=samples_per_shard
    )
