"""Evaluate a Hugging Face directory on held-out shards: loss, and the scores of greedy answers.

    python tools/evaluate.py runs/sft/export --shards heldout/
    torchrun --nproc-per-node 8 tools/evaluate.py MODEL --shards heldout/ --output scores.json
    python tools/evaluate.py MODEL --shards heldout/ --min-pixels 65536 --max-pixels 1048576

A sample says how its answer is scored: "metric" (exact_match, anls, relaxed_accuracy or
multiple_choice), "answers" and "choices". Every rank holds the whole model; ranks share questions.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from evaluate_split import Result, Settings, evaluate_split, open_model

if TYPE_CHECKING:
    from rich.progress import Progress

FOLDER = click.Path(path_type=Path)
# What messages call by a stage's keys has other names here.
OPTIONS_OF_KEYS = {
    "data.min_pixels": "--min-pixels",
    "data.max_pixels": "--max-pixels",
    "data.seq_len": "--seq-len",
    "; set model.init=random to start without weights": "; train or download them first",
    "model.path": "MODEL",
}


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.argument("model", type=FOLDER)
@click.option("--shards", multiple=True, required=True, help="held-out shards; may be repeated")
@click.option("--min-pixels", type=click.IntRange(min=1), help="of an image  [default: MODEL's]")
@click.option("--max-pixels", type=click.IntRange(min=1), help="of an image  [default: MODEL's]")
@click.option("--output", "-o", type=FOLDER, help="JSON file of all numbers and answers")
@click.option("--max-new-tokens", default=32, type=click.IntRange(min=1), help="longest answer")
@click.option("--batch-size", default=16, type=click.IntRange(min=1), help="of questions, a rank")
@click.option("--max-questions", default=2000, type=click.IntRange(min=1), help="spread evenly")
@click.option("--seq-len", type=click.IntRange(min=8), help="of rows  [default: longest sample]")
@click.option("--dtype", default="auto", type=click.Choice(["auto", "bf16", "fp32"]))
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu"]))
@click.option("--local_rank", "--local-rank", hidden=True, help="from launchers")
def evaluate(
    model: Path,
    shards: tuple[str, ...],
    output: Path | None,
    dtype: str,
    device: str,
    local_rank: str | None,
    **options: Any,
) -> None:
    """Loss and scores of MODEL, a local Hugging Face directory, on held-out shards.

    dtype auto is bf16 on a GPU and fp32 on a CPU.
    """
    settings = Settings(**options)
    with joined(device) as rank:
        loaded = open_model(model, dtype)
        with bars(rank) as progress:
            result = evaluate_split(loaded, shards, settings, progress, "questions")
        if rank == 0:
            click.echo(table(result))
            if output is not None:
                write_json(output, result)


@contextmanager
def joined(device: str) -> Iterator[int]:
    """Join the job, of one process without a launcher; gives the rank."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch, shutdown

    runtime = launch(RunConfig(device="cpu" if device == "cpu" else "auto"))
    yield runtime.rank
    shutdown()


def table(result: Result) -> str:
    """The numbers for people."""
    rows = [("metric", "source", "questions", "score")]
    for each in result["scores"]:
        share = f"{100 * each['score']:.1f} %"
        rows.append((each["metric"], each["source"] or "all", f"{each['count']:,}", share))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}"
        for a, b, c, d in rows
    ]
    cost = result["cost"]
    lines.append(f"loss {result['loss']:.4f} nats a target token")
    lines.append(
        f"{cost['prompt_tokens']:,} tokens of prompts, {cost['image_tokens']:,} of them of images, "
        f"{cost['answer_tokens']:,} of answers; {cost['flops'] / 1e12:,.4g} TFLOPs, "
        f"{cost['seconds']:,.1f} s"
    )
    return "\n".join(lines)


@contextmanager
def bars(rank: int) -> Iterator[Progress | None]:
    """Progress bars on the main rank's terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if rank or not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True) as progress:
        yield progress


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)


def run_command(command: click.Command) -> None:
    """Run a command; a user's mistake ends it with one line."""
    try:
        command()
    except (ValueError, OSError) as error:
        text = str(error)
        for key, option in OPTIONS_OF_KEYS.items():
            text = text.replace(key, option)
        click.echo(f"error: {text}", err=True)
        sys.stderr.flush()
        os._exit(2)  # at once: peers may be waiting for this rank in a collective


if __name__ == "__main__":
    run_command(evaluate)
