"""Who reads numbers from the device during steps: we once an interval."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.ranks import run_ranks

STEPS, EVERY = 12, 4
READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
}


class CountReads(TorchFunctionMode):
    """Counts what would wait for an accelerator, by the module and function that asked for it."""

    def __init__(self) -> None:
        self.reads: Counter[tuple[str, str]] = Counter()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in READS:
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename and frame.f_back is not None:
                frame = frame.f_back
            self.reads[Path(frame.f_code.co_filename).stem, frame.f_code.co_name] += 1
        return function(*args, **(kwargs or {}))


class Model(nn.Module):
    """Just enough for the loop; a batch may scale its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.layer = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 8)

    def forward(self, input_ids: Tensor, num_targets: int, factor: float = 1.0) -> Any:
        from triptych_models.output import LossOutput

        logits = self.lm_head(self.layer(self.embedding(input_ids)))  # (1, T, 8)
        loss = nn.functional.cross_entropy(logits[0].float(), input_ids[0], reduction="sum")
        return LossOutput(loss * factor, num_targets, {})


def reads_of_steps(path: Path, stage: int, optimizer: str) -> Counter[tuple[str, str]]:
    import torch.distributed as dist

    from triptych_core.config import RunConfig, StageConfig, load_config
    from triptych_core.engine.build import build_engine, sharded_init
    from triptych_core.launch import launch
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_models.matrices import matrix_shapes

    launch(RunConfig(device="cpu"))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    overrides = [f"run.dir={path}", f"run.steps={STEPS}", f"log.every={EVERY}", "run.device=cpu"]
    overrides += [f"engine.zero.stage={stage}", f"optim.name={optimizer}"]
    config = load_config(StageConfig, None, overrides)
    with sharded_init(config.engine, world_size):
        model = Model().to(torch.bfloat16)
    matrices = matrix_shapes(model)
    groups = parameter_groups(model.named_parameters(), config.optim, lambda _: "all", matrices)
    optimizer = build_optimizer(groups, config.optim)
    engine = build_engine(model, optimizer, config.engine, config.optim, world_size)
    ids = torch.arange(8)[None]
    batches = iter([{"input_ids": ids, "num_targets": 8, "num_tokens": 8}] * STEPS)
    with Metrics(config, rank=rank, world_size=world_size) as metrics, CountReads() as counter:
        train(engine, batches, config, flops=lambda _: 1.0, metrics=metrics)
    engine.destroy()
    return counter.reads


CASES = [(stage, optimizer) for stage in (0, 1, 2, 3) for optimizer in ("adamw", "muon")]


def reads_of_all(path: Path) -> list[Counter[tuple[str, str]]]:
    return [reads_of_steps(path / f"{stage}-{name}", stage, name) for stage, name in CASES]


@pytest.fixture(scope="module")
def reads(tmp_path_factory) -> dict[tuple[int, str], tuple[Counter[Any], Counter[Any]]]:
    """By case, those of the main rank and of the other."""
    path = tmp_path_factory.mktemp("reads")
    for stage, name in CASES:
        (path / f"{stage}-{name}").mkdir()
    main, other = run_ranks(reads_of_all, 2, path)
    return dict(zip(CASES, zip(main, other, strict=True), strict=True))


@pytest.mark.parametrize(("stage", "optimizer"), CASES)
def test_we_read_once_an_interval(reads, stage, optimizer):
    main, other = reads[stage, optimizer]
    # On every rank, of what has already arrived in the host's memory: whether the step before was
    # taken, and whether a rank was asked to stop.
    heard = {("oversight", "hear"): STEPS, ("oversight", "settle"): 1}  # after the last step
    if stage > 0:
        heard["division", "_learn_order"] = 1  # after the first backward
    # Losses and counts: two tensors of a copy; of the first step, and of the intervals that one
    # more step has followed.
    written = {("readout", "_finish"): 2 * (1 + STEPS // EVERY - 1)}
    assert main == heard | written
    assert other == heard
