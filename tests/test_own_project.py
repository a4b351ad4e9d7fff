"""A stranger's project trains on the installed packages alone, from a folder of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MistralForCausalLM

from tests.tiny import ROOT

STEPS = 50


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere") / "own_project"
    shutil.copytree(ROOT / "examples/own_project", folder)
    train(folder, 2, f"run.steps={STEPS // 2}")
    train(folder, 1, f"run.steps={STEPS}")
    return folder


def train(folder: Path, ranks: int, *words: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, "train.py", "--config", "train.yaml", *words]
    # Packages only: nothing of the repository's root, its stages or its tests.
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    packages = os.pathsep.join(path for path in paths if "packages" in path)
    environment = {**os.environ, "PYTHONPATH": packages}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_learns_and_goes_on_with_other_ranks(project: Path) -> None:
    lines = [json.loads(line) for line in (project / "runs/sums/metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    # Answers of one or two digits and an end: chance is 5.5, an end learnt alone some 1.5.
    assert lines[0]["loss"] > 5 and lines[-1]["loss"] < 1.2
    assert len(json.loads((project / "runs/sums/run.json").read_text())["resumes"]) == 1


def test_its_export_loads_in_stock_transformers(project: Path) -> None:
    stock = MistralForCausalLM.from_pretrained(project / "runs/sums/export")
    prompt = torch.tensor([[*b"3+4="]])
    answer = stock.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert chr(answer[0, -1]).isdigit()


def test_a_family_of_another_name_is_refused_before_torch(project: Path) -> None:
    command = [sys.executable, "train.py", "--config", "train.yaml", "model.family=mistrl"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 2 and "mistral" in done.stderr, done.stderr
