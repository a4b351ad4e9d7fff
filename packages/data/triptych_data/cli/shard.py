"""`triptych-data shard` and `reshard`: what writes shards."""

from pathlib import Path
from typing import Any

import click

from triptych_data.cli import options
from triptych_data.cli.options import print_json, progress, resumable

KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow", "tar", "folder")
"""Keys of sources.kinds.OPENERS, written out so that --help needs no numpy."""


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@click.option("--format", "kind", type=click.Choice(KINDS), help="Default: as the name says.")
@click.option("--messages", help="Column of turns. Default: messages or conversations.")
@click.option("--prompt", help="Column of the question, beside --response.")
@click.option("--response", help="Column of the answer or caption.")
@click.option("--system", help="Column of the system message.")
@click.option("--prompt-template", help="The question as text; {column} stands for its value.")
@click.option("--text", help="Column of documents to learn whole. Default: text, without media.")
@click.option("--image", "images", multiple=True, help="Column of images; may be given again.")
@click.option("--video", "videos", multiple=True, help="Column of videos; may be given again.")
@click.option("--audio", "audios", multiple=True, help="Column of audio; may be given again.")
@click.option("--hear-videos", is_flag=True, help="With their sound, if a part says no other.")
@click.option("--drop", multiple=True, help="Column not to keep beside the messages.")
@click.option(
    "--media-root",
    "--image-root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where paths of media start and must stay. Default: the folder of their input.",
)
@click.option("--allow-outside", is_flag=True, help="Let paths of media lead anywhere.")
@click.option(
    "--check",
    type=click.Choice(["full", "header"]),
    default="full",
    show_default=True,
    help="Decode all media to find damage, or trust what follows their headers.",
)
@options.shard_size
@options.samples_per_shard
@options.shuffle
@options.seed
@click.option("--skip-bad", is_flag=True, help="Leave bad records out, list them in skipped.jsonl.")
@click.option(
    "--max-bad",
    type=options.CountOrShare(),
    default="10%",
    show_default=True,
    help="With --skip-bad: stop when more are bad, a number or a share.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be written.")
@options.overwrite
@options.workers
@options.as_json
def shard(
    inputs: tuple[str, ...],
    output: Path,
    messages: str | None,
    prompt: str | None,
    response: str | None,
    system: str | None,
    prompt_template: str | None,
    text: str | None,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    audios: tuple[str, ...],
    drop: tuple[str, ...],
    check: str,
    shuffle: bool,
    seed: int,
    skip_bad: bool,
    max_bad: float,
    dry_run: bool,
    overwrite: bool,
    workers: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Check any data and write it as shards.

    INPUT is JSONL, a JSON array, CSV or TSV (each also .gz, .bz2, .xz), Parquet, Arrow or Feather,
    a tar of WebDataset, or a folder: of such files, saved by Hugging Face's datasets, or of media
    with a metadata file or with texts of the same name. OUTPUT is a folder.

    Every image, video and audio is decoded once to find damage; its bytes are kept as they are.
    Nothing appears in OUTPUT before all of it is written. A run that was stopped goes on when its
    command is given again, and writes the bytes it would have written.

    \b
    Example:
      triptych-data shard chats.jsonl shards/ --shuffle --seed 1 --skip-bad
      triptych-data shard train-*.parquet shards/ --prompt question --response answer --image image
      triptych-data shard llava.json shards/ --media-root /data/images
      triptych-data shard photos/ shards/ --prompt-template "Describe the image."
      triptych-data shard cc12m-*.tar shards/ --dry-run
      triptych-data shard web-*.jsonl.gz shards/ --text content
    A line of chats.jsonl:
      {"messages": [
        {"role": "user", "content": [
          {"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A cat."}]}
    A line of documents:
      {"text": "A text to learn whole, <image> with images.", "images": ["cat.jpg"]}
    """
    from triptych_data.shards.mapping import Mapping
    from triptych_data.shards.write import check_records, write_shards

    media = {"image": images, "video": videos, "audio": audios}
    settings |= {
        "mapping": Mapping(
            messages=messages,
            prompt=prompt,
            response=response,
            system=system,
            prompt_template=prompt_template,
            text=text,
            media={kind: columns for kind, columns in media.items() if columns},
            drop=drop,
        ),
        "decode": check == "full",
        "shuffle_seed": seed if shuffle else None,
        "max_bad": max_bad if skip_bad else 0,
        "num_workers": workers,
    }
    with progress() as on_progress, resumable(output):
        if dry_run:
            report = check_records(inputs, on_progress=on_progress, **settings)
        else:
            report = write_shards(
                inputs, output, overwrite=overwrite, on_progress=on_progress, **settings
            )
    if as_json:
        print_json({"dry_run": dry_run, **_as_json(report)})
    else:
        _print_report(report, output, dry_run)


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="SHARDS...")
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@options.shard_size
@options.samples_per_shard
@options.shuffle
@options.seed
@click.option("--num-samples", type=click.IntRange(1), help="Only so many, the first of the order.")
@click.option(
    "--keys",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File of keys, one a line: only these samples.",
)
@click.option(
    "--without-keys",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File of keys, one a line: all samples but these.",
)
@click.option("--rekey", is_flag=True, help="Number the samples anew, if keys repeat.")
@options.overwrite
@options.workers
@options.as_json
def reshard(
    inputs: tuple[str, ...],
    output: Path,
    shuffle: bool,
    seed: int,
    workers: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Copy samples into other shards.

    Of another size, in another order, or a choice of them. The bytes are copied and checked
    against their checksums; nothing is encoded again. Goes on after a stop as shard does.

    \b
    Example:
      triptych-data reshard shards/ larger/ --shard-size 1GB
      triptych-data reshard web/ chats/ mixed/ --shuffle --rekey
      triptych-data reshard shards/ clean/ --without-keys bad-keys.txt
    """
    from triptych_data.shards.reshard import reshard as copy

    with progress() as on_progress, resumable(output):
        report = copy(
            inputs,
            output,
            shuffle_seed=seed if shuffle else None,
            num_workers=workers,
            on_progress=on_progress,
            **settings,
        )
    if as_json:
        print_json(_as_json(report))
    else:
        _print_report(report, output, dry_run=False)


def _as_json(report: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        **asdict(report),
        "shards": [str(path) for path in report.shards],
        "skipped": [entry._asdict() for entry in report.skipped],
        "skipped_reasons": report.skipped_reasons,
    }


def _print_report(report: Any, output: Path, dry_run: bool) -> None:
    from triptych_data.look.survey import in_units

    for rejected in report.skipped[:10]:
        click.echo(f"skipped {rejected.error}", err=True)
    counts = {"images": report.num_images, "videos": report.num_videos, "audio": report.num_audios}
    media = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    click.echo(
        f"{report.num_samples:,} samples{f' with {media}' if media else ''}: "
        f"{len(report.shards):,} shards, {in_units(report.tar_bytes)}"
        f"{', nothing written (--dry-run)' if dry_run else f' in {output}'}"
    )
    if report.kept_records or report.kept_shards:
        click.echo(
            f"kept from the run before: {report.kept_records:,} records that were checked, "
            f"{report.kept_shards:,} shards that were written (verified)"
        )
    if report.skipped:
        where = "" if dry_run else f": {output / 'skipped.jsonl'}"
        click.echo(f"{len(report.skipped):,} bad records left out{where}")
        for reason, count in report.skipped_reasons.items():
            click.echo(f"{count:>9,} × {reason}")
