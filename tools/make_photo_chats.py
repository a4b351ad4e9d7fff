"""Chats about photographs of mixed resolution, for measuring a step with images decoded in it.

    python tools/make_photo_chats.py bench/photos --samples 2000
    triptych-data shard bench/photos/train.jsonl bench/photo-shards

The pictures are random crops of scikit-learn's two photographs, enlarged: sides of 192 to 1,536
pixels, evenly in their logarithm, as JPEGs of quality 88. Chats have one to three of them, and
answers of 60 to 400 words.
"""

import json
import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import click
from PIL import Image

SIDES = (192, 1536)
WORDS = "a temple roof behind dark trees or one bright flower in its garden under an even sky"


@click.command()
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--samples", default=2000, show_default=True)
@click.option("--processes", default=8, show_default=True)
def main(out_dir: Path, samples: int, processes: int) -> None:
    """Write train.jsonl and images/ into OUT_DIR, which must not exist."""
    if out_dir.exists():
        raise click.ClickException(f"{out_dir}: must not exist; name another folder")
    (out_dir / "images").mkdir(parents=True)
    with ProcessPoolExecutor(processes) as pool:
        chats = pool.map(partial(write_sample, out_dir), range(samples), chunksize=32)
        with click.progressbar(chats, length=samples, label="photographs") as shown:
            lines = [json.dumps(chat) + "\n" for chat in shown]
    (out_dir / "train.jsonl").write_text("".join(lines), encoding="utf-8")


def write_sample(out_dir: Path, number: int) -> dict[str, object]:
    """Write one chat's pictures; the same for a number on every machine."""
    draw = random.Random(number)
    paths = [f"images/{number}-{k}.jpg" for k in range(draw.randint(1, 3))]
    for path in paths:
        photograph(draw).save(out_dir / path, "JPEG", quality=88)
    question: list[dict[str, str]] = [{"type": "image", "image": path} for path in paths]
    question.append({"type": "text", "text": f"What do the {len(paths)} pictures show?"})
    answer = " ".join(draw.choices(WORDS.split(), k=draw.randint(60, 400)))
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def photograph(draw: random.Random) -> Image.Image:
    """A random crop of half a photograph's width or more, in a random size."""
    from sklearn.datasets import load_sample_images

    picture = Image.fromarray(draw.choice(load_sample_images().images))
    wide, high = (draw.randint(side // 2, side) for side in picture.size)
    left, top = draw.randint(0, picture.width - wide), draw.randint(0, picture.height - high)
    low, top_side = SIDES
    size = [round(low * (top_side / low) ** draw.random()) for _ in range(2)]
    return picture.crop((left, top, left + wide, top + high)).resize((size[0], size[1]))


if __name__ == "__main__":
    main()
