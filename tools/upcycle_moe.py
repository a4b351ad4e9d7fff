"""Make a mixture of experts of a dense model: a Hugging Face directory into another.

    python tools/upcycle_moe.py DENSE OUT --experts 8 --top-k 2
    python tools/upcycle_moe.py DENSE OUT --layers every-second --noise 0.01

Every expert of a layer is a copy of its MLP; the router is random, its chosen weights sum up to 1.
Without noise the logits are the dense model's, whatever the router says. One tensor is in memory at
a time, and of those that are only copied a few rows. OUT is whole or absent.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from triptych_models.upcycle import Made, Recipe

CHUNK = 1 << 26  # bytes of a tensor that is copied, read at a time
FOLDER = click.Path(path_type=Path)


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.argument("dense", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--experts", default=8, type=click.IntRange(min=1), help="of each sparse layer")
@click.option("--top-k", default=2, type=click.IntRange(min=1), help="experts of a token")
@click.option(
    "--layers",
    default="all",
    type=click.Choice(["all", "every-second", "first-half"]),
    help="which layers get experts",
)
@click.option(
    "--noise",
    default=0.0,
    type=click.FloatRange(min=0.0),
    help="added to each copy, as a share of the matrix's root mean square",
)
@click.option("--router-std", default=0.02, type=click.FloatRange(min=0.0), help="of its weights")
@click.option("--seed", default=0, help="of routers and noise")
@click.option(
    "--max-shard-bytes", default=5 * 10**9, type=click.IntRange(min=1), help="of a file of OUT"
)
def main(
    dense: Path,
    out: Path,
    experts: int,
    top_k: int,
    layers: Any,
    noise: float,
    router_std: float,
    seed: int,
    max_shard_bytes: int,
) -> None:
    """Make OUT, a mixture of experts, of the dense model in DENSE."""
    from triptych_models.upcycle import Recipe

    recipe = Recipe(experts, top_k, layers, noise, router_std, seed)
    try:
        size = upcycle(dense, out, recipe, max_shard_bytes)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{out}: {size:,} bytes, {experts} experts, {top_k} a token, layers: {layers}")


def upcycle(dense: Path, out: Path, recipe: Recipe, max_shard_bytes: int = 5 * 10**9) -> int:
    """Write the mixture; returns the bytes of its weights.

    Raises ValueError if `out` exists, or `dense` is no Qwen3 that the families compute.
    """
    from safetensors import safe_open

    from triptych_models.export import COPIED
    from triptych_models.read_config import read_config
    from triptych_models.stream_shards import SIZES, Slot, lay_out, write_shards
    from triptych_models.upcycle import moe_config, tensors
    from triptych_models.weights import weight_files

    if out.exists():
        raise ValueError(f"OUT: must not exist, got {out}; name a new directory")
    stored: Any = read_config(dense, "qwen3")
    config = moe_config(stored, recipe)
    files = weight_files(dense)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was cut off
    with ExitStack() as stack:
        readers = {f: stack.enter_context(safe_open(f, "pt")) for f in sorted(set(files.values()))}
        slices = {name: readers[file].get_slice(name) for name, file in files.items()}
        odd = sorted(name for name, part in slices.items() if part.get_dtype() not in SIZES)
        if odd:
            raise ValueError(f"{dense}: tensors must be fp32, bf16 or fp16, got {', '.join(odd)}")
        shapes = {name: part.get_shape() for name, part in slices.items()}
        made = list(tensors(shapes, stored.num_hidden_layers, recipe, dense))
        slots = [Slot(m.name, m.shape, slices[m.source].get_dtype()) for m in made]
        partial.mkdir(parents=True)
        data = (piece for each in made for piece in pieces(each, slices[each.source]))
        write_shards(partial, lay_out(slots, max_shard_bytes), data)
    for name in COPIED:
        if (dense / name).is_file():
            shutil.copyfile(dense / name, partial / name)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    facts = {"dense": str(dense.resolve()), **asdict(recipe)}
    (partial / "upcycling.json").write_text(json.dumps(facts, indent=2) + "\n")
    partial.rename(out)
    return sum(slot.num_bytes for slot in slots)


def pieces(made: Made, stored: Any) -> Iterator[Tensor]:
    """The tensor to write, whole where it is computed, else a few rows at a time."""
    if made.change is not None:
        whole = stored[:]
        yield made.change(whole).to(whole.dtype)
        return
    num_rows = made.shape[0]
    size = stored[:1].nbytes
    step = max(1, CHUNK // max(1, size))
    for begin in range(0, num_rows, step):
        yield stored[begin : begin + step]


if __name__ == "__main__":
    sys.exit(main())
