"""Turn scikit-learn's 1,797 handwritten digits into chats: JSONL files and an image folder.

    python tools/make_digits.py OUT_DIR

writes OUT_DIR/train.jsonl, OUT_DIR/heldout.jsonl and OUT_DIR/images/. One line is one chat, with
image paths relative to the JSONL file and the type of question under "question". A held-out image
never occurs in training, nor does a held-out addition, in either order. The same options give the
same bytes (with one version of Pillow).
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement, cycle, islice
from pathlib import Path
from typing import Any

import click

IMAGE_SIDE = 64  # the scans are 8 by 8 pixels; 64 gives 8 by 8 patches of 8 pixels
MAX_ADDEND = 30  # text-only additions: 0 to 30 makes 496 pairs, enough to hold some out

# "{a}" and "{b}" stand for two images or, in "arithmetic", for two numbers.
WORDINGS: dict[str, list[str]] = {
    "which digit": [
        "{a}Which digit is this?",
        "{a}What digit do you see in the image?",
        "{a}Read the handwritten digit.",
        "Which number is written here?{a}",
    ],
    "is it even": [
        "{a}Is this digit even?",
        "{a}Is the digit in the image an even number? Answer yes or no.",
        "Is this an even number?{a}",
    ],
    "more than five": [
        "{a}Is this digit more than five?",
        "{a}Is the number in the image greater than 5? Answer yes or no.",
        "Is this number more than five?{a}",
    ],
    "which is larger": [
        "{a}{b}Which of the two digits is larger?",
        "{a}{b}Name the larger digit of the two images.",
        "First image:{a}Second image:{b}Which digit is larger?",
    ],
    "sum": [
        "{a}{b}What is the sum of the two digits?",
        "{a}{b}Add the two digits.",
        "First image:{a}Second image:{b}What do they add up to?",
    ],
    "arithmetic": [
        "What is {a} plus {b}?",
        "How much is {a} + {b}?",
        "Add {a} and {b}.",
    ],
}

Sample = dict[str, Any]


@dataclass(frozen=True)
class Digit:
    """One scan: where its image file stands, relative to the JSONL files, and what it shows."""

    path: str
    value: int


def counts(name: str, default: int, low: int = 0, high: int | None = None, **kwargs: Any) -> Any:
    """A click option that counts something, checked on the command line."""
    return click.option(
        name, default=default, show_default=True, type=click.IntRange(low, high), **kwargs
    )


@click.command()
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Split, order and wordings.")
@counts("--heldout-images", default=360, low=10, high=1787, help="Scans kept from training.")
@counts("--readings", default=2, help="'which digit' per training scan.")
@counts("--even", default=700, help="'is it even', training.")
@counts("--five", default=700, help="'more than five', training.")
@counts("--larger", default=1000, help="'which is larger', training.")
@counts("--sums", default=1000, help="'sum' of two images, training.")
@counts("--arithmetic", default=1000, help="'arithmetic' (text only), training.")
@counts("--heldout-each", default=100, high=400, help="Held out, of each other type.")
@click.option("--jpeg", is_flag=True, help="Write JPEG files instead of PNG.")
def main(
    out_dir: Path,
    seed: int,
    heldout_images: int,
    readings: int,
    even: int,
    five: int,
    larger: int,
    sums: int,
    arithmetic: int,
    heldout_each: int,
    jpeg: bool,
) -> None:
    """Write train.jsonl, heldout.jsonl and images/ into OUT_DIR."""
    train_digits, heldout_digits = write_images(
        out_dir, heldout_images, seed, ".jpg" if jpeg else ".png"
    )
    train_pairs, heldout_pairs = split_additions(heldout_each, seed)
    train_counts = {
        "which digit": readings * len(train_digits),
        "is it even": even,
        "more than five": five,
        "which is larger": larger,
        "sum": sums,
        "arithmetic": arithmetic,
    }
    heldout_counts = dict.fromkeys(WORDINGS, heldout_each) | {"which digit": len(heldout_digits)}
    for split, digits, pairs, counts in (
        ("train", train_digits, train_pairs, train_counts),
        ("heldout", heldout_digits, heldout_pairs, heldout_counts),
    ):
        samples = make_samples(digits, pairs, counts, seed=f"{seed}/{split}")
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        (out_dir / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        tally = Counter(sample["question"] for sample in samples)
        click.echo(
            f"{split}.jsonl: {len(samples)} samples from {len(digits)} images, {dict(tally)}"
        )


def write_images(
    out_dir: Path, num_heldout: int, seed: int, suffix: str, side: int = IMAGE_SIDE
) -> tuple[list[Digit], list[Digit]]:
    """Write every scan as dark ink on white, smoothly enlarged.

    Returns the training and the held-out digits, split class by class.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    digits = []
    for number, (ink, value) in enumerate(zip(scans.images, scans.target, strict=True)):
        # ink (8, 8) float, 0 to 16
        gray = Image.fromarray((255 - np.asarray(ink) * 255 / 16).round().astype(np.uint8))
        path = f"images/{number:04d}{suffix}"
        gray.resize((side, side), Image.Resampling.BICUBIC).save(out_dir / path)
        digits.append(Digit(path, int(value)))
    train, heldout = train_test_split(
        digits, test_size=num_heldout, stratify=scans.target, random_state=seed
    )
    return train, heldout


