"""A run goes on under another ZeRO stage and on another number of ranks, from the same files."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.stages.test_muon import Toy, config_of, packs, part
from tests.tiny import trained, whole_masters, whole_states

SAVED, STEPS, PACKS = 2, 3, 2  # packs of a step, on one rank or two
STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer")
KINDS = [("adamw", "fp32"), ("adamw", "bf16"), ("muon", "fp32"), ("muon", "bf16")]
LAYOUTS = [(stage, ranks) for stage in (0, 1, 2, 3) for ranks in (1, 2)]
# Where a layout's checkpoint goes on: every layout is left and entered twice, by other kinds.
MOVES = [
    (kind, LAYOUTS[number], LAYOUTS[(number + jump) % len(LAYOUTS)])
    for kind, first, jump in zip(KINDS, (0, 1, 1, 0), (3, 5, 2, 7), strict=True)
    for number in range(first, len(LAYOUTS), 2)
]


class Partly(Toy):
    """With a frozen layer, a persistent buffer, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.tall.requires_grad_(False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)  # not saved

    def forward(self, **batch: Any) -> Any:
        self.seen += 1
        return super().forward(**batch)


class Stream:
    """Packs in order over any number of ranks, with one position for all of them."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size, self._position = rank, world_size, 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> dict[str, Any]:
        self._position += self._world_size
        return packs()[self._position - self._world_size + self._rank]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = state["position"]


def config_for(run_dir: Path, kind: tuple[str, str], layout: tuple[int, int], *more: str) -> Any:
    (optimizer, precision), (stage, ranks) = kind, layout
    return config_of(
        run_dir,
        f"run.steps={STEPS}",
        f"optim.name={optimizer}",
        f"engine.precision={precision}",
        f"optim.state_dtype={'bf16' if kind == ('adamw', 'bf16') else 'fp32'}",
        f"engine.zero.stage={stage}",
        f"engine.gradient_accumulation_steps={PACKS // ranks}",
        f"checkpoint.every={SAVED}",
        "schedule.kind=constant",
        "schedule.warmup_steps=0",
        "engine.zero.persistence_threshold=40",
        "optim.ema_decay=0.5",
        *more,
    )


def build(config: Any, seed: int) -> Any:
    """Engine and model, with the weights of a seed."""
    import torch.distributed as dist

    from triptych_core.engine.build import (
        build_engine,
        compute_dtype,
        gather_parameters,
        read_parameters,
        sharded_init,
    )
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_models.matrices import matrix_shapes

    world_size = dist.get_world_size()
    with sharded_init(config.engine, world_size):
        model = Partly().to(compute_dtype(config.engine))
    model.fill(gather_parameters(config.engine))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        with gather_parameters(config.engine)([parameter]):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * seed)
    groups = parameter_groups(model.named_parameters(), config.optim, part, matrix_shapes(model))
    optimizer = build_optimizer(groups, config.optim)
    engine = build_engine(model, optimizer, config.engine, config.optim, world_size)
    engine.gather = read_parameters(config.engine)
    return engine


def held(engine: Any) -> dict[str, Tensor]:
    """Masters, states and weights, whole."""
    found = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        with engine.gather([parameter]):
            found[f"{name} weight"] = parameter.detach().clone()
    found |= {f"{name} master": master for name, master in whole_masters(engine).items()}
    for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "average"):
        states = whole_states(engine, key)
        found |= {f"{name} {key}": state.float() for name, state in states.items()}
    expected = {f"{name} average" for name, _ in trained(engine)}
    assert expected <= found.keys()
    return found


def counts(engine: Any) -> set[float]:
    """Adam's steps, of all masters it has seen."""
    return {float(state["step"]) for state in engine.optimizer.state.values() if "step" in state}


def go_on(engine: Any, config: Any, stream: Stream, start: int) -> list[float]:
    """Train to the end with checkpoints; the losses on record."""
    import torch.distributed as dist

    from triptych_core.checkpoint.saver import Saver
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics

    ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    with Metrics(config, start_step=start, **ranks) as metrics:
        train(
            engine,
            stream,
            config,
            flops=lambda batch: 0.0,
            metrics=metrics,
            start_step=start,
            on_step=[Saver(engine, config, stream, metrics), Watch(engine)],
        )
    dist.barrier()
    return [json.loads(line)["loss"] for line in (config.run.dir / "metrics.jsonl").open()]


class Watch:
    """What was held when the first checkpoint was written."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        engine.at_save = None

    def __call__(self, step: int) -> None:
        if step == SAVED:
            self._engine.at_save = held(self._engine)


def join() -> tuple[int, int]:
    import torch.distributed as dist

    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    launch(RunConfig(device="cpu"))
    return dist.get_rank(), dist.get_world_size()


def folder(path: Path, kind: tuple[str, str], layout: tuple[int, int]) -> Path:
    return path / "-".join(str(word) for word in (*kind, *layout))


def first_runs(path: Path, moves: list[Any]) -> dict[Any, Any]:
    """Whole runs where moves begin: losses, and what was held at the checkpoint."""
    rank, world_size = join()
    results = {}
    for kind, layout, _ in moves:
        config = config_for(folder(path, kind, layout), kind, layout)
        config.run.dir.mkdir(exist_ok=True)
        engine = build(config, seed=0)
        losses = go_on(engine, config, Stream(rank, world_size), 0)
        results[kind, layout] = losses, engine.at_save
        engine.destroy()
    return results


def second_runs(path: Path, moves: list[Any]) -> dict[Any, Any]:
    """Go on from other layouts' checkpoints: what is held before the next step, and losses."""
    import torch.distributed as dist

    from triptych_core.checkpoint.load import load_checkpoint
    from triptych_core.checkpoint.saver import resume

    rank, world_size = join()
    results = {}
    for kind, source, target in moves:
        run_dir = folder(path, kind, source).with_suffix(".moved")
        config = config_for(run_dir, kind, target)
        if rank == 0:
            shutil.copytree(folder(path, kind, source), run_dir)
            shutil.rmtree(run_dir / f"checkpoints/step-{STEPS:06d}")
        dist.barrier()
        engine = build(config, seed=1)
        stream = Stream(rank, world_size)
        assert resume(engine, config, stream).step == SAVED
        now = held(engine), counts(engine)
        losses = go_on(engine, config, stream, SAVED)
        # Once more, into an engine that has taken steps.
        load_checkpoint(engine, config, run_dir / f"checkpoints/step-{SAVED:06d}")
        results[kind, source, target] = losses, now, (held(engine), counts(engine))
        engine.destroy()
    return results


