"""Who reads numbers from the device during steps: we once an interval, DeepSpeed every step."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

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
    return counter.reads


# What DeepSpeed 0.19.8 itself reads at every step, on any rank, with the number of times; stage 3
# reads more at its first two steps, while it agrees with the other ranks on the order of modules.
DEEPSPEED = {
    0: {},  # the light engine stands in for it
    1: {("utils", "is_invalid_grad_norm"): 1, ("utils", "clip_tensors_by_global_norm"): 1},
    2: {("stage_1_and_2", "has_overflow"): 1},  # and is_invalid_grad_norm, once a group and once
    3: {},  # nor does the lean step ask
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_we_read_once_an_interval(tmp_path, stage, optimizer):
    main, other = run_ranks(reads_of_steps, 2, tmp_path, stage, optimizer)
    ours = {"readout", "metrics", "loop", "engine", "optim", "adamw", "muon", "exchange"}
    ours |= {"checkpoint", "light", "gradient_sums", "lean_step", "clipping"}
    if stage == 3:
        assert ("utils", "is_invalid_grad_norm") not in main
    for who, times in DEEPSPEED[stage].items():
        assert main[who] == times * STEPS, who
    # Losses and counts: two tensors of a copy; of the first step, and of the intervals that one
    # more step has followed.
    assert {who: n for who, n in main.items() if who[0] in ours} == {
        ("readout", "_finish"): 2 * (1 + STEPS // EVERY - 1)
    }
    assert not [who for who in other if who[0] in ours]
    # On every rank, of what has already arrived in the host's memory: whether the step before was
    # taken, and whether a rank was asked to stop.
    for reads in (main, other):
        assert reads["oversight", "hear"] == STEPS
        assert reads["oversight", "settle"] == 1  # after the last step
