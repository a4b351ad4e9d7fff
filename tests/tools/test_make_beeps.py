"""The recordings of beeps that tiny models hear."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from triptych_data.media.audio import load_wave

TOOL = Path(__file__).parents[2] / "tools/make_beeps.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        command = [sys.executable, str(TOOL), str(tmp_path / name), "--train=24", "--heldout=4"]
        subprocess.run(command, check=True)
    return tmp_path


def test_the_same_arguments_give_the_same_bytes(folder: Path) -> None:
    files = [sorted(path for path in (folder / n).rglob("*") if path.is_file()) for n in "ab"]
    assert len(files[0]) == 24 + 4 + 2
    for one, other in zip(*files, strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes()


def test_answers_are_what_is_heard(folder: Path) -> None:
    lines = (folder / "a/train.jsonl").read_text().splitlines()
    answers = set()
    for record in map(json.loads, lines):
        wave = load_wave((folder / "a" / record["audios"][0]).read_bytes(), 16_000).numpy()
        loud = np.abs(wave[: len(wave) // 160 * 160].reshape(-1, 160)).max(1) > 0.1
        spectrum = np.abs(np.fft.rfft(wave))
        hertz = spectrum.argmax() * 16_000 / len(wave)
        heard = {"How many?": str(int((np.diff(loud.astype(int)) > 0).sum()))}
        heard["Which?"] = "low" if hertz < 1000 else "high"
        question, answer = (message["content"] for message in record["messages"])
        assert heard[question.removeprefix("<audio>")] == answer
        answers.add(answer)
    assert answers == {"1", "2", "3", "4", "low", "high"}
