"""`triptych-data index` and `verify`: what gives shards made elsewhere an index, and checks it."""

from typing import Literal

import click

from triptych_data.cli import options
from triptych_data.cli.options import print_json, progress


@click.command()
@click.argument("shards", nargs=-1, required=True)
@click.option("--overwrite", is_flag=True, help="Replace an index that no longer fits its shard.")
@click.option("--any-members", is_flag=True, help="Not chats: whatever files share a key.")
@options.workers
@options.as_json
def index(
    shards: tuple[str, ...], overwrite: bool, any_members: bool, workers: int, as_json: bool
) -> None:
    """Index shards made elsewhere.

    SHARDS that have an index already are indexed again and compared with it.

    \b
    Example:
      triptych-data index /data/other/*.tar
      triptych-data index /data/cc12m/*.tar --any-members
    """
    from triptych_data.shards.locate import find_shards
    from triptych_data.shards.scan import index_shards

    tars, results = find_shards(shards), []
    layout: Literal["chat", "members"] = "members" if any_members else "chat"
    with progress() as on_progress:
        for tar, (built, written) in index_shards(
            tars, overwrite=overwrite, num_workers=workers, layout=layout
        ):
            results.append(
                {
                    "shard": str(tar),
                    "num_samples": built.num_samples,
                    "fingerprint": built.fingerprint,
                    "status": "written" if written else "verified",
                }
            )
            on_progress("Indexing", len(results), len(tars))
    if as_json:
        print_json(results)
        return
    for result in results:
        click.echo(f"{result['shard']}: {result['num_samples']:,} samples, {result['status']}")


@click.command()
@click.argument("shards", nargs=-1, required=True)
@options.workers
@options.as_json
def verify(shards: tuple[str, ...], workers: int, as_json: bool) -> None:
    """Check every byte of shards.

    Against their indexes: what was flipped, cut off, put in another's place, or is missing from a
    folder, by shard and sample. The exit code is 1 if anything is wrong.

    \b
    Example:
      triptych-data verify shards/
      triptych-data verify https://example.com/web-{000000..000099}.tar --json
    """
    from triptych_data.shards.verify import verify_shards

    with progress() as on_progress:
        report = verify_shards(
            shards,
            num_workers=workers,
            on_progress=lambda done, total: on_progress("Verifying", done, total),
        )
    if as_json:
        print_json(report.as_dict())
    else:
        for line in report.lines():
            click.echo(line)
    if not report.ok:
        raise click.exceptions.Exit(1)
