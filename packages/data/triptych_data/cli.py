"""The `triptych-data` command: shard, index, inspect, preview; imports wait for their command."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
SHARDS_HELP = "Tar files, folders of them, or globs."


class _OneLineErrors(click.Group):
    """What a user can cause (ValueError, OSError) ends with one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            raise click.ClickException(" ".join(str(error).split())) from error


class _Size(click.ParamType):
    """Bytes, written as 256MB, 1.5GiB or a plain number."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([\d.]+)\s*([kmg]i?|)b?", value.strip().lower())
        if not match or match[1].count(".") > 1 or match[1] == ".":
            self.fail(f"{value!r} is no size such as 256MB or 1GiB", param, ctx)
        return int(float(match[1]) * UNITS[match[2]])


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Multimodal chats as indexed WebDataset shards: write, check, look at them.

    \b
    Example:
      triptych-data shard chats.jsonl shards/
      triptych-data inspect shards/
      triptych-data preview shards/ --model Qwen3-VL-8B -o preview.html
    """


def _cores() -> int:
    return len(os.sched_getaffinity(0))


_workers = click.option(
    "--workers",
    type=click.IntRange(1),
    default=lambda: min(8, _cores()),
    show_default="cores, at most 8",
    help="Processes to use; the output does not depend on it.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_min_pixels = click.option("--min-pixels", type=int, help="Replaces the model folder's bound.")
_max_pixels = click.option("--max-pixels", type=int, help="Replaces the model folder's bound.")


@main.command()
@click.argument("input", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--shard-size", type=_Size(), default="256MB", show_default=True, help="Most bytes.")
@click.option("--samples-per-shard", type=click.IntRange(1), help="Most samples.")
@click.option("--image-root", type=click.Path(path_type=Path), help="Default: folder of INPUT.")
@click.option("--shuffle", is_flag=True, help="Write the samples in a random, repeatable order.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of --shuffle.",
)
@click.option("--skip-bad", is_flag=True, help="Leave bad lines out, list them in skipped.jsonl.")
@click.option("--overwrite", is_flag=True, help="Replace the shards in OUTPUT, nothing else there.")
@_workers
@_json
def shard(
    input: Path,
    output: Path,
    shard_size: int,
    samples_per_shard: int | None,
    image_root: Path | None,
    shuffle: bool,
    seed: int,
    skip_bad: bool,
    overwrite: bool,
    workers: int,
    as_json: bool,
) -> None:
    """Check chats and write them as shards.

    INPUT is JSONL, OUTPUT a folder. Every image is decoded once to find damage; its bytes are
    kept as they are. Nothing appears in OUTPUT before all of it is written.

    \b
    Example:
      triptych-data shard chats.jsonl shards/ --shuffle --seed 1 --skip-bad
    A line of chats.jsonl:
      {"messages": [
        {"role": "user", "content": [
          {"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A cat."}]}
    """
    from triptych_data.shards import write_shards
    from triptych_data.survey import in_units

    with _progress("Sharding") as on_progress:
        report = write_shards(
            input,
            output,
            shard_size=shard_size,
            samples_per_shard=samples_per_shard,
            num_workers=workers,
            shuffle_seed=seed if shuffle else None,
            image_root=image_root,
            skip_bad=skip_bad,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    if as_json:
        _print_json(
            {
                "shards": [str(path) for path in report.shards],
                "num_samples": report.num_samples,
                "num_images": report.num_images,
                "num_videos": report.num_videos,
                "num_audios": report.num_audios,
                "text_bytes": report.text_bytes,
                "tar_bytes": report.tar_bytes,
                "skipped": [rejected._asdict() for rejected in report.skipped],
            }
        )
        return
    for rejected in report.skipped[:10]:
        click.echo(f"skipped {rejected.error}", err=True)
    click.echo(
        f"{report.num_samples:,} samples with {report.num_images:,} images: {len(report.shards):,} "
        f"shards, {in_units(report.tar_bytes)} in {output}"
    )
    if report.skipped:
        click.echo(f"{len(report.skipped):,} bad lines left out: {output / 'skipped.jsonl'}")


@main.command()
@click.argument("shards", nargs=-1, required=True)
@click.option("--overwrite", is_flag=True, help="Replace an index that no longer fits its shard.")
@_workers
@_json
def index(shards: tuple[str, ...], overwrite: bool, workers: int, as_json: bool) -> None:
    """Index shards made elsewhere, or verify.

    SHARDS that have an index already are compared with it, byte for byte.

    \b
    Example:
      triptych-data index /data/other/*.tar
    """
    from triptych_data.reader import find_shards
    from triptych_data.scan import index_shards

    tars, results = find_shards(shards), []
    with _progress("Indexing") as on_progress:
        for tar, (built, written) in index_shards(tars, overwrite=overwrite, num_workers=workers):
            results.append(
                {
                    "shard": str(tar),
                    "num_samples": built.num_samples,
                    "fingerprint": built.fingerprint,
                    "status": "written" if written else "verified",
                }
            )
            on_progress(len(results), len(tars))
    if as_json:
        _print_json(results)
        return
    for result in results:
        click.echo(f"{result['shard']}: {result['num_samples']:,} samples, {result['status']}")


@main.command()
@click.argument("shards", nargs=-1, required=True)
@click.option("--model", help="A Hugging Face model folder: adds tokens and targets.")
@click.option("--seq-len", type=click.IntRange(8), help="Tokens of a pack: adds the packing.")
@_min_pixels
@_max_pixels
@_json
def inspect(
    shards: tuple[str, ...],
    model: str | None,
    seq_len: int | None,
    min_pixels: int | None,
    max_pixels: int | None,
    as_json: bool,
) -> None:
    """Count samples, images, tokens, packs.

    Tokens and packs need a model and a length.

    \b
    Example:
      triptych-data inspect shards/ --model Qwen3-VL-8B --seq-len 8192
    """
    from triptych_data.reader import Shards
    from triptych_data.survey import as_text, forecast, survey

    if (model is None) != (seq_len is None):
        raise ValueError("--model and --seq-len must come together, got one; add the other")
    opened = Shards.open(shards)
    report = survey(opened)
    if model is not None and seq_len is not None:
        with _progress("Measuring") as on_progress:
            report |= forecast(
                opened,
                model,
                seq_len,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                progress=on_progress,
            )
    if as_json:
        _print_json(report)
    else:
        click.echo(as_text(report))


@main.command()
@click.argument("shards", nargs=-1, required=True)
@click.option("--model", required=True, help="A Hugging Face model folder.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("preview.html"))
@click.option("-n", "--num-samples", type=click.IntRange(1), default=20, show_default=True)
@_min_pixels
@_max_pixels
def preview(
    shards: tuple[str, ...],
    model: str,
    output: Path,
    num_samples: int,
    min_pixels: int | None,
    max_pixels: int | None,
) -> None:
    """Show samples as the loss sees them.

    Writes a web page: which tokens are trained, ignored, special. The samples are spread evenly
    over all shards; the page holds its images and needs no network.

    \b
    Example:
      triptych-data preview shards/ --model Qwen3-VL-8B -n 20 -o preview.html
    """
    from triptych_data.preview import build_page
    from triptych_data.reader import Shards

    opened = Shards.open(shards)
    page = build_page(opened, model, num_samples, min_pixels=min_pixels, max_pixels=max_pixels)
    output.write_text(page, encoding="utf-8")
    click.echo(f"{min(num_samples, opened.num_samples)} samples: {output}")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal; yields its on_progress."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
