"""A step that is no number, or a spike, costs that one update, on every rank, and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.test_steady_step import Model
from tests.ranks import run_ranks
from triptych_core.faults.loss_window import LossWindow

STEPS = 20
BAD = {3: math.nan, 9: math.inf, 14: 1e3}  # step -> factor on a loss; 14 is a spike
LAYOUTS = [
    (0, "fp32", "adamw", 1, ()),
    (0, "bf16", "muon", 2, ()),
    (0, "bf16", "adamw", 2, ("optim.state_dtype=bf16", "optim.ema_decay=0.9")),
    (1, "fp32", "muon", 1, ()),
    (1, "bf16", "adamw", 2, ()),
    (2, "fp32", "adamw", 2, ()),
    (2, "bf16", "muon", 1, ()),
    (2, "bf16", "adamw", 1, ("engine.zero.offload_optimizer=true",)),
    (3, "fp32", "adamw", 2, ()),
    (3, "bf16", "muon", 1, ()),
    (3, "fp32", "adamw", 1, ("engine.zero.offload_optimizer=true",)),
]


def batches(steps: Sequence[int], rank: int, accumulation: int) -> list[dict[str, Any]]:
    """Of these steps; the last micro-step of rank 1 is what is bad about a bad one."""
    found = []
    for step in steps:
        for micro in range(accumulation):
            seed = 100 * step + 10 * rank + micro
            ids = torch.randint(0, 8, (1, 8), generator=torch.Generator().manual_seed(seed))
            spoils = rank == 1 and micro == accumulation - 1
            found.append(
                {
                    "input_ids": ids,
                    "num_targets": 8,
                    "num_tokens": 8,
                    "factor": BAD.get(step, 1.0) if spoils else 1.0,
                    "sample_keys": [f"{step}-{rank}-{micro}"],
                }
            )
    return found


def train_on(
    run_dir: Path, layout: tuple[Any, ...], steps: Sequence[int], *more: str, cut: int = 0
) -> dict[str, Tensor]:
    """Whole masters, moments and counts after these steps; `cut`: go on in a new engine there."""
    import torch.distributed as dist

    from triptych_core.config import StageConfig, load_config
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics

    stage, precision, optimizer, accumulation, words = layout
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        run_dir.mkdir(parents=True)
    dist.barrier()
    config = load_config(
        StageConfig,
        None,
        [
            *(f"run.dir={run_dir}", f"run.steps={cut or len(steps)}", "run.device=cpu"),
            *("log.every=5", "schedule.kind=constant", "optim.lr=1e-2", "optim.weight_decay=0.1"),
            *(f"engine.zero.stage={stage}", f"engine.precision={precision}"),
            *(f"optim.name={optimizer}", f"engine.gradient_accumulation_steps={accumulation}"),
            *("loss_guard.window=8", "loss_guard.min_steps=4", *words, *more),
        ],
    )
    ranks = {"rank": rank, "world_size": world_size}
    stream = Stream(batches(steps, rank, accumulation))
    engine = build(config)
    with Metrics(config, **ranks) as metrics:
        run = Run(engine, config, stream, metrics)
        train(engine, stream, config, flops=lambda _: 1.0, metrics=metrics, **run.options())
    if cut:
        engine.destroy()
        config.run.steps = len(steps)
        stream, engine = Stream(batches(steps, rank, accumulation)), build(config)
        with Metrics(config, **ranks, start_step=cut) as metrics:
            run = Run(engine, config, stream, metrics)
            train(engine, stream, config, flops=lambda _: 1.0, metrics=metrics, **run.options())
    return state_of(engine)


class Stream:
    """Batches, and where in them it is."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self._items, self._position = items, 0

    def __next__(self) -> dict[str, Any]:
        self._position += 1
        return self._items[self._position - 1]

    def __iter__(self) -> Stream:
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = state["position"]


class Run:
    """A run as a stage wires it, resumed if there is something to go on from."""

    def __init__(self, engine: Any, config: Any, stream: Stream, metrics: Any) -> None:
        from triptych_core.checkpoint.saver import Saver, resume
        from triptych_core.faults.oversight import Oversight

        resumed = resume(engine, config, stream)
        self._start = resumed.step
        self._oversight = Oversight(engine, config, metrics.note, resumed)
        self._save = Saver(engine, config, stream, metrics, self._oversight)

    def options(self) -> dict[str, Any]:
        return {
            "start_step": self._start,
            "oversight": self._oversight,
            "on_step": [self._save],
        }


def build(config: Any) -> Any:
    import torch.distributed as dist

    from triptych_core.engine.build import build_engine, compute_dtype, sharded_init
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_models.matrices import matrix_shapes

    torch.manual_seed(0)
    with sharded_init(config.engine, dist.get_world_size()):
        model = Model().to(compute_dtype(config.engine))
    matrices = matrix_shapes(model)
    groups = parameter_groups(model.named_parameters(), config.optim, lambda _: "all", matrices)
    optimizer = build_optimizer(groups, config.optim)
    return build_engine(model, optimizer, config.engine, config.optim, dist.get_world_size())


