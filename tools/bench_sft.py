"""Speed and memory of the SFT stage on this machine: one short run a variant, one table.

    python tools/make_bench_model.py bench/model
    python tools/bench_sft.py bench/model SHARDS bench/runs --gpus 1

Prints medians over the steps after warm-up; every run's folder keeps its metrics and report.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
VARIANTS = {
    "zero0_compiled": [
        "engine.zero.stage=0",
        "engine.checkpointing=selective",
        "model.compile=layers",
    ],
    "zero0": ["engine.zero.stage=0", "engine.checkpointing=full"],
    "zero3_checkpointing": ["engine.zero.stage=3", "engine.checkpointing=full"],
    "zero1_checkpointing": ["engine.zero.stage=1", "engine.checkpointing=full"],
    "zero1": ["engine.zero.stage=1", "engine.checkpointing=none"],
    "zero3_stock_ops": [
        "engine.zero.stage=3",
        "engine.checkpointing=full",
        "model.fuse=false",
    ],
}
WARM_UP = 6


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("shards")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--gpus", default=1, help="ranks")
@click.option("--steps", default=30, type=click.IntRange(WARM_UP + 2), help="steps a variant")
@click.option("--seq-len", default=16384, help="tokens a pack")
@click.option("--variant", "names", multiple=True, type=click.Choice(list(VARIANTS)))
@click.argument("overrides", nargs=-1)
def main(
    model: Path,
    shards: str,
    out: Path,
    gpus: int,
    steps: int,
    seq_len: int,
    names: tuple[str, ...],
    overrides: tuple[str, ...],
) -> None:
    """Train MODEL (random weights) on SHARDS a few steps per variant, into OUT."""
    rows = []
    for name in names or VARIANTS:
        run_dir = out / name
        words = [
            f"run.dir={run_dir}",
            f"run.steps={steps}",
            f"model.path={model}",
            "model.init=random",
            f"data.shards=[{shards}]",
            f"data.seq_len={seq_len}",
            "data.num_workers=4",
            "schedule.kind=constant",
            "optim.lr=1e-5",
            "checkpoint.resume=never",
            "checkpoint.save=false",
            "export=false",
            *VARIANTS[name],
            *overrides,
        ]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", f"--num_gpus={gpus}"]
        code = subprocess.run([*launcher, str(ROOT / "stages/sft.py"), *words], check=False)
        rows.append(f"{name:24}" + (figures(run_dir) if code.returncode == 0 else "  failed"))
    print(f"\n{'variant':24}{'tokens/s':>10}{'MFU':>8}{'peak GiB':>10}{'step s':>8}{'wait s':>8}")
    print("\n".join(rows))


def figures(run_dir: Path) -> str:
    """Medians over the steps after warm-up."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()][WARM_UP:]

    def median(key: str) -> float:
        return statistics.median(line[key] or 0.0 for line in lines)

    peak = max(line["peak_memory_bytes"] for line in lines) / 2**30
    return (
        f"{median('tokens_per_second'):10,.0f}{median('mfu'):8.1%}{peak:10.1f}"
        f"{median('step_seconds'):8.3f}{median('data_wait_seconds'):8.3f}"
    )


if __name__ == "__main__":
    main()
