"""`triptych-data inspect` and `preview`: what shows what shards hold."""

from pathlib import Path

import click

from triptych_data import cli_options as options
from triptych_data.cli_options import print_json, progress


@click.command()
@click.argument("shards", nargs=-1, required=True)
@click.option("--model", help="A Hugging Face model folder: adds tokens and targets.")
@click.option("--seq-len", type=click.IntRange(8), help="Tokens of a pack: adds the packing.")
@click.option("--ranks", type=click.IntRange(1), default=8, show_default=True, help="For balance.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw it: a .png or .svg.")
@options.min_pixels
@options.max_pixels
@options.as_json
def inspect(
    shards: tuple[str, ...],
    model: str | None,
    seq_len: int | None,
    ranks: int,
    picture: Path | None,
    min_pixels: int | None,
    max_pixels: int | None,
    as_json: bool,
) -> None:
    """Count samples, media, tokens, packs.

    Tokens, and how full packs are and how even the load of ranks, need a model and a length; they
    are those of the planner that training uses.

    \b
    Example:
      triptych-data inspect shards/ --plot shards.png
      triptych-data inspect shards/ --model Qwen3-VL-8B --seq-len 8192 --ranks 64
    """
    from triptych_data.reader import Shards
    from triptych_data.survey import as_text, survey

    if (model is None) != (seq_len is None):
        raise ValueError("--model and --seq-len must come together, got one; add the other")
    opened = Shards.open(shards)
    report, expected = survey(opened), None
    if model is not None and seq_len is not None:
        from triptych_data.forecast import forecast

        with progress() as on_progress:
            expected = forecast(
                opened,
                model,
                seq_len,
                ranks=ranks,
                min_pixels=min_pixels,
                max_pixels=max_pixels,
                progress=lambda done, total: on_progress("Measuring", done, total),
            )
        report |= expected.report
    if picture:
        from triptych_data.plot import plot

        plot(opened, picture, expected)
        report["plot"] = str(picture)
    if as_json:
        print_json(report)
    else:
        click.echo(as_text(report))


@click.command()
@click.argument("shards", nargs=-1, required=True)
@click.option("--model", required=True, help="A Hugging Face model folder.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("preview.html"))
@click.option("-n", "--num-samples", type=click.IntRange(1), default=20, show_default=True)
@click.option("--key", "keys", multiple=True, help="Show this sample; may be given again.")
@options.min_pixels
@options.max_pixels
@options.as_json
def preview(
    shards: tuple[str, ...],
    model: str,
    output: Path,
    num_samples: int,
    keys: tuple[str, ...],
    min_pixels: int | None,
    max_pixels: int | None,
    as_json: bool,
) -> None:
    """Show samples as the loss sees them.

    Writes a web page: which tokens are trained, ignored, special, with images, frames and sound.
    The samples are spread evenly over all shards; the page holds all it shows and needs no network.

    \b
    Example:
      triptych-data preview shards/ --model Qwen3-VL-8B -n 20 -o preview.html
      triptych-data preview shards/ --model Qwen3-VL-8B --key 000000123
    """
    from triptych_data.preview import build_page
    from triptych_data.reader import Shards

    opened = Shards.open(shards)
    page = build_page(
        opened, model, num_samples, keys=keys, min_pixels=min_pixels, max_pixels=max_pixels
    )
    output.write_text(page, encoding="utf-8")
    count = len(keys) or min(num_samples, opened.num_samples)
    if as_json:
        print_json({"page": str(output), "num_samples": count})
    else:
        click.echo(f"{count} samples: {output}")
