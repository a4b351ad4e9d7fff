"""`triptych-data latents`: arrays that were computed once, as shards."""

from pathlib import Path

import click

from triptych_data.cli import options
from triptych_data.cli.options import print_json


@click.command()
@click.argument(
    "arrays",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
)
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@options.shard_size
@options.samples_per_shard
@options.overwrite
@options.as_json
def latents(
    arrays: tuple[Path, ...],
    output: Path,
    shard_size: int,
    samples_per_shard: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write latents as shards of tensors, for stages/diffusion.py.

    ARRAYS are .npz or .safetensors files with a row a sample: `latents` (n, C, H, W), for videos
    (n, C, F, H, W), of float16, bfloat16 or float32; `labels` (n,) of integers; `latents_std`, of
    the latents' shape, if a step is to draw from an autoencoder's posterior. Other arrays (n,), of
    numbers or, in .npz, words, are kept in the samples' JSON. Nothing is unpickled.

    \b
    Example:
      triptych-data latents imagenet-*.npz shards/
    """
    from triptych_data.tensors.write import shard_arrays

    written = shard_arrays(
        list(arrays),
        output,
        shard_size=shard_size,
        samples_per_shard=samples_per_shard,
        overwrite=overwrite,
    )
    if as_json:
        print_json({"shards": [str(path) for path in written]})
    else:
        click.echo(f"{len(written):,} shards in {output}")
