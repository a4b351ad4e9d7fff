"""A training step of each family at a size that fits one GPU of 141 GB: one row each.

    python tools/bench_families.py bench/families --compile-first

Shapes are published ones, of random weights; where all layers would not fit, language model and
towers have the same share of theirs. Rows are those of bench_train.py. With --compile-first models
of the same widths and few layers run before, several at once, so that the compiler finds its work
done when a step is timed.
"""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
from bench_train import failure, figures
from make_bench_model import write_published

OMNI_TOWERS = (
    "vision_config.depth=2",
    "vision_config.fullatt_block_indexes=[1]",
    "audio_config.encoder_layers=2",
)
DEEPSTACK = ("vision_config.depth=4", "vision_config.deepstack_visual_indexes=[0,1,2]")
IMAGES = ("--image-tokens", "1024", "--document-len", "2048")
SEES = ("--image-share", "0.5", *IMAGES)
HEARS_AND_SEES = ("--image-share", "0.25", "--audio-share", "0.25", *IMAGES)
LONG = ("--seq-len", "32768")
LEAN = "zero0_selective_bf16_states"
KEPT = "zero0_bf16_states"  # all activations


class Case(NamedTuple):
    published: str
    """a family of published.py"""
    values: tuple[str, ...]
    """what config.json says otherwise"""
    shallow: tuple[str, ...]
    """what makes it a model of few layers, all of whose kinds are among them"""
    variant: str
    """of bench_train.py"""
    options: tuple[str, ...]


CASES = {
    "qwen2.5-vl-3b": Case(
        "qwen2_5_vl",
        (
            "hidden_size=2048",
            "intermediate_size=11008",
            "num_hidden_layers=36",
            "num_attention_heads=16",
            "num_key_value_heads=2",
            "vocab_size=151936",
            "tie_word_embeddings=true",
            "vision_config.out_hidden_size=2048",
        ),
        ("num_hidden_layers=2", *OMNI_TOWERS[:2]),
        LEAN,
        SEES,
    ),
    "qwen3-vl-30b-a3b, 6 of 48 layers": Case(
        "qwen3_vl_moe",
        ("text_config.num_hidden_layers=6", *DEEPSTACK),
        ("text_config.num_hidden_layers=3", *DEEPSTACK),
        KEPT,
        (*SEES, *LONG),
    ),
    "qwen3.5-9b, 12 of 32 layers": Case(
        "qwen3_5",
        ("text_config.num_hidden_layers=12", "vision_config.depth=10"),
        ("text_config.num_hidden_layers=4", "vision_config.depth=2"),
        LEAN,
        SEES,
    ),
    "qwen3.5-35b-a3b text, 4 of 40 layers": Case(
        "qwen3_5_moe_text",
        ("num_hidden_layers=4",),
        ("num_hidden_layers=4",),
        KEPT,
        LONG,
    ),
    "gated deltanet 1.3b": Case(
        "qwen3_5_text",
        (
            "hidden_size=2048",
            "intermediate_size=5632",
            "num_hidden_layers=24",
            f"layer_types={['linear_attention'] * 24}".replace("'", '"'),
            "linear_num_key_heads=16",
            "linear_num_value_heads=16",
            "vocab_size=32000",
        ),
        ("num_hidden_layers=2", 'layer_types=["linear_attention","linear_attention"]'),
        "zero0",
        (),
    ),
    "internvl3-2b": Case(
        "internvl",
        (
            "text_config.hidden_size=1536",
            "text_config.intermediate_size=8960",
            "text_config.num_hidden_layers=28",
            "text_config.num_attention_heads=12",
        ),
        ("text_config.num_hidden_layers=2", "vision_config.num_hidden_layers=2"),
        "zero0",
        SEES,
    ),
    "llava-onevision-7b": Case(
        "llava_onevision",
        (),
        ("text_config.num_hidden_layers=2", "vision_config.num_hidden_layers=2"),
        KEPT,
        (*SEES, "--seq-len", "8192"),
    ),
    "llava-onevision-1.5-4b": Case(
        "llavaonevision1_5",
        (
            "text_config.hidden_size=2560",
            "text_config.intermediate_size=9728",
            "vision_config.text_hidden_size=2560",
        ),
        ("text_config.num_hidden_layers=2", "vision_config.depth=2"),
        LEAN,
        SEES,
    ),
    "bagel-7b-mot, 10 of 28 layers": Case(
        "bagel",
        ("llm_config.num_hidden_layers=10", "vit_config.num_hidden_layers=11"),
        ("llm_config.num_hidden_layers=2", "vit_config.num_hidden_layers=3"),
        KEPT,
        (*SEES, "--seq-len", "11264", "--drawn-images", "5"),
    ),
    "qwen2.5-omni-3b": Case(
        "qwen2_5_omni_thinker",
        (
            "text_config.hidden_size=2048",
            "text_config.intermediate_size=11008",
            "text_config.num_hidden_layers=36",
            "text_config.num_attention_heads=16",
            "text_config.num_key_value_heads=2",
            "text_config.vocab_size=151936",
            "vision_config.out_hidden_size=2048",
            "audio_config.output_dim=2048",
        ),
        ("text_config.num_hidden_layers=2", *OMNI_TOWERS),
        LEAN,
        HEARS_AND_SEES,
    ),
    "qwen3-omni-30b-a3b, 6 of 48 layers": Case(
        "qwen3_omni_moe_thinker",
        ("text_config.num_hidden_layers=6", *DEEPSTACK, "audio_config.encoder_layers=4"),
        ("text_config.num_hidden_layers=3", *DEEPSTACK, "audio_config.encoder_layers=2"),
        KEPT,
        (*HEARS_AND_SEES, *LONG),
    ),
    "aero-1-audio": Case(
        "aero",
        (),
        ("text_config.num_hidden_layers=2", "audio_config.encoder_layers=2"),
        "zero0",
        ("--audio-share", "0.5"),
    ),
}


