"""`triptych-data inspect` and `preview`: what shows what shards hold."""

from pathlib import Path
from typing import Any

import click

from triptych_data.cli import options
from triptych_data.cli.options import print_json, progress

_config = click.option(
    "--config",
    "stage",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A stage's YAML: its model, data settings and, without SHARDS, its data.",
)
_model = click.option("--model", help="A local Hugging Face model folder.")


@click.command()
@click.argument("shards", nargs=-1)
@_config
@_model
@click.option("--seq-len", type=click.IntRange(8), help="Tokens of a pack; needs --model.")
@click.option("--ranks", type=click.IntRange(1), default=8, show_default=True, help="For balance.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw it: a .png or .svg.")
@options.min_pixels
@options.max_pixels
@options.as_json
def inspect(
    shards: tuple[str, ...],
    stage: Path | None,
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
      triptych-data inspect --config sft.yaml
    """
    from triptych_data.look.survey import as_text, survey

    if stage is None and (model is None) != (seq_len is None):
        raise ValueError("--model and --seq-len must come together, got one; add the other")
    changes = {"seq_len": seq_len, "min_pixels": min_pixels, "max_pixels": max_pixels}
    config, model = _settings(shards, stage, model, changes)
    opened, sources = _open(config)
    report, expected = survey(opened), None
    if model is not None:
        from triptych_data.look.forecast import forecast
        from triptych_data.stage_config import open_processor

        with progress() as on_progress:
            expected = forecast(
                opened,
                sources,
                config,
                open_processor(model, config),
                ranks=ranks,
                progress=lambda done, total: on_progress("Measuring", done, total),
            )
        report |= expected.report
    if picture:
        from triptych_data.look.plot import plot

        plot(opened, picture, expected)
        report["plot"] = str(picture)
    if as_json:
        print_json(report)
    else:
        click.echo(as_text(report))


@click.command()
@click.argument("shards", nargs=-1)
@_config
@_model
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("preview.html"))
@click.option("-n", "--num-samples", type=click.IntRange(1), default=20, show_default=True)
@click.option("--key", "keys", multiple=True, help="Show this sample; may be given again.")
@options.min_pixels
@options.max_pixels
@options.as_json
def preview(
    shards: tuple[str, ...],
    stage: Path | None,
    model: str | None,
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
      triptych-data preview --config sft.yaml
    """
    from triptych_data.look.preview import build_page
    from triptych_data.stage_config import open_processor

    changes = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    config, model = _settings(shards, stage, model, changes)
    if model is None:
        raise click.UsageError("Missing option '--model', or a '--config' that names one.")
    opened, _ = _open(config)
    processor = open_processor(model, config)
    page = build_page(opened, model, num_samples, keys=keys, processor=processor)
    output.write_text(page, encoding="utf-8")
    count = len(keys) or min(num_samples, opened.num_samples)
    if as_json:
        print_json({"page": str(output), "num_samples": count})
    else:
        click.echo(f"{count} samples: {output}")


def _settings(
    shards: tuple[str, ...], stage: Path | None, model: str | None, changes: dict[str, Any]
) -> tuple[Any, str | None]:
    """The data configuration, and the model if one is named."""
    from triptych_data.stage_config import build_data, read_stage

    given = {name: value for name, value in changes.items() if value is not None}
    if not shards and stage is None:
        raise click.UsageError("Missing argument 'SHARDS...', or a '--config' that names them.")
    if shards:
        given |= {"shards": list(shards), "sources": {}}
    if stage is None:
        return build_data(given, "command line"), model
    found = read_stage(stage, **given)
    return found.data, model or found.model


def _open(config: Any) -> tuple[Any, list[Any]]:
    """The shards of all sources, and the sources for the planner."""
    from triptych_data.plan.plan import PlanSource
    from triptych_data.shards.reader import Shards

    storage = config.remote.storage
    opened = {name: Shards.open(s.shards, storage) for name, s in config.named_sources.items()}
    sources = [PlanSource(n, part.num_samples, part.fingerprint) for n, part in opened.items()]
    return Shards.joined(list(opened.values())), sources
