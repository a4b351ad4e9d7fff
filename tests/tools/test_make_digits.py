"""The digit chats: what is held out stays out, answers are right, bytes repeat."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

TOOL = Path(__file__).parents[2] / "tools/make_digits.py"
COUNTS = {"--even": 40, "--five": 40, "--larger": 60, "--sums": 60, "--arithmetic": 900}
OPTIONS = [str(item) for pair in COUNTS.items() for item in pair] + ["--heldout-each", "50"]
TYPES = {"which digit", "is it even", "more than five", "which is larger", "sum", "arithmetic"}


def make(out_dir: Path, *options: str) -> Path:
    subprocess.run([sys.executable, TOOL, out_dir, *OPTIONS, *options], check=True)
    return out_dir


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("digits"))


def read(made: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (made / f"{split}.jsonl").read_text().splitlines()]


def parts(sample: dict, kind: str) -> list[str]:
    content = sample["messages"][0]["content"]
    if isinstance(content, str):
        return [content] if kind == "text" else []
    return [part[kind] for part in content if part["type"] == kind]


def addends(sample: dict) -> frozenset[int]:
    return frozenset(map(int, re.findall(r"\d+", sample["messages"][0]["content"])))


def test_counts_by_type(made: Path) -> None:
    train = Counter(sample["question"] for sample in read(made, "train"))
    heldout = Counter(sample["question"] for sample in read(made, "heldout"))
    assert set(train) == set(heldout) == TYPES
    assert train["which digit"] == 2 * (1797 - 360)
    assert train["arithmetic"] == 900
    assert heldout == dict.fromkeys(TYPES, 50) | {"which digit": 360}


def test_heldout_images_and_additions_are_not_in_training(made: Path) -> None:
    train, heldout = read(made, "train"), read(made, "heldout")
    seen = {path for sample in train for path in parts(sample, "image")}
    unseen = {path for sample in heldout for path in parts(sample, "image")}
    assert len(seen) == 1797 - 360
    assert len(unseen) == 360
    assert not seen & unseen
    added = {addends(sample) for sample in train if sample["question"] == "arithmetic"}
    assert not added & {addends(s) for s in heldout if s["question"] == "arithmetic"}


def test_classes_are_held_out_evenly(made: Path) -> None:
    answers = Counter(
        s["messages"][1]["content"] for s in read(made, "heldout") if s["question"] == "which digit"
    )
    assert set(answers) == set("0123456789")
    assert min(answers.values()) >= 34


def test_answers_follow_from_the_labels(made: Path) -> None:
    labels = load_digits().target
    for sample in read(made, "train") + read(made, "heldout"):
        shown = [int(labels[int(Path(path).stem)]) for path in parts(sample, "image")]
        right = {
            "which digit": lambda v: str(v[0]),
            "is it even": lambda v: ["yes", "no"][v[0] % 2],
            "more than five": lambda v: "yes" if v[0] in (6, 7, 8, 9) else "no",
            "which is larger": lambda v: str(sorted(v)[1]),
            "sum": lambda v: str(sum(v)),
            "arithmetic": lambda v: str(eval(re.sub(r".*?(\d+)\D+(\d+).*", r"\1+\2", v))),
        }[sample["question"]]
        subject = shown if shown else sample["messages"][0]["content"]
        assert sample["messages"][1] == {"role": "assistant", "content": right(subject)}
        if sample["question"] == "which is larger":
            assert shown[0] != shown[1]


def test_no_sample_is_repeated_word_for_word(made: Path) -> None:
    lines = [line for line in (made / "train.jsonl").read_text().splitlines() if "image" in line]
    assert len(set(lines)) == len(lines)


def test_images_are_64_by_64_with_dark_ink_on_white(made: Path) -> None:
    with Image.open(made / read(made, "heldout")[0]["messages"][0]["content"][0]["image"]) as image:
        assert image.size == (64, 64)
        assert image.getpixel((0, 0)) > 200
        assert image.getextrema()[0] < 60


def test_same_options_same_bytes_and_another_seed_another_split(made: Path, tmp_path: Path) -> None:
    again = make(tmp_path / "again")
    other = make(tmp_path / "other", "--seed", "1", "--jpeg")
    for path in (p for p in made.rglob("*") if p.is_file()):
        assert (again / path.relative_to(made)).read_bytes() == path.read_bytes(), path
    assert (other / "heldout.jsonl").read_bytes() != (made / "heldout.jsonl").read_bytes()
    assert len(list((other / "images").glob("*.jpg"))) == 1797
