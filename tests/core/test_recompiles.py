"""A size that changes after warm-up is named; a steady run says nothing.

Each run is a process of its own: what torch.compile starts does not survive a fork.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[2]


def in_a_process(call: str) -> str:
    """What a call of one of the functions below prints."""
    code = f"import json\nfrom tests.core.test_recompiles import *\n{call}"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


def compiled_run(sizes: list[int]) -> list[list[tuple[str, str]]]:
    """News after each step of a compiled layer on rows of these sizes."""
    from triptych_core.engine.recompiles import RecompileWatch

    layer = Layer()
    layer.compile(backend="eager", dynamic=False)
    watch = RecompileWatch()
    news = []
    for size in sizes:
        layer(torch.zeros(size, 4)).sum().backward()
        news.append(watch.news())
    return news


def test_a_new_size_is_a_recompilation_with_its_guard():
    news = json.loads(in_a_process("print(json.dumps(compiled_run([8, 8, 16, 16])))"))
    assert [len(step) for step in news] == [0, 0, 1, 0]
    place, reason = news[2][0]
    assert "forward" in place
    assert "8" in reason and "16" in reason


def said(sizes: list[int], path: str) -> None:
    import contextlib

    from triptych_core.config import RunConfig
    from triptych_core.engine.recompiles import RecompileWatch
    from triptych_core.launch import launch

    launch(RunConfig(device="cpu"))
    layer = Layer()
    layer.compile(backend="eager", dynamic=False)
    watch = RecompileWatch()
    with Path(path).open("w") as file, contextlib.redirect_stderr(file):
        for step, size in enumerate(sizes, start=1):
            layer(torch.zeros(size, 4))
            watch(step)


def test_only_what_comes_after_warm_up_is_said(tmp_path):
    path = tmp_path / "stderr"
    in_a_process(f"said([8, 16, 8, 8, 24], {str(path)!r})")
    (line,) = path.read_text().splitlines()
    assert line.startswith("step 5  rank 0 compiled forward (")
    assert "24" in line
