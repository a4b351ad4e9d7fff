"""A size that changes after warm-up is named; a steady run says nothing."""

import torch
from torch import nn

from tests.ranks import run_ranks


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


def compiled_run(sizes: list[int]) -> list[list[tuple[str, str]]]:
    """News after each step of a compiled layer on rows of these sizes."""
    from triptych_core.recompiles import RecompileWatch

    layer = Layer()
    layer.compile(backend="eager", dynamic=False)
    watch = RecompileWatch()
    news = []
    for size in sizes:
        layer(torch.zeros(size, 4)).sum().backward()
        news.append(watch.news())
    return news


def test_a_new_size_is_a_recompilation_with_its_guard():
    (news,) = run_ranks(compiled_run, 1, [8, 8, 16, 16])
    assert [len(step) for step in news] == [0, 0, 1, 0]
    place, reason = news[2][0]
    assert "forward" in place
    assert "8" in reason and "16" in reason


def said(sizes: list[int], path: str) -> None:
    import contextlib
    from pathlib import Path

    from triptych_core.config import RunConfig
    from triptych_core.launch import launch
    from triptych_core.recompiles import RecompileWatch

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
    run_ranks(said, 1, [8, 16, 8, 8, 24], str(path))
    (line,) = path.read_text().splitlines()
    assert line.startswith("step 5  rank 0 compiled forward (")
    assert "24" in line
