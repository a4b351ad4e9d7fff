"""The demo tool: whose folder it may empty, how it splits, and one whole short run."""

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.tiny import ROOT, make_chats, make_model_dir

DEMO = [sys.executable, str(ROOT / "tools/demo.py")]


def demo(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DEMO, *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> list[str]:
    """Arguments of a run of two steps on a tiny model and twenty chats."""
    path = tmp_path_factory.mktemp("demo")
    make_model_dir(path / "model")
    chats = make_chats(path / "chats", 20)
    return [
        f"--data={chats}",
        f"--out={path / 'out'}",
        "--ranks=2",
        f"model.path={path / 'model'}",
        "run.steps=2",
        "run.device=cpu",
        "schedule.warmup_steps=0",
        "data.num_workers=0",
    ]


def test_own_chats_from_jsonl_to_the_last_line(short):
    result = demo(*short)
    assert result.returncode == 0, result.stdout + result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    assert set(last) == {"exact_match", "majority", "seconds", "export", "report"}
    assert set(last["exact_match"]) == {"kind 1"}  # samples 9 and 19 were held out
    out = next(word.removeprefix("--out=") for word in short if word.startswith("--out="))
    assert last["export"] == f"{out}/export"


def test_a_folder_the_demo_did_not_make_is_left_alone(tmp_path, short):
    (tmp_path / "run.json").write_text('{"finished": "yesterday"}')
    result = demo(f"--out={tmp_path}")
    assert result.returncode == 1
    assert "must be a new folder or an earlier demo's" in result.stderr
    assert (tmp_path / "run.json").exists()


def test_too_few_chats_and_a_lonely_heldout_file_are_refused(tmp_path):
    few = make_chats(tmp_path / "few", 3)
    result = demo(f"--data={few}", f"--out={tmp_path / 'out'}")
    assert result.returncode == 1
    assert "must have at least 10 samples, got 3" in result.stderr
    assert demo(f"--heldout={few}").returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_everything_it_started(tmp_path, number):
    process = subprocess.Popen([*DEMO, f"--out={tmp_path / 'out'}"], cwd=ROOT)
    time.sleep(2.5)
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    time.sleep(0.5)
    found = subprocess.run(
        ["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert found.stdout == ""


def test_tiny_configurations_name_the_shards_that_it_writes():
    """Those that say so: `deepspeed stages/X.py --config …` then needs nothing else."""
    sys.path.insert(0, str(ROOT / "tools"))
    from demo import main

    (out,) = [option.default for option in main.params if option.name == "out"]
    written = {f"{out}/shards/{name}" for name in ("train", "heldout")}
    said = [
        path
        for path in (ROOT / "stages/configs").glob("*_tiny.yaml")
        if "make demo writes" in path.read_text().replace("\n# ", " ")
    ]
    assert len(said) > 5
    for path in said:
        tree = yaml.safe_load(path.read_text())
        shards = [*tree["data"]["shards"], *tree.get("evaluation", {}).get("shards", [])]
        assert written & set(shards), path
        assert all(name in written for name in shards if not name.startswith("runs/beeps")), path