@pytest.fixture(scope="module")
def firsts(tmp_path_factory) -> tuple[Path, dict[Any, Any]]:
    path, found = tmp_path_factory.mktemp("moves"), {}
    for ranks in (1, 2):
        moves = [move for move in MOVES if move[1][1] == ranks]
        found |= run_ranks(first_runs, ranks, path, moves)[0]
    return path, found


def test_a_run_goes_on_in_another_layout(firsts):
    path, found = firsts
    for ranks in (1, 2):
        moves = [move for move in MOVES if move[2][1] == ranks]
        for results in run_ranks(second_runs, ranks, path, moves):
            for (kind, source, target), (losses, *loaded) in results.items():
                where = f"{kind} {source} -> {target}"
                wanted_losses, wanted = found[kind, source]
                for now, steps in loaded:
                    assert steps == {SAVED}, where
                    assert now.keys() == wanted.keys()
                    for name, tensor in wanted.items():
                        assert now[name].dtype == tensor.dtype, f"{where}: {name}"
                        assert torch.equal(now[name], tensor), f"{where}: {name}"
                noise = 1e-5 if kind[1] == "fp32" else 5e-3
                assert losses == pytest.approx(wanted_losses, rel=noise), where


def test_the_newest_whole_checkpoint_is_taken_and_the_damage_named(firsts, capfd):
    path, found = firsts
    kind, source, _ = next(move for move in MOVES if move[1] == (2, 2))
    run_dir = folder(path, kind, source).with_suffix(".damaged")
    shutil.copytree(folder(path, kind, source), run_dir)
    damaged = run_dir / f"checkpoints/step-{STEPS:06d}/rank-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    capfd.readouterr()
    for losses in run_ranks(resumed, 2, kind, source, run_dir):
        assert losses == found[kind, source][0]
    said = capfd.readouterr().out
    assert said.count(f"{damaged}: is damaged") == 1
    assert f"goes on from {damaged.parent.parent / f'step-{SAVED:06d}'}, the newest" in said
    for manifest in (run_dir / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(RuntimeError, match=r"run\.dir: must have a whole checkpoint to go on from"):
        run_ranks(look_for_whole, 1, run_dir)


def look_for_whole(run_dir: Path) -> None:
    from triptych_core.checkpoint.folders import checkpoints
    from triptych_core.checkpoint.load import newest_whole

    join()
    newest_whole(checkpoints(run_dir))


def resumed(kind: tuple[str, str], layout: tuple[int, int], run_dir: Path) -> list[float]:
    from triptych_core.checkpoint.saver import resume

    config = config_for(run_dir, kind, layout)
    stream = Stream(*join())
    engine = build(config, seed=1)
    start = resume(engine, config, stream).step
    return go_on(engine, config, stream, start)


def test_what_fails_in_the_background_ends_all_ranks_at_the_next_save(firsts):
    path, _ = firsts
    for error in run_ranks(cannot_write, 2, path / "full"):
        assert re.match(r"rank 1: \S+/rank-00001\.safetensors: must .* File too large; ", error)
    assert not list((path / "full/checkpoints").glob("step-*"))


def cannot_write(run_dir: Path) -> str:
    """Train where one rank's files may have 100 bytes; the error of the last step."""
    rank, world_size = join()
    config = config_for(run_dir, ("adamw", "fp32"), (2, 2))
    config.run.dir.mkdir(exist_ok=True)
    engine = build(config, seed=0)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    with pytest.raises(ValueError) as caught:
        go_on(engine, config, Stream(rank, world_size), 0)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) >= SAVED  # training had gone on
    return str(caught.value)


def test_a_rank_may_hold_nothing_but_padding(firsts):
    """On five ranks the last has no element of vectors of 12."""
    path, found = firsts
    kind, source, _ = next(move for move in MOVES if move[1] == (2, 2))
    for now in run_ranks(loaded, 5, kind, folder(path, kind, source)):
        wanted = found[kind, source][1]
        assert now.keys() == wanted.keys()
        assert all(torch.equal(now[name], tensor) for name, tensor in wanted.items())


def loaded(kind: tuple[str, str], run_dir: Path) -> dict[str, Tensor]:
    from triptych_core.checkpoint.load import load_checkpoint

    config = config_for(run_dir, kind, (3, 1))
    join()
    engine = build(config, seed=1)
    load_checkpoint(engine, config, run_dir / f"checkpoints/step-{SAVED:06d}")
    return held(engine)