def split_additions(
    num_heldout: int, seed: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Split all additions of two numbers up to MAX_ADDEND, so that 3 + 4 and 4 + 3 stay together.

    Returns the pairs for training, in both orders, and the held-out pairs, in one order each.
    """
    pairs = list(combinations_with_replacement(range(MAX_ADDEND + 1), 2))
    rng = random.Random(f"{seed}/additions")
    rng.shuffle(pairs)
    heldout = [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs[:num_heldout]]
    train = sorted({order for a, b in pairs[num_heldout:] for order in ((a, b), (b, a))})
    return train, heldout


def make_samples(
    digits: list[Digit], pairs: list[tuple[int, int]], counts: dict[str, int], seed: str
) -> list[Sample]:
    """Make counts[question] samples of each type, shuffled together."""
    samples: list[Sample] = []
    for question, count in counts.items():
        rng = random.Random(f"{seed}/{question}")
        drawn = islice(draw(question, digits, pairs, rng), count)
        wordings = WORDINGS[question]
        num_subjects = len(pairs if question == "arithmetic" else digits)
        for number, (a, b) in enumerate(drawn):
            # Wordings in turn, shifted on every pass, so that a scan does not meet the same again.
            round_, position = divmod(number, num_subjects)
            wording = wordings[(position + round_) % len(wordings)]
            samples.append(chat(question, wording, a, b))
    random.Random(f"{seed}/order").shuffle(samples)
    return samples


def draw(
    question: str, digits: list[Digit], pairs: list[tuple[int, int]], rng: random.Random
) -> Iterator[tuple[Any, Any]]:
    """Draw what the question is about, without end: (digit, None), two digits or two numbers."""
    if question == "arithmetic":
        yield from cycle(rng.sample(pairs, len(pairs)))
    order = rng.sample(digits, len(digits))
    for first in cycle(order):
        if question not in ("which is larger", "sum"):
            yield first, None
            continue
        second = rng.choice(order)
        while second is first or (question == "which is larger" and second.value == first.value):
            second = rng.choice(order)
        yield first, second


def chat(question: str, wording: str, a: Any, b: Any) -> Sample:
    """One sample: the wording with its images or numbers filled in, and the right answer."""
    if question == "arithmetic":
        content: Any = wording.format(a=a, b=b)
        answer = str(a + b)
    else:
        content = list(fill(wording, {"{a}": a, "{b}": b}))
        answer = ANSWERS[question](a.value, b.value if b else 0)
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "question": question}


ANSWERS: dict[str, Callable[[int, int], str]] = {
    "which digit": lambda a, b: str(a),
    "is it even": lambda a, b: "yes" if a % 2 == 0 else "no",
    "more than five": lambda a, b: "yes" if a > 5 else "no",
    "which is larger": lambda a, b: str(max(a, b)),
    "sum": lambda a, b: str(a + b),
}


def fill(wording: str, images: dict[str, Digit]) -> Iterator[dict[str, str]]:
    """Split "text{a}text{b}text" into the parts of a chat message."""
    for piece in wording.replace("{", "\0{").replace("}", "}\0").split("\0"):
        if piece in images:
            yield {"type": "image", "image": images[piece].path}
        elif piece:
            yield {"type": "text", "text": piece}


if __name__ == "__main__":
    main()
