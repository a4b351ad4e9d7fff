"""Shards of random latents for stages/diffusion.py, for speed and memory measurements.

python tools/make_bench_latents.py bench/videos --shape 16,21,60,104 --text 512,4096 --count 24
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from triptych_data.tensors.write import write_tensor_shards


@click.command(context_settings={"show_default": True})
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--shape", default="16,21,60,104", help="of a sample's latents")
@click.option("--text", default="", help="shape of a sample's text features; none by default")
@click.option("--count", default=24, help="samples")
def main(out_dir: Path, shape: str, text: str, count: int) -> None:
    """Write the shards into OUT_DIR."""
    shapes = {"latents": shape} | ({"text_features": text} if text else {})
    sizes = {name: tuple(map(int, said.split(","))) for name, said in shapes.items()}
    write_tensor_shards(samples(sizes, count), out_dir, overwrite=True)


def samples(
    sizes: dict[str, tuple[int, ...]], count: int
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        yield (
            {"label": number % 1000, "text": ""},
            {name: torch.randn(size, generator=generator) for name, size in sizes.items()},
        )


if __name__ == "__main__":
    main()
