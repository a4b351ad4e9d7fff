"""Time reading shards: triptych_data's indexed reader against webdataset, and litdata if installed.

    python tools/bench_data_read.py --samples 2000 --rounds 7

Makes shards of real photographs, cropped to 512 x 384 as JPEG with a chat each, and reads them
from the page cache, one core, no decoding; ours with every byte's checksum compared. Figures are
CPU time (user + system) per sample, the median over rounds in which the readers take turns, in one
process. litdata is read if it is installed.
"""

import io
import json
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from triptych_data.shards.reader import Shards
from triptych_data.shards.write import write_shards
from triptych_data.storage import local

WIDTH, HEIGHT = 512, 384
Reader = Callable[[], int]
"""Reads every sample once and returns the bytes it was given."""


@click.command(help=__doc__)
@click.option("--samples", type=click.IntRange(8), default=2000, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(samples: int, rounds: int, as_json: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder), samples)
        readers = {**our_readers(shards), **their_readers(shards, Path(folder))}
        times = measure(readers, rounds, samples)
    rows = summary(times, shards)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    mean = sum(index.tar_bytes for index in shards.indexes) / samples / 1000
    print(f"{samples} samples of {mean:.1f} kB, {rounds} rounds, CPU time of one core")
    for name, row in rows.items():
        print(
            f"{name:<33} {row['us_per_sample']:>8.1f} us  {row['samples_per_second']:>9,.0f}/s "
            f"{row['mb_per_second']:>7,.0f} MB/s {row['times_webdataset']:>6.1f}x webdataset"
        )


def make_shards(folder: Path, samples: int) -> Shards:
    """Indexed shards of `samples` chats, a photograph each, about four shards in all."""
    images = folder / "images"
    images.mkdir()
    with (folder / "chats.jsonl").open("w") as file:
        for number, data in enumerate(photographs(samples)):
            (images / f"{number}.jpg").write_bytes(data)
            file.write(json.dumps(chat(number)) + "\n")
    write_shards(folder / "chats.jsonl", folder / "shards", samples_per_shard=-(-samples // 4))
    return Shards.open([folder / "shards"])


def photographs(count: int) -> Iterator[bytes]:
    """Random crops of scikit-learn's two photographs, at random scales, as JPEGs of quality 88."""
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    draw = np.random.default_rng(0)
    for number in range(count):
        picture = pictures[number % len(pictures)]
        width = int(draw.integers(400, picture.width))
        height = width * HEIGHT // WIDTH
        if height > picture.height:
            width, height = picture.height * WIDTH // HEIGHT, picture.height
        left = int(draw.integers(0, picture.width - width + 1))
        top = int(draw.integers(0, picture.height - height + 1))
        buffer = io.BytesIO()
        crop = picture.crop((left, top, left + width, top + height))
        crop.resize((WIDTH, HEIGHT)).save(buffer, "JPEG", quality=84)
        yield buffer.getvalue()


def chat(number: int) -> dict[str, object]:
    question = [
        {"type": "image", "image": f"images/{number}.jpg"},
        {"type": "text", "text": "What does this photograph show, and where may it be taken?"},
    ]
    answer = f"Number {number}. " + "A temple roof behind trees, or a flower in its garden. " * 4
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def our_readers(shards: Shards) -> dict[str, Reader]:
    order = np.random.default_rng(0).permutation(shards.num_samples).tolist()
    plain = pickle.loads(pickle.dumps(shards))
    systems, local.LOCAL_SYSTEMS = local.LOCAL_SYSTEMS, set()
    assert all(plain.read_members(i) for i in order), "opens the files, which stay open"
    local.LOCAL_SYSTEMS = systems

    def members(opened: Shards, numbers: list[int]) -> Reader:
        return lambda: sum(sum(map(len, opened.read_members(i))) for i in numbers)

    def parsed() -> int:
        return sum(sum(map(len, shards.read(i).media)) for i in order)

    return {
        "ours, in order": lambda: sum(sum(map(len, found)) for found in shards.members()),
        "ours, random order": members(shards, order),
        "ours, random order, not mapped": members(plain, order),
        "ours, random order, JSON parsed": parsed,
    }


def their_readers(shards: Shards, folder: Path) -> dict[str, Reader]:
    import webdataset

    paths = [str(path) for path in shards.paths]

    def dataset() -> Any:
        return webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)

    def plain() -> int:
        return sum(len(sample["json"]) + len(sample["0.jpg"]) for sample in dataset())

    def shuffled() -> int:
        samples = dataset().shuffle(1000)
        return sum(len(sample["json"]) + len(sample["0.jpg"]) for sample in samples)

    def parsed() -> int:
        samples = dataset().shuffle(1000)
        return sum(len(s["0.jpg"]) for s in samples if json.loads(s["json"])["messages"])

    readers = {
        "webdataset, in order": plain,
        "webdataset, shuffle(1000)": shuffled,
        "webdataset, shuffle, JSON parsed": parsed,
    }
    return readers | litdata_reader(shards, folder)


def litdata_reader(shards: Shards, folder: Path) -> dict[str, Reader]:
    """The same samples as a litdata dataset; nothing when litdata is not installed."""
    try:
        from litdata.streaming import Cache, StreamingDataset
    except ImportError as error:
        print(f"without litdata: {error}", file=sys.stderr)
        return {}
    cache = Cache(str(folder / "litdata"), chunk_bytes="64MB")
    for i in range(shards.num_samples):
        text, image = shards.read_members(i)
        cache[i] = {"json": bytes(text), "jpg": bytes(image)}
    cache.done()
    cache.merge()
    dataset = StreamingDataset(str(folder / "litdata"), shuffle=False)

    def plain() -> int:
        return sum(len(sample["json"]) + len(sample["jpg"]) for sample in dataset)

    return {"litdata, in order": plain}


def measure(readers: dict[str, Reader], rounds: int, samples: int) -> dict[str, list[float]]:
    """CPU seconds per sample of each reader and round; a first round that is not counted warms."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    for round_ in range(rounds + 1):
        for name, read in readers.items():
            start = time.process_time()
            assert read() > 0
            if round_:
                times[name].append((time.process_time() - start) / samples)
    return times


def summary(times: dict[str, list[float]], shards: Shards) -> dict[str, dict[str, float]]:
    size = sum(index.tar_bytes for index in shards.indexes) / shards.num_samples
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["webdataset, in order"]
    return {
        name: {
            "us_per_sample": seconds * 1e6,
            "samples_per_second": 1 / seconds,
            "mb_per_second": size / seconds / 1e6,
            "times_webdataset": base / seconds,
        }
        for name, seconds in medians.items()
    }


if __name__ == "__main__":
    main()