def state_of(engine: Any) -> dict[str, Tensor]:
    """Everything a checkpoint would hold of this rank, copied."""
    from triptych_core.checkpoint.fragments import fragments

    found = {}
    for fragment in fragments(engine):
        for stretch in fragment.stretches():
            found[stretch.key] = stretch.tensor.clone()
        for key, value in fragment.scalars().items():
            found[f"{fragment.name} {key}"] = torch.tensor(value)
    return found


def on_a_rank(path: Path) -> list[list[str]]:
    """What differs, of each layout, from a run that never saw the bad batches."""
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    launch(RunConfig(device="cpu"))
    good = [step for step in range(1, STEPS + 1) if step not in BAD]
    unlike = []
    for number, layout in enumerate(LAYOUTS):
        every = range(1, STEPS + 1)
        wanted = train_on(path / f"{number}-good", layout, good)
        # Cut right after a bad step: what is known of it is in the checkpoint.
        for name, cut in (("cut", 9),) if number % 2 else (("bad", 0),):
            found = train_on(path / f"{number}-{name}", layout, every, cut=cut)
            assert found.keys() == wanted.keys()
            unlike.append([f"{layout} {name} {k}" for k in wanted if not wanted[k].equal(found[k])])
    return unlike


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, list[list[list[str]]]]:
    path = tmp_path_factory.mktemp("guard")
    return path, run_ranks(on_a_rank, 2, path)


def test_a_bad_step_leaves_no_trace_in_weights_states_and_counts(ran):
    for unlike in ran[1]:
        assert unlike == [[]] * len(LAYOUTS)


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_what_was_left_out_is_on_record(ran, number):
    run_dir = ran[0] / f"{number}-{'cut' if number % 2 else 'bad'}"
    lines = [json.loads(line) for line in (run_dir / "skipped.jsonl").open()]
    assert [line["step"] for line in lines] == list(BAD)
    whys = [line["why"] for line in lines]
    assert "is nan" in whys[0] or "is inf" in whys[0]  # DeepSpeed calls every norm inf
    assert "is inf" in whys[1] or "is nan" in whys[1]
    assert "where the window allows" in whys[2]
    for line in lines:
        keys = [key for pack in line["packs"] for key in pack["keys"]]
        micros = range(LAYOUTS[number][3])
        assert keys == [f"{line['step']}-{rank}-{m}" for rank in (0, 1) for m in micros]
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()]
    assert steps == list(range(1, STEPS + 1))


def endings(path: Path) -> list[str]:
    from triptych_core.config import RunConfig
    from triptych_core.faults.codes import DIVERGED, EndsRun
    from triptych_core.launch import launch

    launch(RunConfig(device="cpu"))
    said = []
    for name, words, steps in (
        ("row", ["loss_guard.max_in_a_row=3"], [1, 9, 2, 9, 9, 9, 4]),
        ("stop", ["loss_guard.mode=stop"], [1, 2, 3, 4]),
        ("last", ["loss_guard.mode=stop", "checkpoint.save=false"], [1, 2, 3]),
    ):
        with pytest.raises(EndsRun) as caught:
            train_on(path / name, LAYOUTS[0], steps, *words)
        assert caught.value.code == DIVERGED
        said.append(str(caught.value))
    train_on(path / "off", LAYOUTS[0], [1, 3, 2], "loss_guard.mode=off")
    return said


def test_the_run_ends_after_too_many_in_a_row_or_at_once(tmp_path):
    for row, stop, last in run_ranks(endings, 2, tmp_path):
        assert "in 3 steps, got none up to step 6, the last because its loss is" in row
        assert "in 1 step, got none up to step 3, the last because its loss is nan" in stop
        assert "up to step 3" in last
    assert not (tmp_path / "off/skipped.jsonl").exists()


def test_a_window_is_robust_and_survives_saving():
    window = LossWindow(16, sigma=6.0, min_steps=8, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    yes, no = torch.tensor(True), torch.tensor(False)
    for step in range(40):
        assert window.limits().isinf().all() == (step < 8)
        pair = 2.0 + 0.1 * torch.randn(2, generator=generator)
        assert (pair <= window.limits()).all()
        window.add(pair, yes)
        window.add(torch.tensor([math.nan, 1e9]), no)
    before = window.limits()
    assert ((before > 2.1) & (before < 3.5)).all()
    window.add(torch.tensor([500.0, 500.0]), yes)  # had it been taken: a mean would be 33
    assert (window.limits() < 3.6).all()

    state = json.loads(json.dumps(window.state_dict()))
    again = LossWindow(16, sigma=6.0, min_steps=8, device=torch.device("cpu"))
    again.load_state_dict(state)
    for _ in range(20):  # oldest go first in both
        assert again.limits().equal(window.limits())
        pair = torch.randn(2, generator=generator)
        window.add(pair, yes)
        again.add(pair, yes)
    smaller = LossWindow(8, sigma=6.0, min_steps=8, device=torch.device("cpu"))
    smaller.load_state_dict(state)
    assert smaller.state_dict()["losses"] == state["losses"][-8:]


def test_a_run_in_which_nothing_varies_has_no_spikes_from_rounding():
    window = LossWindow(8, sigma=6.0, min_steps=4, device=torch.device("cpu"))
    for _ in range(8):
        window.add(torch.ones(2), torch.tensor(True))
    assert window.limits().tolist() == pytest.approx([1.3, 1.3])