@click.command(context_settings={"show_default": True, "ignore_unknown_options": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), help="only this")
@click.option("--steps", default=14)
@click.option("--timeout", default=100, help="seconds a case may take")
@click.option("--compile-first/--cold", default=False, help="shallow models first, at once")
@click.option("--at-once", default=6, help="of them")
@click.option("--shallow/--whole", default=False, help="only the shallow models, one by one")
@click.argument("overrides", nargs=-1)
def main(
    out: Path,
    names: tuple[str, ...],
    steps: int,
    timeout: int,
    compile_first: bool,
    at_once: int,
    shallow: bool,
    overrides: tuple[str, ...],
) -> None:
    """Train every case a few steps, into OUT; overrides are bench_train.py's."""
    cases = {name: CASES[name] for name in names or CASES}
    if compile_first:
        waiting = list(cases.items())
        while waiting:
            now, waiting = waiting[:at_once], waiting[at_once:]
            runs = [start(out / "shallow", *each, 8, True, overrides) for each in now]
            for (name, _), process in zip(now, runs, strict=True):
                row = wait(process, out / "shallow" / folder_name(name), 2 * timeout)
                print(f"shallow {name:36}{row}", flush=True)
    for name, case in cases.items():
        process = start(out, name, case, steps, shallow, overrides)
        print(f"{name:36}{wait(process, out / folder_name(name), timeout)}", flush=True)


def folder_name(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def start(
    out: Path, name: str, case: Case, steps: int, shallow: bool, overrides: tuple[str, ...]
) -> subprocess.Popen[bytes]:
    """Start bench_train.py on a case, in a process of its own."""
    folder = out / folder_name(name)
    values = case.values + (case.shallow if shallow else ())
    write_published(folder / "model", case.published, values)
    tool = Path(__file__).with_name("bench_train.py")
    words = [sys.executable, str(tool), str(folder / "model"), str(folder)]
    words += ["--one", case.variant, "--steps", str(steps), *case.options, *overrides]
    (folder / case.variant).mkdir()
    with (folder / case.variant / "log.txt").open("w") as log:
        return subprocess.Popen(words, stdout=log, stderr=log)


def wait(process: subprocess.Popen[bytes], folder: Path, timeout: int) -> str:
    """A row of figures when it has ended, or why there are none."""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    (run,) = (path.parent for path in folder.glob("*/log.txt"))
    return figures(run, 1) if code == 0 else failure(run, code)


if __name__ == "__main__":
    main()
