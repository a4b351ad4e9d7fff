"""One step of the real loop on some ranks, however weights, rows and states are divided."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

LR, BETAS, EPS, DECAY, MAX_NORM = 1e-2, (0.9, 0.95), 1e-3, 0.1, 0.5
MOE = {"aux_loss": 0.2, "z_loss": 0.05, "aux_over": "document"}  # of models with experts
BIAS_RATE = 0.01  # of those whose experts have biases
SETTINGS = [
    "run.steps=1",
    *(f"optim.lr={LR}", f"optim.beta1={BETAS[0]}", f"optim.beta2={BETAS[1]}"),
    f"optim.eps={EPS}",  # far from a sign: an error of a gradient stays one of an update
    *(f"optim.weight_decay={DECAY}", f"optim.max_grad_norm={MAX_NORM}"),
    "schedule.kind=constant",  # any other has come to its end after one step: a rate of 0
    *("engine.zero.persistence_threshold=0", "engine.zero.bucket_size=5000"),
    *("model.init=random", "model.seed=3", "model.compile=none"),
    *("data.seq_len=128", "data.shards=[none]"),
]


def leave(model: Any) -> None:
    """Change nothing."""


class Run(NamedTuple):
    """A step: its settings, the numbers of its rows, and what is done to the model before."""

    words: list[str]
    numbers: Sequence[int] | None = None  # in their order, as many as ranks need; None = from 0 on
    change: Callable[[Any], None] = leave


class Part(NamedTuple):
    """What a rank holds of a parameter: the whole, or the rank-th of size along dim."""

    tensor: torch.Tensor
    dim: int | None
    rank: int
    size: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The same part of another tensor."""
        return whole if self.dim is None else whole.chunk(self.size, self.dim)[self.rank]


class Step(NamedTuple):
    """Its line of metrics.jsonl, norm and gradients before clipping, masters after the update."""

    line: dict[str, float]
    norm: float  # as this rank clipped by it
    gradients: dict[str, Part]
    masters: dict[str, Part]  # and biases that choose experts


def on_a_rank(folder: Path, out: Path, runs: Sequence[list[str] | Run]) -> list[Step]:
    """A step of the model in `folder` for each run; run folders are made in `out`."""
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    runtime = launch(RunConfig(device="cpu"))
    return [one_step(folder, runtime, out / str(i), run) for i, run in enumerate(runs)]


def one_step(folder: Path, runtime: Any, run_dir: Path, run: list[str] | Run) -> Step:
    """The last step of a run, by default its only one."""
    return steps(folder, runtime, run_dir, run)[-1]


