"""Search the bounds on images' pixels with which a model answers best, on a dev split.

    python tools/search_resolution.py MODEL OUT --dev dev/ --test test/ \\
        --min-pixels 4096,65536 --max-pixels 262144,1048576

Every pair (min, max) of the two lists is evaluated on the dev split, beside the folder's own
bounds. The best one is chosen there, and only then are it and the folder's own evaluated on the
test split, which must share no sample with dev. OUT/resolution.json has scores and costs of all
points, OUT/resolution.svg shows them. Started again, finished points are not run again. One
benchmark a search: other questions want other pixels. (MindVL's test-time resolution search.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from evaluate import FOLDER, bars, joined, run_command, write_json
from evaluate_split import (
    Loaded,
    Result,
    Settings,
    evaluate_split,
    open_model,
    open_processor,
    settings_of,
)
from search_plot import draw_search
from split_samples import check_disjoint, identity_of_model, identity_of_shards

if TYPE_CHECKING:
    from rich.progress import Progress


class Point(NamedTuple):
    """Bounds on an image's pixels; None is the folder's own."""

    min_pixels: int | None
    max_pixels: int | None

    @property
    def name(self) -> str:
        """Of its file."""
        return "own" if self == OWN else f"{self.min_pixels}-{self.max_pixels}"


OWN = Point(None, None)


class Pixels(click.ParamType):
    """Numbers of pixels separated by commas."""

    name = "pixels"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Numbers of a text, in order and each once."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"must be numbers of pixels such as 4096,65536, got '{value}'", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


@click.command(
    help=(__doc__ or "").replace("\n    python", "\n\b\n    python"),
    context_settings={"show_default": True, "max_content_width": 100},
)
@click.argument("model", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--dev", multiple=True, required=True, help="shards to choose on; may be repeated")
@click.option("--test", multiple=True, required=True, help="shards to report on; may be repeated")
@click.option("--min-pixels", required=True, type=Pixels(), help="to try, such as 4096,65536")
@click.option("--max-pixels", required=True, type=Pixels(), help="to try, such as 262144,1048576")
@click.option(
    "--choose-by",
    default="score",
    type=click.Choice(["score", "loss"]),
    help="score: the mean of the questions' own metrics; ties go to the cheaper point",
)
@click.option("--max-new-tokens", default=32, type=click.IntRange(min=1), help="longest answer")
@click.option("--batch-size", default=16, type=click.IntRange(min=1), help="of questions, a rank")
@click.option("--max-questions", default=2000, type=click.IntRange(min=1), help="of a split")
@click.option("--seq-len", type=click.IntRange(min=8), help="of rows  [default: longest sample]")
@click.option("--dtype", default="auto", type=click.Choice(["auto", "bf16", "fp32"]))
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu"]))
@click.option("--local_rank", "--local-rank", hidden=True, help="from launchers")
def command(
    model: Path,
    out: Path,
    dev: tuple[str, ...],
    test: tuple[str, ...],
    min_pixels: tuple[int, ...],
    max_pixels: tuple[int, ...],
    choose_by: str,
    dtype: str,
    device: str,
    local_rank: str | None,
    **options: Any,
) -> None:
    """Search, and say what was found."""
    points = grid(min_pixels, max_pixels)
    check_disjoint(dev, test)
    with joined(device) as rank:
        loaded = open_model(model, dtype)
        settings = Settings(**options)
        check_points(loaded, points, settings)
        open_search(out, identity(loaded, settings, dev, test), rank)
        with bars(rank) as progress:
            found = search(loaded, out, dev, test, points, settings, choose_by, progress)
        if rank == 0:
            write_json(out / "resolution.json", found)
            (out / "resolution.svg").write_text(draw_search(found))
            click.echo(told(found))


def grid(min_pixels: Sequence[int], max_pixels: Sequence[int]) -> list[Point]:
    """All pairs with min not above max, the folder's own bounds first."""
    pairs = [Point(low, high) for low in min_pixels for high in max_pixels if low <= high]
    if not pairs:
        raise ValueError(
            f"--min-pixels: must hold one that is at most one of --max-pixels, got {min_pixels} "
            f"and {max_pixels}; lower it"
        )
    return [OWN, *pairs]


def check_points(loaded: Loaded, points: Sequence[Point], settings: Settings) -> None:
    """Raise ValueError for bounds that cannot be, before the first point takes its hours."""
    for point in points:
        open_processor(loaded, at(settings, point))


def at(settings: Settings, point: Point) -> Settings:
    """The same questions with images bounded so."""
    return replace(settings, min_pixels=point.min_pixels, max_pixels=point.max_pixels)


def identity(
    loaded: Loaded, settings: Settings, dev: Sequence[str], test: Sequence[str]
) -> dict[str, Any]:
    """What finished points must have been run with to be kept; any number of ranks will do."""
    kept = settings_of(loaded, settings)
    for name in ("batch_size", "seq_len", "device"):
        del kept[name]
    return {
        "model": identity_of_model(loaded.path),
        "dev": identity_of_shards(dev),
        "test": identity_of_shards(test),
        **kept,
    }


