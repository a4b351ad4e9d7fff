"""Speed and memory of a stage's steps, of its metrics.jsonl: any stage, any family, one row.

    python tools/bench_stage.py stages/pretrain.py --config stages/configs/pretrain_tiny.yaml \\
        run.dir=bench/run run.steps=20

The command behind it runs as it is; the row is of medians over the steps after the sixth, and the
share of data waits is of their sum.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

WARM_UP = 6
COLUMNS = {
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "images_per_second": ("images/s", "{:,.1f}"),
    "mfu": ("MFU", "{:.1%}"),
    "peak_memory_bytes": ("peak GiB", "{:.1f}"),
    "step_seconds": ("step ms", "{:.1f}"),
    "loss": ("loss", "{:.4f}"),
}
SCALES = {"peak_memory_bytes": 2**-30, "step_seconds": 1000}


def main(words: list[str]) -> int:
    """Run the stage and print its row; returns the stage's exit status."""
    folders = [word.removeprefix("run.dir=") for word in words if word.startswith("run.dir=")]
    if not folders or not words[0].endswith(".py"):
        print("usage: bench_stage.py STAGE.py … run.dir=FOLDER, a new one", file=sys.stderr)
        return 2
    code = subprocess.run([sys.executable, *words]).returncode
    if code == 0:
        print(row(Path(folders[-1]) / "metrics.jsonl"))
    return code


def row(path: Path) -> str:
    """Medians of the steps after warm-up."""
    measured = [json.loads(line) for line in path.open()][WARM_UP:]
    if not measured:
        return f"{path}: must have more than {WARM_UP} steps"
    said = []
    for key, (name, form) in COLUMNS.items():
        values = [line[key] for line in measured if line.get(key) is not None]
        if values:
            said.append(f"{name} " + form.format(statistics.median(values) * SCALES.get(key, 1)))
    waits, steps = (
        sum(line[key] for line in measured) for key in ("data_wait_seconds", "step_seconds")
    )
    return "  ".join([*said, f"waiting for data {waits / steps:.1%}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
