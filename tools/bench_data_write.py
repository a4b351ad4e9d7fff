"""Writing shards: ours, checked and indexed, against webdataset's ShardWriter; samples/s/core.

python tools/bench_data_write.py [--samples 2000]
"""

import json
import resource
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import numpy as np
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images

from triptych_data.shards.reshard import reshard
from triptych_data.shards.write import write_shards

SHARD_SIZE = 64_000_000
ANSWER = "A number among many others. "


@click.command()
@click.option("--samples", default=2000, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="The best of so many counts.")
def main(samples: int, rounds: int) -> None:
    """Print samples per second of one core (user + system time) for images and for texts."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        inputs = {"512x384 JPEG + chat": write_images(root, samples)}
        inputs["1 kB chat"] = write_texts(root, 10 * samples)
        for title, source in inputs.items():
            count = sum(1 for _ in source.open())
            for way, write in ways(source, root / "out", root / "source").items():
                seconds = min(cpu_seconds(write, root / "out") for _ in range(rounds))
                click.echo(f"{title:<20} {way:<34} {count / seconds:>9,.0f} samples/s/core")


def ways(source: Path, out: Path, shards: Path) -> dict[str, Callable[[], object]]:
    """What is measured; `shards` is where the input of reshard is written."""
    shutil.rmtree(shards, ignore_errors=True)
    write_shards(source, shards, shard_size=SHARD_SIZE, decode=False)
    write = partial(write_shards, source, out, shard_size=SHARD_SIZE)
    return {
        "webdataset.ShardWriter, unchecked": partial(write_webdataset, source, out),
        "shard --check full": write,
        "shard --check header": partial(write, decode=False),
        "reshard --shuffle": partial(reshard, [shards], out, shard_size=SHARD_SIZE, shuffle_seed=0),
    }


def write_images(root: Path, count: int) -> Path:
    """Chats with an image of their own each, cut out of a photo."""
    photo, random = Image.fromarray(load_sample_images().images[0]), np.random.default_rng(0)
    (root / "images").mkdir()
    with (root / "images.jsonl").open("w") as file:
        for i in range(count):
            left, top = int(random.integers(0, 128)), int(random.integers(0, 43))
            name = f"images/{i}.jpg"
            photo.crop((left, top, left + 512, top + 384)).save(root / name, quality=85)
            parts = [{"type": "image", "image": name}, {"type": "text", "text": "What is it?"}]
            file.write(json.dumps(chat(parts, ANSWER * 8)) + "\n")
    return root / "images.jsonl"


def write_texts(root: Path, count: int) -> Path:
    """Chats of about 1 kB."""
    with (root / "texts.jsonl").open("w") as file:
        for i in range(count):
            file.write(json.dumps(chat(f"What is {i}?", ANSWER * 32)) + "\n")
    return root / "texts.jsonl"


def chat(question: object, answer: str) -> dict[str, object]:
    """One turn."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def write_webdataset(source: Path, out: Path) -> None:
    """The same samples as a script would write them: nothing decoded, nothing indexed."""
    pattern = str(out / "shard-%06d.tar")
    with webdataset.ShardWriter(pattern, maxsize=SHARD_SIZE, verbose=0) as writer:
        for number, line in enumerate(source.open()):
            record = json.loads(line)
            sample = {"__key__": f"{number:09d}", "json": record}
            for part in record["messages"][0]["content"]:
                if isinstance(part, dict) and part["type"] == "image":
                    sample["0.jpg"] = (source.parent / part.pop("image")).read_bytes()
                    part["index"] = 0
            writer.write(sample)


def cpu_seconds(write: Callable[[], object], out: Path) -> float:
    """User and system time of this process for `write` into the new folder `out`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF)
    write()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
