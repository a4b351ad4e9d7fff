"""Shards and a processor for the tests of encoding and packing."""

import random
from functools import cache
from pathlib import Path
from typing import Any

from tests.data.chats import encoded_image, write_jsonl
from triptych_data.config import DataConfig
from triptych_data.processor import Processor
from triptych_data.shards.write import write_shards

MODEL = Path(__file__).parents[2] / "stages" / "configs" / "qwen3_vl_tiny"
WORDS = ("a", "cat", "sat", "on", "the", "mat", "saw", "one", "small", "boat", "at", "sea")


@cache
def tiny_processor() -> Processor:
    return Processor.from_directory(MODEL)


def write_mixture(folder: Path, count: int = 60, samples_per_shard: int = 25) -> list[str]:
    """`count` chats of 0 to 2 images and texts of all lengths; returns the folder of shards."""
    rng = random.Random(count)
    folder.mkdir(parents=True, exist_ok=True)
    records: list[Any] = []
    for i in range(count):
        names = [f"{i}-{k}.jpg" for k in range(rng.choice((0, 0, 1, 2)))]
        for name in names:
            size = rng.randint(20, 120), rng.randint(20, 120)
            (folder / name).write_bytes(encoded_image(*size, orientation=rng.randint(1, 8)))
        question = "<image>" * len(names) + " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))},
        ]
        records.append({"messages": messages, "images": names})
    source = write_jsonl(folder / "chats.jsonl", records)
    write_shards(source, folder / "shards", samples_per_shard=samples_per_shard)
    return [str(folder / "shards")]


def tiny_config(shards: list[str], **settings: Any) -> DataConfig:
    return DataConfig(**{"shards": shards, "seq_len": 512, "num_workers": 0, **settings})
