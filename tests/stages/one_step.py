"""One step of the real loop on some ranks, however weights, rows and states are divided."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch


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
    """Its line of metrics.jsonl, gradients before clipping, masters after the update."""

    line: dict[str, float]
    gradients: dict[str, Part]
    masters: dict[str, Part]


def on_a_rank(folder: Path, out: Path, runs: list[list[str]]) -> list[Step]:
    """A step of the model in `folder` for each configuration; run folders are made in `out`."""
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    runtime = launch(RunConfig(device="cpu"))
    return [one_step(folder, runtime, out / str(i), words) for i, words in enumerate(runs)]


def one_step(folder: Path, runtime: Any, run_dir: Path, words: list[str]) -> Step:
    import torch.distributed as dist

    from tests.stages.test_sequence import family_of, rows
    from tests.tiny import sft_stage, whole_gradients, whole_masters
    from triptych_core.config import load_config
    from triptych_core.engine.build import (
        build_engine,
        compute_dtype,
        gather_parameters,
        sharded_init,
    )
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_core.parallel.expert import make_expert_place
    from triptych_core.parallel.mesh import make_mesh
    from triptych_core.parallel.tensor import TensorCuts
    from triptych_models.experts import ExpertGroup
    from triptych_models.families import build_model
    from triptych_models.freeze import parameter_parts
    from triptych_models.lora import add_adapters
    from triptych_models.matrices import matrix_shapes
    from triptych_models.sequence import SequenceGroup
    from triptych_models.sequence_batch import take_part
    from triptych_models.tensor import tensor_cuts

    config = load_config(
        sft_stage().SftConfig,
        None,
        [
            *(f"run.dir={run_dir}", "run.steps=1", "optim.max_grad_norm=0.5", "optim.lr=1e-2"),
            "optim.eps=1e-3",  # far from a sign: an error of a gradient stays one of an update
            *("engine.zero.persistence_threshold=0", "engine.zero.bucket_size=5000"),
            *(f"model.path={folder}", "model.init=random", "model.seed=3"),
            *("data.seq_len=128", "data.shards=[none]", "model.compile=none"),
            *words,
        ],
    )
    mesh = make_mesh(config.parallel, runtime)
    place = make_expert_place(config.parallel, runtime)
    group = SequenceGroup(mesh.sp_group, mesh.sp_size, mesh.sp_rank)
    if runtime.is_main:
        run_dir.mkdir(parents=True)
    with sharded_init(config.engine, runtime.world_size):
        model = build_model(
            config.model,
            dtype=compute_dtype(config.engine),
            gather=gather_parameters(config.engine),
            sequence=group,
            experts=ExpertGroup(place.group, place.size, place.rank, place.mark),
        )
    if config.model.lora is not None:
        gather = gather_parameters(config.engine)
        add_adapters(model, config.model.lora, config.model.seed, gather)
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

    gradients: dict[str, Part] = {}
    take_step = engine.step

    def look_then_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            gradients.update({n: part(n, x) for n, x in whole_gradients(engine).items()})
        take_step()

    engine.step = look_then_step
    accumulation = config.engine.gradient_accumulation_steps
    mine = rows(family_of(folder))[: mesh.dp_size * accumulation][mesh.dp_rank :: mesh.dp_size]
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
    with Metrics(config, **ranks) as metrics:
        train(
            engine,
            iter(mine),
            config,
            flops=model.flops,
            metrics=metrics,
            part=partial(take_part, group=group),
        )
    masters = {n: part(n, x) for n, x in whole_masters(engine).items()}
    engine.destroy()
    dist.barrier()
    return Step(json.loads((run_dir / "metrics.jsonl").read_text()), gradients, masters)


def compare(found: Step, wanted: Step, where: str, tolerance: float = 1e-5) -> None:
    """Figures, gradients and masters of a rank against those of a rank that has all."""
    for name in ("loss", "grad_norm", "num_targets", "num_tokens", "flops", "packing_fill"):
        assert abs(found.line[name] / wanted.line[name] - 1) <= tolerance, (
            f"{where}: {name} {found.line[name]} is not {wanted.line[name]}"
        )
    total = wanted.line["grad_norm"]
    # A weight's gradient may be tiny beside the rest, as in test_parity; a master is not.
    for kind, scale in (("gradients", 1e-4 * total), ("masters", 1e-3)):
        ours, theirs = getattr(found, kind), getattr(wanted, kind)
        assert ours.keys() == theirs.keys(), where
        for name, part in ours.items():
            right = part.of(theirs[name].tensor)
            assert part.tensor.shape == right.shape, f"{where}: {name}"
            error = (part.tensor - right).norm() / max(right.norm().item(), scale)
            assert error <= tolerance, f"{where}: {kind} of {name} off by {error:.1e}"
