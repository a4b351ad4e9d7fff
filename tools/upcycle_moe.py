"""Make a mixture of experts of a dense model: a Hugging Face directory into another.

    python tools/upcycle_moe.py DENSE OUT --experts 8 --top-k 2
    python tools/upcycle_moe.py DENSE OUT --layers every-second --noise 0.01
    python tools/upcycle_moe.py DENSE OUT --router-from shards/train
    python tools/upcycle_moe.py DENSE OUT --shared-expert --layers last-half

Qwen3 becomes Qwen3-MoE, or with a shared expert Dots1, Qwen3-VL becomes Qwen3-VL-MoE. Every expert
of a layer is a copy of its MLP, or gives half of what it gives, as the shared one then does; the
chosen experts' weights sum up to 1. Without noise the logits are the dense model's,
whatever the router says. The router is random, or, from data, gives each expert a cluster of the
tokens that its layer sees (triptych_models/router_init.py has the formula). A layer's MLP is in
memory at a time, and of tensors that are only copied a few rows; from data also a row of tokens.
OUT is whole or absent.
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

    from triptych_models.upcycle import Dense, Made, Recipe

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
    type=click.Choice(["all", "every-second", "first-half", "last-half"]),
    help="which layers get experts",
)
@click.option(
    "--shared-expert",
    is_flag=True,
    help="also an expert that all tokens run through, and biases that choose: a Qwen3 becomes a "
    "Dots1, of all layers or the last half",
)
@click.option(
    "--noise",
    default=0.0,
    type=click.FloatRange(min=0.0),
    help="added to each copy, as a share of the matrix's root mean square",
)
@click.option("--router-std", default=0.02, type=click.FloatRange(min=0.0), help="of its weights")
@click.option(
    "--router-from",
    multiple=True,
    help="shards whose tokens routers begin with, instead of at random; may be repeated",
)
@click.option(
    "--router-tokens",
    default=8192,
    type=click.IntRange(min=1),
    help="how many of them: one packed row, run through DENSE on the CPU",
)
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
    shared_expert: bool,
    noise: float,
    router_std: float,
    router_from: tuple[str, ...],
    router_tokens: int,
    seed: int,
    max_shard_bytes: int,
) -> None:
    """Make OUT, a mixture of experts, of the dense model in DENSE."""
    from triptych_models.upcycle import Recipe

    recipe = Recipe(experts, top_k, layers, noise, router_std, seed, shared_expert)
    try:
        data = (list(router_from), router_tokens)
        size = upcycle(dense, out, recipe, data, max_shard_bytes)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{out}: {size:,} bytes, {experts} experts, {top_k} a token, layers: {layers}")


def upcycle(
    dense: Path,
    out: Path,
    recipe: Recipe,
    router_data: tuple[list[str], int] = ([], 0),
    max_shard_bytes: int = 5 * 10**9,
) -> int:
    """Write the mixture; returns the bytes of its weights.

    router_data: shards, and how many of their tokens routers begin with; without shards they are
    random. Raises ValueError if `out` exists, or `dense` is no model that the tool knows.
    """
    from safetensors import safe_open

    from triptych_models.export import COPIED
    from triptych_models.stream_shards import SIZES, Slot, lay_out, write_shards
    from triptych_models.upcycle import moe_config, read_dense, tensors
    from triptych_models.weights import weight_files

    if out.exists():
        raise ValueError(f"OUT: must not exist, got {out}; name a new directory")
    model = read_dense(dense)
    config = moe_config(model, recipe)
    files = weight_files(dense)
    routers = routers_of(model, recipe, *router_data) if router_data[0] else None
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was cut off
    with ExitStack() as stack:
        readers = {f: stack.enter_context(safe_open(f, "pt")) for f in sorted(set(files.values()))}
        slices = {name: readers[file].get_slice(name) for name, file in files.items()}
        odd = sorted(name for name, part in slices.items() if part.get_dtype() not in SIZES)
        if odd:
            raise ValueError(f"{dense}: tensors must be fp32, bf16 or fp16, got {', '.join(odd)}")
        shapes = {name: part.get_shape() for name, part in slices.items()}
        made = list(tensors(shapes, model, recipe, routers))
        slots = [Slot(m.name, m.shape, slices[m.sources[0]].get_dtype()) for m in made]
        partial.mkdir(parents=True)
        data = (piece for m in made for piece in pieces(m, [slices[name] for name in m.sources]))
        write_shards(partial, lay_out(slots, max_shard_bytes), data)
    for name in COPIED:
        if (dense / name).is_file():
            shutil.copyfile(dense / name, partial / name)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    facts = {"dense": str(dense.resolve()), **asdict(recipe)}
    if routers is not None:
        facts |= {"router_from": router_data[0], "router_tokens": router_data[1]}
    (partial / "upcycling.json").write_text(json.dumps(facts, indent=2) + "\n")
    partial.rename(out)
    return sum(slot.num_bytes for slot in slots)


def routers_of(model: Dense, recipe: Recipe, shards: list[str], tokens: int) -> dict[int, Tensor]:
    """The routers of the layers that get experts, from the first packed row of shards."""
    from triptych_core.loop import LABEL_KEYS
    from triptych_data.config import DataConfig
    from triptych_data.loader import PackLoader
    from triptych_data.processor import Processor
    from triptych_models.router_init import routers_from_data

    config = DataConfig(
        shards=shards, seq_len=tokens, num_workers=0, seed=recipe.seed, long_samples="skip"
    )
    loader = PackLoader(config, Processor.from_directory(model.path), rank=0, world_size=1)
    batch = dict(next(iter(loader)))
    unseen = {*LABEL_KEYS, "shift_labels", "num_targets"}
    return routers_from_data(
        model.path,
        {name: value for name, value in batch.items() if name not in unseen},
        batch["num_tokens"],
        recipe.sparse_layers(model.text.num_hidden_layers),
        num_experts=recipe.num_experts,
        std=recipe.router_std,
        seed=recipe.seed,
    )


def pieces(made: Made, stored: list[Any]) -> Iterator[Tensor]:
    """The tensor to write: as it is computed, else a few rows at a time."""
    if made.make is not None:
        whole = [each[:] for each in stored]
        for piece in made.make(*whole):
            yield piece.to(whole[0].dtype)
        return
    (source,) = stored
    size = source[:1].nbytes
    step = max(1, CHUNK // max(1, size))
    for begin in range(0, made.shape[0], step):
        yield source[begin : begin + step]


if __name__ == "__main__":
    sys.exit(main())
