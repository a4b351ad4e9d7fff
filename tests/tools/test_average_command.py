"""The averager as a user runs it: processes, kills, memory, messages."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import ROOT, SHIPPED
from tests.tools.average_folders import average, read_weights, weights, write_folder

TOOL = ROOT / "tools/average_checkpoints.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(*words: Any) -> list[str]:
    return [sys.executable, str(TOOL), *(str(word) for word in words)]


def call(*words: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), capture_output=True, text=True, env=ENVIRONMENT, check=False
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("pair")
    return [write_folder(root / f"model-{n}", weights(n, torch.bfloat16)) for n in (1, 2)]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> list[Path]:
    """Two models of 384 MiB in 24 tensors."""
    root = tmp_path_factory.mktemp("large")
    paths = []
    for seed in (1, 2):
        block = torch.randn(8 << 20, generator=torch.Generator().manual_seed(seed))
        block = block.to(torch.bfloat16)
        tensors = {f"layer.{n}": (block * (n + 1)).reshape(1 << 10, -1) for n in range(24)}
        path = write_folder(root / f"model-{seed}", {})
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        paths.append(path)
    return paths


def test_two_words_are_enough(pair, tmp_path):
    done = call(*pair, "--output", tmp_path / "out", "--sha256")
    assert done.returncode == 0, done.stderr
    assert re.search(r"out: \d+ KiB in .* memory \d+ MiB", done.stdout)
    found = read_weights(tmp_path / "out")
    ours, theirs = (read_weights(path) for path in pair)
    for name, tensor in found.items():
        wanted = (ours[name].float() + theirs[name].float()) / 2
        assert torch.equal(tensor, wanted.to(torch.bfloat16)), name
    facts = json.loads((tmp_path / "out/averaging.json").read_text())
    assert facts["recipe"]["weights"] == [0.5, 0.5]
    assert len(facts["inputs"][0]["files"]["model.safetensors"]["sha256"]) == 64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    done = call("verify", tmp_path / "out")
    assert done.returncode == 0 and "tensors are finite" in done.stdout, done.stderr
    done = call(*pair, "--output", tmp_path / "out")
    assert done.returncode == 1 and "--output: must not exist" in done.stderr


def test_dry_run_writes_nothing(pair, tmp_path):
    done = call(*pair, "-o", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert re.search(r"to read, .* to write in 1 file", done.stderr)
    assert re.search(r"dry run: .* of memory with \d threads; about \d+ s", done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methd", "ema"], r"No such option '?--methd"),
        (["--method", "mean"], r"'mean' is not one of"),
        (["--decay", "0.5"], r"--decay: must come with --method ema, got it with uniform"),
        (["--method", "weighted", "--weights", "1,x"], r"must be numbers separated by commas"),
        (["--method", "weighted", "--weights", "1,1"], r"--weights: must add up to 1, got 2"),
        (["--max-memory", "100M"], r"--max-memory: must be at least \d+M here"),
        (["--max-memory", "lots"], r"must be a size such as 1G or 512M, got 'lots'"),
    ],
    ids=str,
)
def test_mistakes_end_in_one_line(pair, tmp_path, words, message):
    done = call(*pair, "-o", tmp_path / "out", *words)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_memory_is_bounded(large, tmp_path):
    """The process with all it loads stays below its bound, with models of 384 MiB."""
    bound = 768 << 20
    words = command(*large, "-o", tmp_path / "out", "--max-memory", bound, "--threads", 8)
    # From a small process: the kernel counts what the parent had when it started a child.
    script = (
        "import os, subprocess, sys\n"
        "process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
        "_, status, usage = os.wait4(process.pid, 0)\n"
        "print(status, usage.ru_maxrss * 1024)\n"
    )
    found = subprocess.check_output([sys.executable, "-c", script, *words], env=ENVIRONMENT)
    status, most = (int(word) for word in found.split())
    assert status == 0 and most <= bound
    facts = json.loads((tmp_path / "out/averaging.json").read_text())
    assert facts["peak_memory_bytes"] <= bound


def test_a_killed_run_goes_on(large, tmp_path):
    """Killed once a shard is on the disk: that one is not written again, and all is the same."""
    output, partial = tmp_path / "out", tmp_path / ".out.averaging"
    words = command(*large, "-o", output, "--max-shard-size", "40M", "--threads", 2)
    process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE)
    done = partial / ".done"
    deadline = time.monotonic() + 60
    while not (done.is_file() and done.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not output.exists()
    first = partial / done.read_text().split("\n")[0]
    written = first.stat().st_mtime_ns
    again = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert re.search(r"goes on with .* of 12 files there", again.stderr)
    assert (output / first.name).stat().st_mtime_ns == written
    assert not partial.exists() and not list(output.glob(".*"))
    average(tmp_path / "whole", *large)
    found, wanted = read_weights(output), read_weights(tmp_path / "whole")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_half_an_output_of_other_inputs_is_not_gone_on_with(pair, tmp_path):
    partial = tmp_path / ".out.averaging"
    partial.mkdir()
    (partial / ".plan").write_text("another")
    (partial / ".done").write_text("model.safetensors\n")
    (partial / "model.safetensors").write_text("wrong")
    found = average(tmp_path / "out", *pair)
    assert torch.isfinite(found["model.scale"])
    assert found.keys() == read_weights(pair[0]).keys()


def test_greedy_keeps_what_helps_and_scores_nothing_twice(tmp_path):
    """The score is minus the distance of one number from 1: 0.6 and 1.3 help, 9 does not."""
    paths = [
        write_folder(tmp_path / f"model-{value}", {"x": torch.tensor([value])})
        for value in (9.0, 1.3, 0.6)
    ]
    script = tmp_path / "score.py"
    script.write_text(
        "import sys, json, struct, pathlib\n"
        "data = (pathlib.Path(sys.argv[1]) / 'model.safetensors').read_bytes()\n"
        "pathlib.Path(sys.argv[2]).open('a').write('x')\n"
        "print('...')\n"
        "print(json.dumps({'score': -abs(struct.unpack('<f', data[-4:])[0] - 1)}))\n"
    )
    evaluate = f"{sys.executable} {script} {{}} {tmp_path / 'calls'}"
    words = [*paths, "-o", tmp_path / "out", "--method", "greedy", "--evaluate", evaluate]
    done = call(*words)
    assert done.returncode == 0, done.stderr
    assert read_weights(tmp_path / "out")["x"].item() == pytest.approx(0.95)
    facts = json.loads((tmp_path / "out/averaging.json").read_text())
    assert [len(trial["inputs"]) for trial in facts["trials"]] == [1, 1, 1, 2, 3]
    assert len(facts["inputs"]) == 2 and not (tmp_path / ".out.greedy").exists()
    assert (tmp_path / "calls").read_text() == "xxxxx"
    done = call(*paths, "-o", tmp_path / "no", "--method", "greedy", "--evaluate", "echo good")
    assert done.returncode == 1 and "--evaluate: must print a finite number" in done.stderr


def test_the_output_loads_in_stock_transformers(tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(SHIPPED)
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
        paths.append(tmp_path / f"model-{seed}")
        model.save_pretrained(paths[-1], max_shard_size="5MB" if seed == 1 else "1GB")
        AutoProcessor.from_pretrained(SHIPPED).save_pretrained(paths[-1])
    found = average(tmp_path / "out", *paths, max_shard_size=3 << 20)
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in found.items())
    AutoProcessor.from_pretrained(tmp_path / "out")
