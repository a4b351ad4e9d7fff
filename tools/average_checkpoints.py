"""Average checkpoints into a Hugging Face directory, in memory that does not grow with the model.

    python tools/average_checkpoints.py A B C --output OUT               the uniform average
    python tools/average_checkpoints.py runs/sft --last 5 --output OUT   a run's last five
    python tools/average_checkpoints.py runs/wsd --method window --curve minus-sqrt --output OUT
    python tools/average_checkpoints.py verify OUT                       read it again and compare

Inputs are Hugging Face directories (safetensors or .bin, single or sharded), checkpoints of a run
under any ZeRO stage, and DeepSpeed's universal checkpoints. OUT is whole or absent: a run that was
cut off goes on when the same command is given again.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from average_options import Bytes, ModuleWeights, Numbers
from click.core import ParameterSource

if TYPE_CHECKING:
    from triptych_core.averaging.job import Job
    from triptych_core.averaging.plan import Plan

# The options that mean something for some methods alone.
OPTIONS_OF_METHODS = {
    "uniform": (),
    "weighted": ("weights", "normalize"),
    "ema": ("decay",),
    "window": ("curve",),
    "task-arithmetic": ("base", "weights", "normalize", "scale"),
    "ties": ("base", "weights", "normalize", "scale", "density"),
    "slerp": ("position",),
    "greedy": ("evaluate", "lower_is_better"),
}
FOLDER = click.Path(path_type=Path)
EPILOG = (
    "`average_checkpoints.py verify OUT` reads an average again and compares it with its inputs."
)


@click.command(epilog=EPILOG, context_settings={"show_default": True, "max_content_width": 100})
@click.argument("inputs", nargs=-1, required=True, type=FOLDER)
@click.option("--output", "-o", required=True, type=FOLDER, help="a new folder")
@click.option("--method", default="uniform", type=click.Choice(list(OPTIONS_OF_METHODS)))
@click.option("--weights", type=Numbers(), help="one for each input, such as 0.5,0.3,0.2")
@click.option("--normalize", is_flag=True, help="divide weights by their sum")
@click.option("--decay", default=0.9, help="ema: what the average keeps at each next input")
@click.option(
    "--curve",
    default="linear",
    type=click.Choice(["linear", "cosine", "minus-sqrt"]),
    help="window: the decay of the learning rate that the average stands for",
)
@click.option("--base", type=FOLDER, help="task-arithmetic, ties: what the inputs were tuned from")
@click.option("--scale", default=1.0, help="task-arithmetic, ties: of what is added to the base")
@click.option("--density", default=0.2, help="ties: share of each difference's elements kept")
@click.option("--position", default=0.5, help="slerp: from the first input, 0, to the second, 1")
@click.option("--evaluate", help="greedy: a command that prints a folder's score last; {} is it")
@click.option("--lower-is-better", is_flag=True, help="greedy: the score is a loss")
@click.option("--last", type=click.IntRange(min=1), help="take the newest so many inputs")
@click.option("--spacing", type=click.IntRange(min=1), help="take inputs so many steps apart")
@click.option("--window", type=click.IntRange(min=1), help="take those of the newest so many steps")
@click.option(
    "--module-weights",
    multiple=True,
    type=ModuleWeights(),
    help="other weights for tensors whose names match, '*.visual.*=1,0,0'; may be repeated",
)
@click.option("--exclude", multiple=True, help="copy tensors whose names match; may be repeated")
@click.option("--copy-from", type=FOLDER, help="the input --exclude copies from  [default: first]")
@click.option("--dtype", default="same", type=click.Choice(["same", "fp32", "bf16", "fp16"]))
@click.option("--keep-fp32", multiple=True, help="write tensors whose names match in fp32")
@click.option("--like", type=FOLDER, help="whose config, tokenizer and processor are taken")
@click.option("--max-memory", default="1G", type=Bytes(), help="of the whole process")
@click.option("--max-shard-size", default="5G", type=Bytes(), help="of a file of the output")
@click.option("--threads", type=click.IntRange(min=1), help="at most  [default: 2 a core, 8]")
@click.option("--check", is_flag=True, help="compare the SHA-256 of a run's checkpoints before")
@click.option("--sha256", is_flag=True, help="SHA-256 of whole inputs into averaging.json")
@click.option("--dry-run", is_flag=True, help="say what would be done, write nothing")
@click.pass_context
def average(ctx: click.Context, inputs: tuple[Path, ...], dry_run: bool, **options: Any) -> None:
    """Average INPUTS: model directories, checkpoints, or a run, which stands for its checkpoints.

    Arithmetic is in fp32 whatever the inputs' dtype. Inputs that differ in tensors, shapes, dtypes,
    integers, tokenizer or architecture are refused. Patterns are globs over whole tensor names.
    """
    default = ParameterSource.DEFAULT
    refuse_strays(
        options["method"], [o for o in options if ctx.get_parameter_source(o) is not default]
    )
    from triptych_core.averaging.greedy import choose, clean_up
    from triptych_core.averaging.job import prepare, run
    from triptych_core.averaging.request import Request, make_job
    from triptych_core.secrets import masked_words

    options["threads"] = options["threads"] or min(8, 2 * (os.cpu_count() or 1))
    job = make_job(Request(inputs, **options), shlex.join(masked_words(sys.argv[1:])))
    if options["method"] == "greedy" and not dry_run:
        job = choose(job, options["evaluate"], options["lower_is_better"], say)
    plan, notes = prepare(job)
    for note in notes:
        say(f"note: {note}")
    describe(job, plan)
    if dry_run:
        forecast(job, plan)
        return
    with click.progressbar(length=plan.bytes_to_write, file=sys.stderr) as bar:
        facts = run(job, plan, notes, say, bar.update)
    clean_up(job)
    rate = (facts["bytes_read"] + facts["bytes_written"]) / max(facts["seconds"], 1e-9)
    click.echo(
        f"{job.output}: {size(facts['bytes_written'])} in {facts['seconds']:.1f} s, "
        f"{size(rate)}/s read and written, memory {size(facts['peak_memory_bytes'])}"
    )


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=FOLDER)
@click.option("--full", is_flag=True, help="compare all elements, not a stretch of each tensor")
def verify(folder: Path, full: bool) -> None:
    """Read the average in FOLDER again: finite everywhere, and what its inputs give in fp64."""
    from triptych_core.averaging.verify import verify_output

    click.echo(verify_output(folder, full))


def refuse_strays(method: str, given: list[str]) -> None:
    """No option is given that would do nothing."""
    known = {option for options in OPTIONS_OF_METHODS.values() for option in options}
    for option in given:
        if option in known and option not in OPTIONS_OF_METHODS[method]:
            spelt = option.replace("_", "-")
            fits = [name for name, options in OPTIONS_OF_METHODS.items() if option in options]
            raise ValueError(
                f"--{spelt}: must come with --method {' or '.join(fits)}, got it with {method}; "
                "choose the method too"
            )
    if "copy_from" in given and "exclude" not in given:
        raise ValueError("--copy-from: must come with --exclude, got it alone; say what is copied")


def describe(job: Job, plan: Plan) -> None:
    """What is averaged, a line an input."""
    weights = job.recipe.weights
    labels = [f"{weight:.6g}" for weight in weights]
    if job.recipe.has_base:
        labels.insert(0, "base")
    if job.recipe.method == "slerp":
        labels = ["start", "end"]
    for label, source in zip(labels, job.sources, strict=True):
        step = "" if source.step is None else f", step {source.step}"
        say(f"{label:>10}  {source.path} ({source.kind}{step})")
    tensors = sum(len(shard.slots) for shard in plan.shards)
    say(
        f"{tensors} tensors, {size(plan.bytes_to_read)} to read, {size(plan.bytes_to_write)} to "
        f"write in {len(plan.shards)} file{'s' * (len(plan.shards) > 1)}"
    )


def forecast(job: Job, plan: Plan) -> None:
    """Memory and time of a run that does not happen."""
    from triptych_core.averaging.plan import plan_memory, resident_bytes
    from triptych_core.averaging.read_rate import read_rate

    memory = plan_memory(plan, job.max_memory, job.threads)
    rate = read_rate(job.sources[0].files()[0])
    total = plan.bytes_to_read + plan.bytes_to_write
    click.echo(
        f"dry run: {size(resident_bytes() + memory.num_bytes)} of memory with {memory.threads} "
        f"threads; about {total / rate:.0f} s at the {size(rate)}/s that the disk reads now, if it "
        f"writes as fast; {job.output} is not written"
    )


def say(text: str) -> None:
    """To people, beside the result."""
    click.echo(text, err=True)


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def main() -> None:
    """Run the command; a user's mistake ends in one line."""
    is_verify = sys.argv[1:2] == ["verify"]
    try:
        if is_verify:
            verify.main(sys.argv[2:], "average_checkpoints.py verify", standalone_mode=False)
        else:
            average.main(sys.argv[1:], standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        say("interrupted; the same command goes on")
        sys.exit(130)
    except (ValueError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
