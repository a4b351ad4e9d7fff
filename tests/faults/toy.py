"""A small run on real ranks, as a stage wires it, in which a rank may be sabotaged.

Its model draws noise, so that a run that goes on with other generators ends otherwise; its ledger
tells which samples it took.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.ranks import _free_port

# All that a rank imports on its way, seconds of it, is imported once, before any is forked.
for module in (
    *("deepspeed", "deepspeed.runtime.zero.muon.original_muon", "torch._inductor.compile_fx"),
    *("triptych_core.loop", "triptych_core.checkpoint.saver", "triptych_core.optim.groups"),
    *("triptych_data.plan.ledger", "triptych_models.matrices"),
):
    importlib.import_module(module)

PACKS = 4  # of a step, over all ranks
NOISE = 0.1
Sabotage = Callable[[int], None]  # of a rank, before it begins


class Place(NamedTuple):
    """Where a pack lies in the order of all."""

    position: int
    end: int
    epoch: int
    next_position: int


class Noisy(nn.Module):
    """Just enough for the loop."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.layer = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 8)
        self.noise = noise

    def forward(self, input_ids: Tensor, num_targets: int, factor: float = 1.0) -> Any:
        from triptych_models.output import LossOutput

        hidden = self.layer(self.embedding(input_ids))  # (1, T, 4)
        hidden = hidden + self.noise * torch.rand_like(hidden) if self.noise else hidden
        logits = self.lm_head(hidden)[0].float()  # (T, 8)
        loss = nn.functional.cross_entropy(logits, input_ids[0], reduction="sum")
        return LossOutput(loss * factor, num_targets, {})


class Packs:
    """Packs in order over any number of ranks, with one position for all of them."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size, self._position = rank, world_size, 0

    def __iter__(self) -> Packs:
        return self

    def __next__(self) -> dict[str, Any]:
        number = self._position + self._rank
        self._position += self._world_size
        generator = torch.Generator().manual_seed(number)
        return {
            "input_ids": torch.randint(0, 8, (1, 8), generator=generator),
            "num_targets": 8,
            "num_tokens": 8,
            "sample_keys": [f"sample-{number}"],
            "sample_ids": [number],
            "holes": [],
            "place": Place(number, number + 1, 0, self._position),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = state["position"]


def train_toy(run_dir: Path, steps: int, *words: str, noise: float = NOISE) -> None:
    """Train on this rank until so many steps are taken, from the newest checkpoint if any."""
    import torch.distributed as dist

    from triptych_core.checkpoint.saver import Saver, resume
    from triptych_core.config import StageConfig, load_config
    from triptych_core.faults.oversight import Oversight
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_data.plan.ledger import Ledger

    ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    config = load_config(
        StageConfig,
        None,
        [
            *(f"run.dir={run_dir}", f"run.steps={steps}", "run.device=cpu", "log.every=1"),
            *("log.progress=false", "schedule.kind=constant", "optim.lr=1e-2"),
            *("engine.zero.stage=2", "engine.precision=fp32", "checkpoint.every=2"),
            f"engine.gradient_accumulation_steps={PACKS // ranks['world_size']}",
            *("optim.ema_decay=0.5", *words),
        ],
    )
    if ranks["rank"] == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine, stream = build_toy(config, noise), Packs(**ranks)
    resumed = resume(engine, config, stream)
    with Metrics(config, **ranks, start_step=resumed.step) as metrics:
        oversight = Oversight(engine, config, metrics.note, resumed)
        ledger = Ledger(run_dir / "ledger", start_step=resumed.step, **ranks)
        train(
            engine,
            ledger.watch(stream),
            config,
            flops=lambda batch: 1.0,
            metrics=metrics,
            start_step=resumed.step,
            on_step=[ledger.write, Saver(engine, config, stream, metrics, oversight)],
            oversight=oversight,
        )
    engine.destroy()
    dist.barrier()


def build_toy(config: Any, noise: float) -> Any:
    """Its engine."""
    import torch.distributed as dist

    from triptych_core.engine.build import build_engine, compute_dtype, sharded_init
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_models.matrices import matrix_shapes

    torch.manual_seed(0)
    with sharded_init(config.engine, dist.get_world_size()):
        model = Noisy(noise).to(compute_dtype(config.engine))
    torch.manual_seed(dist.get_rank())
    matrices = matrix_shapes(model)
    groups = parameter_groups(model.named_parameters(), config.optim, lambda _: "all", matrices)
    optimizer = build_optimizer(groups, config.optim)
    return build_engine(model, optimizer, config.engine, config.optim, dist.get_world_size())


def on_ranks(
    work: Callable[[], None],
    said: Path,
    world_size: int = 2,
    sabotage: Sabotage | None = None,
    timeout: float = 900,
    patience: float = 1.0,
    ends: list[float] | None = None,
) -> list[int]:
    """Do it on ranks that may die; returns their exit codes, negative of signals.

    Once one has died the others get `patience` seconds: time to do harm, if they would. What they
    say is added to a file; when they ended, to `ends`.
    """
    port = _free_port()
    children = [
        _fork_rank(work, said, rank, world_size, port, sabotage) for rank in range(world_size)
    ]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < world_size:
        for child in children:
            if child in codes:
                continue
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                if ends is not None:
                    ends.append(time.monotonic())
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + patience)
        if time.monotonic() > deadline:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)
    return [codes[child] for child in children]


def _fork_rank(
    work: Callable[[], None],
    said: Path,
    rank: int,
    world_size: int,
    port: int,
    sabotage: Sabotage | None,
) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        be_a_rank(said, rank, world_size, port)
        from triptych_core.config import RunConfig
        from triptych_core.launch import launch

        launch(RunConfig(device="cpu"))
        if sabotage is not None:
            sabotage(rank)
        work()
        code = 0
    except ValueError as error:  # as `run_main` shows it
        os.write(2, f"error: {error}\n".encode())
        code = 2
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        sys.stdout.flush()
        os._exit(code)


def be_a_rank(said: Path, rank: int, world_size: int, port: int) -> None:
    """What a launcher sets, and where a forked process says what it says."""
    said.parent.mkdir(parents=True, exist_ok=True)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }


def lost_and_repeated(run_dir: Path) -> tuple[int, int]:
    """Samples, by the ledgers of a run."""
    from triptych_data.plan.ledger import audit

    found = audit(run_dir / "ledger")
    text = "\n".join(found.problems)
    lost = sum(int(number) for number in re.findall(r"(\d+) samples were lost", text))
    repeated = sum(int(number) for number in re.findall(r"(\d+) samples were taken again", text))
    return lost + text.count("got no line"), repeated


def differs(run_dir: Path, wanted: Path, step: int) -> bool:
    """Whether the checkpoint of a step has other bytes than that of an undisturbed run."""
    from triptych_core.checkpoint.manifest import find_damage, read_manifest

    name = f"checkpoints/step-{step:06d}"
    if not (run_dir / name).is_dir() or find_damage(run_dir / name):
        return True
    ours, theirs = read_manifest(run_dir / name), read_manifest(wanted / name)
    return any(
        ours.get(file) != theirs.get(file)
        for file in ours | theirs
        if file.startswith(("rank", "random"))
    )
