"""A plan and a measured row of a tiny model: every figure that the procedure reads is there."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "stages/configs/qwen3_tiny"
TINY = ("run.device=cpu", "model.compile=none")


def main() -> int:
    planned = json.loads(
        call(
            "stages/pretrain.py",
            f"model.path={MODEL}",
            "model.init=random",
            "data.shards=[x]",
            "data.seq_len=128",
            *TINY,
            "--plan",
            "--json",
        )
    )
    for choice in planned["choices"]:
        print(
            f"ZeRO-{choice['stage']}, {choice['checkpointing']}: "
            f"{choice['peak_bytes'] / 2**20:.1f} MiB, {choice['step_seconds']:.4f} s"
        )
    with tempfile.TemporaryDirectory() as out:
        words = ("--steps", "8", "--seq-len", "128", "--document-len", "32", "--variant", "zero0")
        print(call("tools/bench_train.py", str(MODEL), out, *words, *TINY))
        last = json.loads((Path(out) / "zero0/metrics.jsonl").read_text().splitlines()[-1])
    wanted = ("tokens_per_second", "step_seconds", "data_wait_seconds", "loss", "grad_norm")
    missing = [key for key in wanted if last.get(key) is None]
    print(f"missing in metrics.jsonl: {missing or 'nothing'}")
    return int(bool(missing) or not planned["choices"])


def call(script: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *words], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
