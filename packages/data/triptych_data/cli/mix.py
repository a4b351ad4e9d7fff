"""`triptych-data mix` and `ledger`: what a run will be fed, and what it was."""

from pathlib import Path
from typing import Any

import click

from triptych_data.cli import options
from triptych_data.cli.options import print_json, progress


class NamedNumber(click.ParamType):
    """NAME=NUMBER."""

    name = "name=number"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, float]:
        name, equals, number = str(value).partition("=")
        try:
            if not name or not equals:
                raise ValueError
            return name, float(number)
        except ValueError:
            self.fail(f"{value!r} is no NAME=NUMBER such as web=0.7", param, ctx)


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="CONFIG.yaml | NAME=SHARDS...")
@click.option("--weight", "weights", type=NamedNumber(), multiple=True, help="NAME=SHARE.")
@click.option("--repeat", "repeats", type=NamedNumber(), multiple=True, help="NAME=TIMES an epoch.")
@click.option("--epochs", type=NamedNumber(), multiple=True, help="NAME=MOST passes over it.")
@click.option("--temperature", type=float, help="Weigh by size^(1/temperature).")
@click.option("--samples", type=click.IntRange(1), help="Length of the run. Default: one epoch.")
@click.option(
    "--tokens", type=options.Size(), help="Length of the run, such as 10G; needs --model."
)
@click.option("--model", help="A Hugging Face model folder: adds tokens.")
@options.as_json
def mix(
    sources: tuple[str, ...],
    weights: tuple[tuple[str, float], ...],
    repeats: tuple[tuple[str, float], ...],
    epochs: tuple[tuple[str, float], ...],
    temperature: float | None,
    samples: int | None,
    tokens: int | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Show what a mixture will feed a run.

    Samples, tokens and epochs of each source, and its share along the run. The mixture is that of
    a stage's configuration (data.sources), or sources named here.

    \b
    Example:
      triptych-data mix sft.yaml --model Qwen3-VL-8B --tokens 10G
      triptych-data mix web=shards/web chats=shards/chats --weight web=0.7 --weight chats=0.3
    """
    from triptych_data.plan.mixing import mix_report

    config = _config(sources, dict(weights), dict(repeats), dict(epochs), temperature)
    if samples and tokens:
        raise ValueError("--tokens: must not come with --samples, got both; give one length")
    with progress() as on_progress:
        report = mix_report(
            config,
            model=model,
            num_samples=samples,
            num_tokens=tokens,
            progress=lambda done, total: on_progress("Measuring", done, total),
        )
    if as_json:
        print_json(report)
    else:
        click.echo(_table(report))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--mixed", is_flag=True, help="Of a run with weights: samples may come again.")
@options.as_json
def ledger(folder: Path, mixed: bool, as_json: bool) -> None:
    """Check that a run lost and repeated nothing.

    FOLDER is run.dir/ledger, written with data.ledger=true. The exit code is 1 if anything is
    wrong.

    \b
    Example:
      triptych-data ledger runs/sft/ledger
    """
    from dataclasses import asdict

    from triptych_data.plan.ledger import audit

    try:
        found = audit(folder, once_per_epoch=not mixed)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}: must hold the lines of a run's ledger, got one without {error}; check the "
            "path"
        ) from error
    if as_json:
        print_json(asdict(found))
    else:
        count = len(found.problems)
        click.echo(
            f"{found.steps:,} steps, {found.samples:,} samples, {found.holes:,} holes, "
            f"{found.epochs:,} epochs begun: "
            f"{f'{count:,} problems' if count else 'nothing lost or repeated'}"
        )
        for name, other in found.joined.items():
            click.echo(
                f"{name}: {other.samples:,} samples, {other.holes:,} holes, "
                f"{other.epochs:,} epochs begun"
            )
        for problem in found.problems:
            click.echo(problem)
    if found.problems:
        raise click.exceptions.Exit(1)


def _config(
    sources: tuple[str, ...],
    weights: dict[str, float],
    repeats: dict[str, float],
    epochs: dict[str, float],
    temperature: float | None,
) -> Any:
    from triptych_data.stage_config import build_data, read_stage

    changes: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    if len(sources) == 1 and sources[0].endswith((".yaml", ".yml")):
        if weights or repeats or epochs:
            raise ValueError(
                f"--weight: must not come with {sources[0]}, got both; write it in the file"
            )
        return read_stage(Path(sources[0]), **changes).data
    named: dict[str, dict[str, Any]] = {}
    for source in sources:
        name, equals, shards = source.partition("=")
        if not equals or not name or not shards:
            raise ValueError(
                f"{source}: must be a .yaml file or NAME=SHARDS, got neither; write web=shards/web"
            )
        named.setdefault(name, {"shards": []})["shards"].append(shards)
    for key, values in (("weight", weights), ("repeat", repeats), ("epochs", epochs)):
        for name, value in values.items():
            if name not in named:
                raise ValueError(
                    f"--{key}: must name one of {', '.join(named)}, got {name}; fix the name"
                )
            named[name][key] = value
    return build_data({"sources": named, **changes}, "mixture")


def _table(report: dict[str, Any]) -> str:
    tokens = report["tokens"] is not None
    names = [
        "source",
        "size",
        "share",
        "samples",
        "epochs",
        *(["tokens", "of tokens"] if tokens else []),
    ]
    rows = [names]
    for row in report["sources"]:
        cells = [
            row["source"],
            f"{row['size_samples']:,}",
            f"{row['share']:.2%}",
            f"{row['samples']:,}",
            f"{row['epochs']:,.3g}",
        ]
        if tokens:
            cells += [f"{row['tokens']:,}", f"{row['token_share']:.2%}"]
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    lines = [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    about = f"{report['tokens']:,} tokens, " if tokens else ""
    lines.append(f"a run of {about}{report['samples']:,} samples")
    if report["ends_after_samples"] is not None:
        lines.append(f"all sources are exhausted after {report['ends_after_samples']:,} samples")
    if any(len(set(row["share_over_the_run"])) > 1 for row in report["sources"]):
        heads = "".join(f"{point:>9.0%}" for point in report["points"])
        lines += ["", f"{'share at':<{widths[0]}}{heads}"]
        for row in report["sources"]:
            shares = "".join(f"{share:>9.2%}" for share in row["share_over_the_run"])
            lines.append(f"{row['source']:<{widths[0]}}{shares}")
    return "\n".join(lines)
