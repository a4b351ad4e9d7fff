"""Files that mean harm, at every door that would take them: nothing runs, leaves or fills up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
SECONDS = 20.0
"""Of one core. Alone on a quiet one all but those of `SLOW` take under one; CI's are shared."""
MEBIBYTES = 300
SLOW = ("template-endless-macros", "template-doubled-list", "audio-silence.flac", "yaml-deep")
# What holds nothing that could harm here, and may be taken; all else must be refused.
INERT = (
    "tar-long-name",
    "pickle.",  # the index refuses most; `shard` takes the rest of the sample
    "preview-markup",
    "image-png-data-beyond.png",
    "image-webp-animated.webp",
    "video-frames-16384.mp4",  # the pictures themselves are small
    "video-frames-8192.mp4",
    "audio-data-of-4-GiB.wav",
    "audio-silence.flac",
    "weights-name-twice",
    "weights-metadata-no-text",
    "tokenizer-auto-map",
    "tokenizer-class-of-a-path",
    "tokenizer-template-of-numbers",
    "processor-auto-map",
    "processor-size-of-exabytes",
    "report-",
)


@pytest.fixture(scope="module")
def trials(tmp_path_factory) -> list[dict[str, Any]]:
    """What came of every file at every door."""
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, "-m", "tests.hostile.host", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    print(f"{len(found)} trials of {len({trial['case'] for trial in found})} files")
    return found


def test_nothing_runs_talks_or_leaves_its_folder(trials):
    assert len({trial["case"] for trial in trials}) >= 150 and len(trials) >= 220
    assert {named(trial): trial["events"] for trial in trials if trial["events"]} == {}


def test_every_file_is_refused_by_name_or_means_nothing(trials):
    endings = {named(trial): trial["ending"] for trial in trials}
    broken = {name: ending for name, ending in endings.items() if ending not in GOOD}
    taken = [name for name, ending in endings.items() if ending == "accepted" and not inert(name)]
    assert (broken, taken) == ({}, [])


def test_a_refusal_says_which_file_and_why(trials):
    for trial in trials:
        if trial["ending"] != "refused" or trial["door"] == "config":
            continue  # a configuration's mistakes are named by their keys
        message = trial["message"]
        assert ("/" in message and len(message) > 40) or trial["door"] in REPORTS, trial
        if trial["door"] not in REPORTS:
            assert "\n" not in message, trial


def test_none_takes_long_or_fills_the_memory(trials):
    slow = {named(trial): trial["seconds"] for trial in trials if trial["seconds"] > SECONDS}
    large = {
        named(trial): trial["mebibytes"]
        for trial in trials
        if trial["mebibytes"] > MEBIBYTES and trial["case"] not in SLOW
    }
    assert (slow, large) == ({}, {})


GOOD = ("refused", "accepted")
REPORTS = ("verify",)  # which lists what is wrong, a line each


def named(trial: dict[str, Any]) -> str:
    return f"{trial['case']} at {trial['door']}"


def inert(name: str) -> bool:
    return name.startswith(INERT)
