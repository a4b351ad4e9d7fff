"""Memory of a long run, and time to the first batch at any depth.

    python tools/bench_data_memory.py --samples 100000 --workers 2

Trains on nothing: takes the batches of short chats, of which every tenth has an image, and notes
what the trainer, the server of the workers and the workers hold (proportional set size without
files). Growth is from the second line to the last. Then opens the
first batch at positions 0, 10^4 and 10^7, as a resumed run does.
"""

import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import click
from PIL import Image

from triptych_data.config import DataConfig
from triptych_data.loader import PackLoader
from triptych_data.processor import Processor
from triptych_data.shards.write import write_shards
from triptych_data.workers.pool import start_server

MODEL = Path(__file__).parents[1] / "stages" / "configs" / "qwen3_vl_tiny"
DEPTHS = (0, 10**4, 10**7)
WORDS = ("a", "cat", "sat", "on", "the", "mat", "saw", "one", "small", "boat", "at", "sea")


@click.command(help=__doc__)
@click.option("--samples", type=click.IntRange(2000), default=100_000, show_default=True)
@click.option("--stored", type=click.IntRange(100), default=10_000, show_default=True)
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True)
@click.option("--seq-len", type=click.IntRange(64), default=1024, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(samples: int, stored: int, workers: int, seq_len: int, as_json: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder), stored)
        config = DataConfig(shards=[f"{folder}/shards"], seq_len=seq_len, num_workers=workers)
        processor = Processor.from_directory(MODEL)
        loader = PackLoader(config, processor, rank=0, world_size=1)
        rows = list(memory_over(loader, samples))
        seconds = {depth: first_batch(config, processor, depth) for depth in DEPTHS}
    if as_json:
        print(json.dumps({"memory": rows, "first_batch_seconds": seconds}, indent=2))
        return
    print(f"{'samples':>9} {'batches':>8} {'trainer':>9} {'server':>9} {'workers':>9}  MiB")
    for row in rows:
        print(f"{row['samples']:>9,} {row['batches']:>8,} " + _sizes(row))
    growth = {name: rows[-1][name] - rows[1][name] for name in ("trainer", "server", "workers")}
    print(f"{'growth':>18} " + _sizes(growth))
    for depth, (build, batch) in seconds.items():
        print(f"first batch at {depth:>10,}: {batch:.3f} s, loader built in {build:.3f} s")


def write_texts(folder: Path, count: int) -> None:
    """Shards of `count` chats, every tenth with an image."""
    rng = random.Random(0)
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(folder / "image.jpg")
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(count):
            question = " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))
            pictures = ["image.jpg"] if number % 10 == 0 else []
            messages = [
                {"role": "user", "content": "<image>" * len(pictures) + question},
                {"role": "assistant", "content": " ".join(rng.choices(WORDS, k=5))},
            ]
            file.write(json.dumps({"messages": messages, "images": pictures}) + "\n")
    write_shards(folder / "chats.jsonl", folder / "shards", samples_per_shard=2000)


def memory_over(loader: PackLoader, samples: int) -> Iterator[dict[str, float]]:
    """Memory near the start, after each tenth of `samples` more, and at the end."""
    taken, due = 0, samples // 100
    with closing(iter(loader)) as batches:
        for number, batch in enumerate(batches, start=1):
            taken += len(batch["sample_keys"])
            if taken >= min(due, samples):
                yield {"samples": taken, "batches": number, **held(loader.has_workers)}
                due += samples // 10
            if taken >= samples:
                return


def held(has_workers: bool) -> dict[str, float]:
    """MiB of this process, of its server and of all workers."""
    if not has_workers:
        return {"trainer": _proportional_size("self"), "server": 0.0, "workers": 0.0}
    server = start_server().pid
    workers = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return {
        "trainer": _proportional_size("self"),
        "server": _proportional_size(str(server)),
        "workers": sum(map(_proportional_size, workers)),
    }


def first_batch(config: DataConfig, processor: Processor, depth: int) -> tuple[float, float]:
    """Seconds to build a loader, and from asking for its first batch at a depth to having it."""
    started = time.perf_counter()
    loader = PackLoader(config, processor, rank=0, world_size=1)
    window = loader.plan.mixture.window_at(depth)
    loader.position = loader.plan.mixture.start(window)
    built = time.perf_counter()
    with closing(iter(loader)) as batches:
        next(batches)
    return built - started, time.perf_counter() - built


def _proportional_size(process: str) -> float:
    """MiB of a process, memory shared by n processes counting 1/n; without mapped files, of which
    the kernel holds as much as it likes."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    except ProcessLookupError:  # a worker of a loader before, that ended
        return 0.0
    sizes = {name: int(size) for name, size, _ in map(str.split, lines)}
    return (sizes["Pss_Anon:"] + sizes["Pss_Shmem:"]) / 1024


def _sizes(row: dict[str, float]) -> str:
    return "".join(f"{row[name]:>9.1f} " for name in ("trainer", "server", "workers"))


if __name__ == "__main__":
    main()
