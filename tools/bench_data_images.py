"""Time an image's way from JPEG to patches: triptych_data against Pillow + numpy and transformers.

    python tools/bench_data_images.py --images 24 --rounds 9

Real photographs of 512 x 384, encoded as JPEG, one core. Ours ends in uint8 patches, which the
device normalises; "Pillow + numpy" ends in the normalised float32 patches that a model takes, and
a second row stops at uint8 as ours does. Figures are CPU time (user + system) per image, the
median over rounds in which all take turns, in one process. Results are compared before timing.
"""

import io
import json
import statistics
import time
from collections.abc import Callable

import click
import numpy as np
import torch
from bench_data_read import HEIGHT, WIDTH, photographs
from PIL import Image

from triptych_data.media.images import ImageRules, decode_image, encode_image, image_grid

MEAN = STD = np.full(3, 0.5, dtype=np.float32)
RULES = {
    "Qwen3-VL, 512 x 384": ImageRules(16, 2, 2, 65_536, 16_777_216),
    "Qwen2-VL, resized to 504 x 392": ImageRules(14, 2, 2, 3_136, 12_845_056),
    "Qwen3-VL, shrunk to 256 x 192": ImageRules(16, 2, 2, 4_096, 65_536),
}
Encode = Callable[[bytes], np.ndarray | torch.Tensor]


@click.command(help=__doc__)
@click.option("--images", type=click.IntRange(1), default=24, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(images: int, rounds: int, as_json: bool) -> None:
    torch.set_num_threads(1)
    files = list(photographs(images))
    result = {}
    for name, rules in RULES.items():
        encoders = make_encoders(rules)
        check(encoders, files[0])
        result[name] = measure(encoders, files, rounds)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    size = sum(map(len, files)) / images / 1000
    print(f"{images} JPEGs of {WIDTH} x {HEIGHT}, {size:.1f} kB, {rounds} rounds, CPU of one core")
    for name, row in result.items():
        print(name)
        ours = row["ours"]
        for encoder, milliseconds in row.items():
            print(f"  {encoder:<40}{milliseconds:>7.2f} ms {milliseconds / ours:>6.2f} x ours")


def make_encoders(rules: ImageRules) -> dict[str, Encode]:
    from transformers import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    settings = {
        **{name: getattr(rules, name) for name in ("patch_size", "merge_size")},
        "temporal_patch_size": rules.temporal_patch_size,
        "size": {"shortest_edge": rules.min_pixels, "longest_edge": rules.max_pixels},
        "image_mean": MEAN.tolist(),
        "image_std": STD.tolist(),
    }
    slow, fast = Qwen2VLImageProcessorPil(**settings), Qwen2VLImageProcessor(**settings)
    return {
        "ours": lambda data: encode_image(data, rules)[0],
        "Pillow + numpy": lambda data: pillow_numpy(data, rules, normalise=True),
        "Pillow + numpy, uint8": lambda data: pillow_numpy(data, rules, normalise=False),
        "transformers on Pillow": lambda data: slow(
            images=[Image.open(io.BytesIO(data)).convert("RGB")], return_tensors="np"
        )["pixel_values"],
        "transformers on torchvision": lambda data: fast(
            images=[Image.open(io.BytesIO(data)).convert("RGB")], return_tensors="pt"
        )["pixel_values"],
        "transformers, our decoder": lambda data: fast(
            images=[decode_image(data)], return_tensors="pt"
        )["pixel_values"],
    }


def pillow_numpy(data: bytes, rules: ImageRules, *, normalise: bool) -> np.ndarray:
    """Patches (num_patches, patch_dim) as the common recipe makes them."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    _, rows, cols = image_grid(*image.size, rules)
    patch, merge, depth = rules.patch_size, rules.merge_size, rules.temporal_patch_size
    image = image.resize((cols * patch, rows * patch), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    if normalise:
        pixels = (pixels.astype(np.float32) / 255 - MEAN) / STD
    frames = np.stack([pixels.transpose(2, 0, 1)] * depth)
    cut = frames.reshape(depth, 3, rows // merge, merge, patch, cols // merge, merge, patch)
    cut = cut.transpose(2, 5, 3, 6, 1, 0, 4, 7)
    return np.ascontiguousarray(cut.reshape(rows * cols, -1))


def check(encoders: dict[str, Encode], data: bytes) -> None:
    """All must see the same picture: decoders and resizers differ by a few levels at most."""
    ours = np.asarray(encoders["ours"](data)).astype(np.float32)
    for name, encode in encoders.items():
        other = np.asarray(encode(data)).astype(np.float32)
        if other.max() <= 1:
            other = (other + 1) * 127.5
        difference = np.abs(other - ours)
        assert difference.mean() < 1 and difference.max() < 40, (name, difference.max())


def measure(encoders: dict[str, Encode], files: list[bytes], rounds: int) -> dict[str, float]:
    """Milliseconds of CPU per image."""
    times: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(rounds):
        for name, encode in encoders.items():
            start = time.process_time()
            for data in files:
                encode(data)
            times[name].append((time.process_time() - start) / len(files) * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
