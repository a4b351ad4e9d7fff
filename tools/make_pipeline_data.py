"""Real data for a whole tiny pipeline, as shards: documents, captions, chats, and held-out splits.

    python tools/make_pipeline_data.py OUT_DIR

Documents are the docstrings of this Python's standard library; every twentieth is held out.
Captions and chats are of scikit-learn's 1,797 handwritten digits. A scan is in training, in dev or
in test, and so is an addition: of the scans 180 are in each of the latter, of the additions 50.
"""

from __future__ import annotations

import ast
import json
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from make_digits import Digit, Sample, make_samples, split_additions, write_images

SIDE = 32  # pixels: four tokens of the tiny model
SHORTEST = 200  # characters of a document
TRAINING = {
    "which digit": 2800,
    "is it even": 700,
    "more than five": 700,
    "which is larger": 1000,
    "sum": 1000,
    "arithmetic": 1000,
}
HELDOUT = {"which digit": 180} | dict.fromkeys(list(TRAINING)[1:], 50)
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@click.command()
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Splits, order and wordings.")
def main(out_dir: Path, seed: int) -> None:
    """Write shards into OUT_DIR: documents, captions, chats, dev, test, heldout_documents."""
    from triptych_data.shards.write import write_shards

    raw = out_dir / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir(parents=True)
    for name, samples in make_splits(raw, seed):
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        (raw / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        shutil.rmtree(out_dir / name, ignore_errors=True)
        write_shards(raw / f"{name}.jsonl", out_dir / name)
        click.echo(f"{name}: {len(lines):,} samples")


def make_splits(raw: Path, seed: int) -> Iterator[tuple[str, list[Sample]]]:
    """Each split's name and samples; images are written below `raw`."""
    documents = [{"text": text} for text in read_docstrings()]
    yield "documents", [each for n, each in enumerate(documents) if n % 20]
    yield "heldout_documents", documents[::20]
    train, heldout = write_images(raw, 2 * HELDOUT["which digit"], seed, ".png", SIDE)
    pairs, kept = split_additions(2 * HELDOUT["arithmetic"], seed)
    yield "captions", [caption(digit) for digit in train]
    yield "chats", make_samples(train, pairs, TRAINING, f"{seed}/train")
    for half, name in enumerate(("dev", "test")):
        digits, additions = heldout[half::2], kept[half::2]
        yield name, make_samples(digits, additions, HELDOUT, f"{seed}/{name}")


def read_docstrings(folder: Path | None = None) -> list[str]:
    """Docstrings of the modules of a folder, by default the standard library, each once."""
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    texts = (text for file in sorted(folder.glob("*.py")) for text in docstrings_of(file))
    return list(dict.fromkeys(text for text in texts if len(text) >= SHORTEST))


def docstrings_of(file: Path) -> Iterable[str]:
    """Of a module, its classes and functions; none of a file that is not Python of today."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]


def caption(digit: Digit) -> dict[str, Any]:
    """A scan and what it shows."""
    content = [{"type": "image", "image": digit.path}]
    answer = f"The digit is {digit.value}, {DIGITS[digit.value]}."
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
    }


if __name__ == "__main__":
    main()
