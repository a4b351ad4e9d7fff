"""`make demo`: raw images to a trained, evaluated, exported model, with the commands a user types.

    python tools/demo.py                        scikit-learn's handwritten digits
    python tools/demo.py --data chats.jsonl     your own chats; every tenth line is held out

Everything goes to `runs/demo`. Interrupted, it goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "stages/configs/sft_tiny.yaml"
BIN = Path(sys.executable).parent
# The demo shrinks digits to four tokens each; anything else needs to be seen as it is.
OWN_IMAGES = ["data.min_pixels=null", "data.max_pixels=null"]


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(exists=True, dir_okay=False), help="your chats as JSONL")
@click.option("--heldout", type=click.Path(exists=True, dir_okay=False), help="chats to test on")
@click.option("--out", default="runs/demo", type=click.Path(file_okay=False), help="run folder")
@click.option("--config", default=str(CONFIG), type=click.Path(exists=True), help="stage config")
@click.option("--ranks", type=int, help="processes; by default all GPUs, or two on a CPU")
@click.argument("overrides", nargs=-1)
def main(
    data: str | None,
    heldout: str | None,
    out: str,
    config: str,
    ranks: int | None,
    overrides: tuple[str, ...],
) -> None:
    """Prepare data, train, evaluate, export; OVERRIDES (section.key=value) go to the stage."""
    if heldout and not data:
        raise click.UsageError("--heldout: must come with --data, got it alone; give both")
    started = time.monotonic()
    run_dir = Path(out)
    open_folder(run_dir, f"{data} {heldout}" if data else "digits")
    train, test, image_root = prepare_data(run_dir, data, heldout)
    shards = {name: run_dir / "shards" / name for name in ("train", "heldout")}
    for name, jsonl in (("train", train), ("heldout", test)):
        root = ["--image-root", image_root] if image_root else []
        run(BIN / "triptych-data", "shard", jsonl, shards[name], "--overwrite", *root)
    gpus = count_gpus()
    run(
        *launcher(ranks or gpus or 2),
        ROOT / "stages/sft.py",
        f"--config={config}",
        f"run.dir={run_dir}",
        f"data.shards=[{shards['train']}]",
        f"evaluation.shards=[{shards['heldout']}]",
        *(["engine.precision=bf16"] if gpus else []),
        *(OWN_IMAGES if data else []),
        *overrides,
    )
    summarise(run_dir, time.monotonic() - started)


def open_folder(run_dir: Path, data: str) -> None:
    """Start afresh after a complete demo or with other data, go on after an interrupted one.

    Only a folder that this tool made is ever emptied: it carries a `demo.json`.
    """
    marker, facts = run_dir / "demo.json", run_dir / "run.json"
    if marker.exists():
        finished = facts.exists() and json.loads(facts.read_text())["finished"]
        if finished or json.loads(marker.read_text())["data"] != data:
            shutil.rmtree(run_dir)
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise click.ClickException(
            f"--out: must be a new folder or an earlier demo's, got {run_dir}; name another"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"data": data}) + "\n")


def prepare_data(
    run_dir: Path, data: str | None, heldout: str | None
) -> tuple[Path, Path, Path | None]:
    """Training and held-out JSONL, and where image paths start if not beside the JSONL."""
    raw = run_dir / "raw"
    if data is None:
        run(sys.executable, ROOT / "tools/make_digits.py", raw)
        return raw / "train.jsonl", raw / "heldout.jsonl", None
    if heldout is not None:
        return Path(data), Path(heldout), None
    raw.mkdir(exist_ok=True)
    return *split_lines(Path(data), raw), Path(data).parent


def split_lines(data: Path, out: Path) -> tuple[Path, Path]:
    """Hold out every tenth line of `data`; both files are written to `out`."""
    lines = [line for line in data.read_text().splitlines() if line.strip()]
    if len(lines) < 10:
        raise click.ClickException(
            f"{data}: must have at least 10 samples, got {len(lines)}; add some or give --heldout"
        )
    train, test = out / "train.jsonl", out / "heldout.jsonl"
    test.write_text("".join(line + "\n" for line in lines[9::10]))
    train.write_text("".join(line + "\n" for i, line in enumerate(lines) if i % 10 != 9))
    return train, test


def count_gpus() -> int:
    """How many GPUs torch sees, asked in another process so that this one stays light."""
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.check_output([sys.executable, "-c", code], text=True))


def launcher(ranks: int) -> list[Any]:
    """The `deepspeed` command on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [BIN / "deepspeed", f"--num_gpus={ranks}", f"--master_port={port}"]


def run(*command: Any) -> None:
    """Run a command as a user would type it; an interrupt reaches all its processes."""
    words = [str(word) for word in command]
    click.secho("$ " + " ".join(relative(word) for word in words), fg="cyan", err=True)
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
    # A group of its own: DeepSpeed's launcher, killed alone, leaves its ranks running.
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    try:
        code = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    if code != 0:
        sys.exit(code)


def stop(signum: int, frame: object) -> None:
    """End as after Ctrl-C, also when a terminal closes or a scheduler cancels."""
    click.echo("interrupted; the same command goes on from the last checkpoint", err=True)
    sys.exit(128 + signum)


def relative(word: str) -> str:
    """A path as the user sees it from here."""
    prefix = str(Path.cwd()) + os.sep
    return word.replace(prefix, "")


def summarise(run_dir: Path, seconds: float) -> None:
    """One screen for people, then one line of JSON for programs."""
    evaluations = [json.loads(line) for line in (run_dir / "evaluation.jsonl").open()]
    before, after = evaluations[0], evaluations[-1]
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    table = Table(title="Held-out questions, exact match", title_justify="left")
    for heading in ("question", "number", "majority", "before", "after"):
        table.add_column(heading, justify="left" if heading == "question" else "right")
    for kind, share in after["exact_match"].items():
        table.add_row(
            kind,
            str(after["counts"][kind]),
            f"{after['majority'][kind]:.1%}",
            f"{before['exact_match'][kind]:.1%}",
            f"[bold]{share:.1%}",
        )
    console = Console()
    console.print(table)
    result = {
        "exact_match": {kind: round(share, 4) for kind, share in after["exact_match"].items()},
        "majority": {kind: round(share, 4) for kind, share in after["majority"].items()},
        "seconds": round(seconds, 1),
        "export": str(run_dir / "export"),
        "report": str(run_dir / "report.html"),
    }
    console.print(
        f"training loss {steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f} in {len(steps)} steps; "
        f"held-out loss {before['heldout_loss']:.3f} → {after['heldout_loss']:.3f}\n"
        f"export  {result['export']}\nreport  {result['report']}",
        highlight=False,
    )
    print(json.dumps(result))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    main()