def open_search(out: Path, wanted: dict[str, Any], rank: int) -> None:
    """Begin or go on in `out`. Raises ValueError if another search has been there."""
    path = out / "search.json"
    stored = read_json(path) or wanted
    if stored != wanted:
        name = next(key for key in wanted if stored.get(key) != wanted[key])
        raise ValueError(
            f"{path}: {name} must be that of the points finished there ({stored.get(name)}), got "
            f"{wanted[name]}; name another OUT"
        )
    if rank == 0:
        write_json(path, wanted)


def search(
    loaded: Loaded,
    out: Path,
    dev: Sequence[str],
    test: Sequence[str],
    points: Sequence[Point],
    settings: Settings,
    choose_by: str,
    progress: Progress | None = None,
) -> Result:
    """Evaluate all points on dev, choose, and evaluate that and the folder's own bounds on test."""

    def evaluated(split: str, shards: Sequence[str], point: Point) -> Result:
        bounded, label = at(settings, point), f"{split} {point.name}"
        run = partial(evaluate_split, loaded, shards, bounded, progress, label)
        return once(out, split, point, run)

    results = {point: evaluated("dev", dev, point) for point in bar(points, progress)}
    best = choose(results, choose_by)
    finals = {point: evaluated("test", test, point) for point in {best: None, OWN: None}}
    difference, margin = paired_difference(finals[best], finals[OWN])
    return {
        "model": str(loaded.path),
        "chosen_by": choose_by,
        "chosen": summary(best, results[best]),
        "dev": [summary(point, result) for point, result in results.items()],
        "test": {
            "chosen": summary(best, finals[best]),
            "own": summary(OWN, finals[OWN]),
            "difference": difference,
            "margin": margin,
        },
    }


def bar(points: Sequence[Point], progress: Progress | None) -> Iterator[Point]:
    """The points, with a bar over them."""
    return iter(points if progress is None else progress.track(points, description="points"))


def once(out: Path, split: str, point: Point, evaluate: Callable[[], Result]) -> Result:
    """A point's result: what the main rank finds from before, or evaluated and written now."""
    import torch.distributed as dist

    path = out / "points" / f"{split}-{point.name}.json"
    is_main = dist.get_rank() == 0
    found: list[Any] = [read_json(path) if is_main else None]
    dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        found[0] = evaluate()
        if is_main:
            write_json(path, found[0])
    result: Result = found[0]
    return result


def read_json(path: Path) -> Any:
    """What an earlier run wrote; None if there is no such file."""
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise ValueError(
            f"{path}: must be JSON as it was written, got {error}; delete the file"
        ) from error


def choose(results: dict[Point, Result], by: str) -> Point:
    """The best point on dev, of equals the one that takes the fewest FLOPs."""

    def rank(point: Point) -> tuple[float, float]:
        result = results[point]
        return (-result["score"] if by == "score" else result["loss"]), result["cost"]["flops"]

    return min(results, key=rank)


def paired_difference(new: Result, old: Result) -> tuple[float, float]:
    """Mean difference of two results' scores on the same questions, and half its 95 % interval."""
    pairs = zip(new["answers"], old["answers"], strict=True)
    gains = [a["score"] - b["score"] for a, b in pairs]
    middle = sum(gains) / len(gains)
    variance = sum((gain - middle) ** 2 for gain in gains) / max(1, len(gains) - 1)
    return middle, 1.96 * math.sqrt(variance / len(gains))


def summary(point: Point, result: Result) -> Result:
    """A point's numbers, without its answers."""
    names = ("min_pixels", "max_pixels", "score", "loss", "scores", "exact_match", "cost")
    return {"point": point.name, **{name: result[name] for name in names}}


def told(found: Result) -> str:
    """The search for people."""
    head = ("min pixels", "max pixels", "dev score", "dev loss", "tokens/answer", "GFLOPs", "s")
    rows = [head]
    for each in found["dev"]:
        cost = each["cost"]
        count = cost["questions"]
        mark = " *" if each["point"] == found["chosen"]["point"] else ""
        rows.append(
            (
                f"{each['min_pixels']:,}",
                f"{each['max_pixels']:,}",
                f"{100 * each['score']:.1f} %{mark}",
                f"{each['loss']:.4f}",
                f"{(cost['prompt_tokens'] + cost['answer_tokens']) / count:,.0f}",
                f"{cost['flops'] / count / 1e9:,.4g}",
                f"{cost['seconds']:,.1f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    test = found["test"]
    lines.append(
        f"* chosen on dev by {found['chosen_by']}; on test {100 * test['chosen']['score']:.1f} %, "
        f"with the folder's own bounds {100 * test['own']['score']:.1f} %: "
        f"{100 * test['difference']:+.1f} ± {100 * test['margin']:.1f} points (95 %)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(command)
