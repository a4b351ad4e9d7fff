"""Time and memory of an average, beside the disk's own time for the same bytes and mergekit's.

    python tools/bench_average.py OUT_DIR [--shape qwen3-0.6b] [--mergekit PATH/bin/mergekit-yaml]

Makes models of random bf16 weights, then in turn: reads all their bytes and writes those of an
average, plainly, past the page cache and through it, of which the faster is the disk's own time;
averages them; has mergekit average them (linear, computed in fp32, in an environment of its own).
Each begins without its files in the page cache and ends when its output is on the disk; memory is
the process's largest. OUT_DIR must be on the disk to be measured.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
from make_bench_model import TEXTS, write_text

TOOL = Path(__file__).with_name("average_checkpoints.py")
CHUNK = 1 << 23


@click.command(context_settings={"show_default": True})
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(list(TEXTS)), default="qwen3-0.6b")
@click.option("--layers", type=int, help="of the models; fewer than the shape's for a quick look")
@click.option("--models", "number", default=3, help="inputs")
@click.option("--repeat", default=3, help="rounds; the median is shown")
@click.option("--mergekit", type=click.Path(exists=True), help="its mergekit-yaml")
@click.option("--warm", is_flag=True, help="leave inputs in the page cache")
@click.argument("options", nargs=-1)
def main(
    out_dir: Path,
    shape: str,
    layers: int | None,
    number: int,
    repeat: int,
    mergekit: str | None,
    warm: bool,
    options: tuple[str, ...],
) -> None:
    """Measure in OUT_DIR; OPTIONS after -- go to average_checkpoints.py."""
    models = [out_dir / f"model-{n}" for n in range(number)]
    for seed, model in enumerate(models):
        # In a process of its own: the kernel counts what a parent had as its children's memory.
        process = multiprocessing.get_context("spawn").Process(
            target=make_model, args=(model, shape, layers, seed)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise click.ClickException(f"{model}: could not be made; see above")
    output = out_dir / "average"
    ours = [sys.executable, TOOL, *models, "--output", output, *options]
    rounds: dict[str, Callable[[], dict[str, float]]] = {
        "direct": lambda: copy_plainly(models, output, os.O_DIRECT),
        "cached": lambda: copy_plainly(models, output, 0),
        "ours": lambda: run(ours, output),
    }
    if mergekit:
        recipe = write_recipe(out_dir / "linear.yaml", models)
        rounds["mergekit"] = lambda: run([mergekit, recipe, output], output)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in rounds}
    for _ in range(repeat):
        for name, measure in rounds.items():
            prepare(models, output, warm)
            found[name].append(measure())
            click.echo(f"{name}: {json.dumps(found[name][-1])}", err=True)
    prepare(models, output, warm)
    show(found, models, warm)


def make_model(path: Path, shape: str, layers: int | None, seed: int) -> None:
    """A folder with random weights, unless it is there."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    if (path / "model.safetensors").is_file():
        return
    shutil.rmtree(path, ignore_errors=True)
    write_text(path, TEXTS[shape])
    config = json.loads((path / "config.json").read_text())
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    config["dtype"] = "bfloat16"
    (path / "config.json").write_text(json.dumps(config, indent=2))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.bfloat16) * 0.02
        for name, parameter in model.named_parameters()
    }
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def write_recipe(path: Path, models: list[Path]) -> Path:
    """mergekit's for the uniform average, in fp32."""
    recipe = {
        "models": [{"model": str(m.resolve()), "parameters": {"weight": 1.0}} for m in models],
        "merge_method": "linear",
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def prepare(models: list[Path], output: Path, warm: bool) -> None:
    """No output, nothing waiting for the disk, and inputs in the page cache or not."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    for model in models:
        for path in model.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            if warm:
                while os.read(descriptor, CHUNK):
                    pass
            else:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def copy_plainly(models: list[Path], output: Path, flags: int) -> dict[str, float]:
    """Seconds to read all inputs once, and to write and sync as many bytes as one of them has."""
    files = [model / "model.safetensors" for model in models]
    size = files[0].stat().st_size
    output.mkdir()
    read = move(files, size, os.O_RDONLY | flags, os.preadv)
    write = move([output / "plain"], size, os.O_WRONLY | os.O_CREAT | flags, os.pwritev)
    return {"seconds": read + write, "read": read, "write": write}


def move(files: list[Path], size: int, flags: int, call: Callable[..., int]) -> float:
    """Seconds of four threads, each 8 MiB at a time."""
    local = threading.local()

    def work(descriptor: int, begin: int) -> None:
        if not hasattr(local, "memory"):
            local.memory = mmap.mmap(-1, CHUNK)
        call(descriptor, [local.memory], begin)

    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        for file in files:
            descriptor = os.open(file, flags, 0o644)
            list(pool.map(partial(work, descriptor), range(0, size, CHUNK)))
            os.fsync(descriptor)
            os.close(descriptor)
    return time.monotonic() - began


def run(command: list[Any], output: Path) -> dict[str, float]:
    """Seconds of a command until its output is on the disk, its CPU seconds and MiB of memory."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    began = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise click.ClickException(f"{command[0]}: failed\n{said[-2000:]}")
    for path in output.iterdir():
        with path.open() as file:
            os.fsync(file.fileno())
    return {
        "seconds": time.monotonic() - began,
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss / 1024,
    }


def show(found: dict[str, list[dict[str, float]]], models: list[Path], warm: bool) -> None:
    """Medians, and each beside the disk's."""
    size = (models[0] / "model.safetensors").stat().st_size
    click.echo(
        f"{len(models)} models of {size / 2**30:.2f} GiB, inputs "
        f"{'in' if warm else 'not in'} the page cache, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f}"
    )
    ways = (found["direct"], found["cached"])
    disk = min(statistics.median(result["seconds"] for result in way) for way in ways)
    for name, results in found.items():
        median = {key: statistics.median(r[key] for r in results) for key in results[0]}
        parts = ", ".join(f"{key} {value:.1f}" for key, value in median.items())
        click.echo(f"{name:>9}: {parts}; {median['seconds'] / disk:.2f} x the disk's own time")


if __name__ == "__main__":
    main()