def steps(folder: Path, runtime: Any, run_dir: Path, run: list[str] | Run) -> list[Step]:
    """All steps of a run, with the masters of its end."""
    import torch.distributed as dist

    from tests.stages.rows import has_biases, has_experts, rows_of, tilt
    from tests.tiny import sft_stage, whole_gradients, whole_masters
    from triptych_core.config import load_config
    from triptych_core.engine.build import (
        build_engine,
        compute_dtype,
        gather_parameters,
        read_parameters,
        sharded_init,
    )
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_core.parallel.expert import make_expert_place
    from triptych_core.parallel.mesh import make_mesh
    from triptych_core.parallel.tensor import TensorCuts
    from triptych_models.expert_weights import router_biases
    from triptych_models.experts import ExpertGroup
    from triptych_models.families import build_model
    from triptych_models.freeze import parameter_parts
    from triptych_models.lora import add_adapters
    from triptych_models.masked_diffusion.noise import MaskRow
    from triptych_models.matrices import matrix_shapes
    from triptych_models.sequence import SequenceGroup
    from triptych_models.tensor import tensor_cuts

    words, numbers, change = run if isinstance(run, Run) else Run(run)
    mixture = [f"model.moe.{key}={value}" for key, value in MOE.items()]
    mixture += [f"model.moe.bias_rate={BIAS_RATE}"] * has_biases(folder)
    words = [*SETTINGS, *(mixture if has_experts(folder) else ()), *words]
    given = [f"run.dir={run_dir}", f"model.path={folder}", *words]
    config = load_config(sft_stage().SftConfig, None, given)
    mesh = make_mesh(config.parallel, runtime)
    place = make_expert_place(config.parallel, runtime)
    group = SequenceGroup(mesh.sp_group, mesh.sp_size, mesh.sp_rank)
    if runtime.is_main:
        run_dir.mkdir(parents=True)
    with sharded_init(config.engine, runtime.world_size, tensor_size=mesh.tp_size):
        model = build_model(
            config.model,
            dtype=compute_dtype(config.engine),
            gather=gather_parameters(config.engine),
            sequence=group,
            experts=ExpertGroup(place.group, place.size, place.rank, place.mark),
        )
    if config.model.lora is not None:
        add_adapters(model, config.model.lora, config.model.seed, read_parameters(config.engine))
    change(tilt(model))
    model.set_checkpointing(config.engine.checkpointing)
    model.set_mlp_chunks(config.engine.mlp_chunks)
    part_of = parameter_parts(model).__getitem__
    groups = parameter_groups(model.named_parameters(), config.optim, part_of, matrix_shapes(model))
    tensor = TensorCuts()
    if mesh.tp_size > 1:
        tensor = TensorCuts(mesh.tp_size, tensor_cuts(model, mesh.tp_size, mesh.sp_size))
    engine = build_engine(
        model,
        build_optimizer(groups, config.optim),
        config.engine,
        config.optim,
        runtime.world_size,
        model.layers(),
        tensor,
    )

    def part(name: str, x: torch.Tensor) -> Part:
        dim = {"outputs": 0, "inputs": 1}.get((tensor.cuts or {}).get(name, ""))
        return Part(x.detach().float().clone(), dim, mesh.tp_rank, mesh.tp_size)

    gradients: list[dict[str, Part]] = []
    norms: list[float] = []
    take_step = engine.step

    def look_then_step() -> None:
        is_last = engine.is_gradient_accumulation_boundary()
        if is_last:
            gradients.append({n: part(n, x) for n, x in whole_gradients(engine).items()})
        take_step()
        if is_last:
            norms.append(float(engine.get_global_grad_norm()))

    engine.step = look_then_step
    count = mesh.dp_size * config.engine.gradient_accumulation_steps * config.run.steps
    chosen = rows_of(folder) if numbers is None else [rows_of(folder)[n] for n in numbers]
    assert len(chosen) >= count, f"{count} rows are needed"
    if diffusion := config.model.diffusion:
        chosen = [MaskRow(diffusion, model.mask_token_id, 0)(row, 0) for row in chosen]
    mine = chosen[:count][mesh.dp_rank :: mesh.dp_size]
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
    with Metrics(config, **ranks) as metrics:
        train(
            engine,
            iter(mine),
            config,
            flops=model.flops,
            metrics=metrics,
            part=model.take_part,
            after_update=model.after_update,
        )
    masters = whole_masters(engine) | router_biases(model)
    ends = {name: part(name, x) for name, x in masters.items()}
    engine.destroy()
    dist.barrier()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return [Step(*each, ends) for each in zip(lines, norms, gradients, strict=True)]


FIGURES = ("loss", "grad_norm", "num_targets", "num_tokens", "flops", "packing_fill")
ROUTERS = ("balance_loss", "z_loss", "expert_load", "expert_load_images")


def compare(
    found: Step,
    wanted: Step,
    where: str,
    tolerance: float = 1e-5,
    of_masters: float | None = None,
) -> None:
    """Figures, gradients and masters of a rank against those of a rank that has all.

    Masters by a tolerance of their own, if there is one.
    """
    assert not [name for name in ROUTERS if (name in found.line) != (name in wanted.line)], where
    for name in (*FIGURES, *(name for name in ROUTERS if name in wanted.line)):
        ours, theirs = (torch.tensor(step.line[name]).double() for step in (found, wanted))
        error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
        assert error <= tolerance, f"{where}: {name} {ours} is not {theirs}"
    logged = found.line["grad_norm"]
    assert abs(found.norm - logged) <= 1e-6 * logged, f"{where}: {found.norm} is not {logged}"
    # A weight's gradient may be tiny beside the rest: relative to itself, or to a ten-thousandth
    # of the whole. A master is not.
    total = wanted.line["grad_norm"]
    of_masters = tolerance if of_masters is None else of_masters
    checks = (("gradients", 1e-4 * total, tolerance), ("masters", 1e-3, of_masters))
    for kind, least, most in checks:
        ours, theirs = getattr(found, kind), getattr(wanted, kind)
        assert ours.keys() == theirs.keys(), where
        for name, part in ours.items():
            right = part.of(theirs[name].tensor)
            assert part.tensor.shape == right.shape, f"{where}: {name}"
            error = (part.tensor - right).norm() / max(right.norm().item(), least, 1e-30)
            assert error <= most, f"{where}: {kind} of {name} off by {error:.1e}"
