"""Records become shards, verified, packed and counted; a flipped bit is found."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "stages/configs/qwen3_vl_tiny"


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        raw, model = (Path(word) for word in sys.argv[1:3] or (made_up(Path(scratch)), MODEL))
        shards = Path(scratch) / "shards"
        for words in (["shard", raw, shards], ["verify", shards]):
            if code := call(*words):
                return code
        look(shards, Path(model))
        return flipped_bit_is_found(shards)


def made_up(folder: Path) -> Path:
    """Chats of one turn."""
    lines = [
        {"messages": [{"role": r, "content": f"{r} {n} " * (n + 1)} for r in ("user", "assistant")]}
        for n in range(12)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "chats.jsonl"


def look(shards: Path, model: Path) -> None:
    """Packs as a stage would get them."""
    from triptych_data.config import DataConfig
    from triptych_data.loader import PackLoader
    from triptych_data.processor import Processor

    config = DataConfig(shards=[str(shards)], seq_len=512, num_workers=0)
    loader = PackLoader(config, Processor.from_directory(model), rank=0, world_size=1)
    batch = next(iter(loader))
    assert batch["num_targets"] == int((batch["shift_labels"] != -100).sum())
    print(f"{batch['num_tokens']} tokens in a row of 512, {batch['num_targets']} of them targets")


def flipped_bit_is_found(shards: Path) -> int:
    """0 if `verify` refuses a copy with one bit changed."""
    damaged = shutil.copytree(shards, shards.with_name("damaged"))
    shard = next(damaged.glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    return int(call("verify", damaged, quiet=True) == 0)


def call(*words: object, quiet: bool = False) -> int:
    entry = "from triptych_data.cli.main import main; main()"
    command = [sys.executable, "-c", entry, *map(str, words)]
    return subprocess.run(command, capture_output=quiet).returncode


if __name__ == "__main__":
    sys.exit(main())
