"""Muon under ZeRO against one rank with whole matrices: same packs, same losses, same weights."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_ranks
from tests.tiny import whole_masters

STEPS, VOCABULARY, WIDTH = 5, 19, 12
LR, MUON_LR = 3e-3, 2e-2
OPTIONS = [
    "optim.name=muon",
    f"optim.lr={LR}",
    f"optim.muon.lr={MUON_LR}",
    "optim.lr_by_part={head: 1e-3}",
    "optim.weight_decay=0.1",
    "optim.max_grad_norm=0.3",
    "schedule.kind=cosine",
    "schedule.warmup_steps=2",
]


class Toy(nn.Module):
    """A bit of everything: an embedding, a fused qkv, tall and wide layers, a convolution."""

    def __init__(self, *, fused: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        # No bias: the softmax cancels the keys', and AdamW makes steps of its rounding errors.
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.wide = nn.Linear(WIDTH, 29, bias=False)
        self.tall = nn.Linear(29, WIDTH)
        self.square = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if not fused:
            self.qkv.weight = nn.Parameter(self.qkv.weight.detach().view(3, WIDTH, WIDTH))

    def fill(self, gather: Any = lambda parameters: nullcontext()) -> Toy:
        generator = torch.Generator().manual_seed(7)
        for parameter in self.parameters():
            with gather([parameter]):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return self

    def forward(self, input_ids: Tensor, shift_labels: Tensor, num_targets: int) -> Any:
        from triptych_models.output import LossOutput

        x = self.embedding(input_ids)  # (1, T, WIDTH)
        x = x + self.norm(self.convolution(x.mT).mT)
        weight = self.qkv.weight if self.qkv.weight.dim() == 2 else self.qkv.weight.flatten(0, 1)
        # By the module where it is whole only there (ZeRO-3), by hand where it is a stack.
        together = self.qkv(x) if weight is self.qkv.weight else x @ weight.T
        q, k, v = together.chunk(3, dim=-1)
        x = x + (q @ k.mT / WIDTH).softmax(-1) @ v
        for layer in self.square:
            x = x + torch.tanh(layer(x))
        x = x + self.tall(torch.nn.functional.silu(self.wide(x)))
        loss = torch.nn.functional.cross_entropy(
            self.lm_head(x)[0], shift_labels[0], ignore_index=-100, reduction="sum"
        )
        return LossOutput(loss, num_targets, {})


def packs() -> list[dict[str, Any]]:
    """STEPS * 4 ragged packs; one has no targets."""
    generator = torch.Generator().manual_seed(11)
    result = []
    for number in range(STEPS * 4):
        ids = torch.randint(0, VOCABULARY, (1, 16), generator=generator)
        labels = torch.randint(0, VOCABULARY, (1, 16), generator=generator)
        labels[:, : number % 5 * 4] = -100
        count = int((labels >= 0).sum())
        batch = {"input_ids": ids, "shift_labels": labels, "num_targets": count, "num_tokens": 16}
        result.append(batch)
    return result


def part(name: str) -> str:
    return "head" if name.startswith(("lm_head", "tall")) else "body"


def config_of(run_dir: Path, *overrides: str) -> Any:
    from triptych_core.config import StageConfig, load_config

    base = [f"run.dir={run_dir}", f"run.steps={STEPS}", "run.device=cpu", "engine.precision=fp32"]
    small = ["engine.zero.persistence_threshold=0", "engine.zero.bucket_size=300"]
    return load_config(StageConfig, None, [*base, *small, *OPTIONS, *overrides])


def reference(config: Any, packs_per_step: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights of a plain loop: autograd, clip, the kernels' Muon on one rank."""
    from triptych_core.optim.schedule import lr_scale
    from triptych_kernels import Muon

    model = Toy(fused=False).fill()
    by_muon = {
        "qkv.weight",
        "wide.weight",
        "tall.weight",
        *(f"square.{i}.weight" for i in range(3)),
    }
    groups = []
    for name, parameter in model.named_parameters():
        lr = 1e-3 if part(name) == "head" else LR
        muon = name in by_muon
        peak = lr * MUON_LR / LR if muon else lr
        decay = 0.1 if muon or parameter.dim() >= 2 else 0.0
        group = {"params": [parameter], "peak": peak, "weight_decay": decay, "use_muon": muon}
        groups.append({**group, "stacked": muon and parameter.dim() == 3})
    muon_options = {"adjust_lr": config.optim.muon.lr_scale, "nesterov": config.optim.muon.nesterov}
    optimizer = Muon(groups, compute_dtype=torch.float32, **muon_options)
    losses = []
    for step in range(1, STEPS + 1):
        window = packs()[(step - 1) * packs_per_step : step * packs_per_step]
        targets = max(1, sum(batch["num_targets"] for batch in window))
        loss = torch.zeros(())
        for batch in window:
            inputs = {key: batch[key] for key in ("input_ids", "shift_labels", "num_targets")}
            loss = loss + model(**inputs).loss_sum / targets
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_scale(config.schedule, step, STEPS)
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: p.detach().view(-1) for n, p in model.named_parameters()}


def build(config: Any) -> Any:
    """Engine and model as a stage wires them."""
    import torch.distributed as dist

    from triptych_core.engine.build import (
        build_engine,
        compute_dtype,
        gather_parameters,
        sharded_init,
    )
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_kernels import newton_schulz
    from triptych_models.matrices import matrix_shapes

    world_size = dist.get_world_size()
    with sharded_init(config.engine, world_size):
        model = Toy().to(compute_dtype(config.engine))
    model.fill(gather_parameters(config.engine))
    groups = parameter_groups(model.named_parameters(), config.optim, part, matrix_shapes(model))
    exact = partial(newton_schulz, compute_dtype=torch.float32)
    optimizer = build_optimizer(groups, config.optim, orthogonalise=exact)
    return build_engine(model, optimizer, config.engine, config.optim, world_size)


def trained(run_dir: Path, overrides: list[str]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights of the real loop; a resumed run goes on from its checkpoint."""
    import torch.distributed as dist

    from triptych_core.checkpoint.saver import Saver, resume
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics

    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = config_of(run_dir, *overrides)
    engine = build(config)
    stream = Stream(packs()[rank::world_size])
    start = resume(engine, config, stream).step
    with Metrics(config, rank=rank, world_size=world_size, start_step=start) as metrics:
        train(
            engine,
            stream,
            config,
            flops=lambda batch: 0.0,
            metrics=metrics,
            start_step=start,
            on_step=[Saver(engine, config, stream, metrics)],
        )
    weights = {name: master.view(-1) for name, master in whole_masters(engine).items()}
    engine.destroy()
    dist.barrier()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return [line["loss"] for line in lines], weights


class Stream:
    """Packs in order, with a position."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self._batches, self._next = batches, 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> dict[str, Any]:
        self._next += 1
        return self._batches[self._next - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]


def on_a_rank(path: Path, runs: dict[str, list[str]]) -> dict[str, Any]:
    import torch.distributed as dist

    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    launch(RunConfig(device="cpu"))
    results = {}
    for name, overrides in runs.items():
        if dist.get_rank() == 0:
            (path / name.partition("+")[0]).mkdir(exist_ok=True)
        dist.barrier()
        results[name] = trained(path / name.partition("+")[0], overrides)
    return results


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_and_weights_equal_one_rank_with_whole_matrices(tmp_path, stage, world_size):
    runs = {
        f"accumulation-{n}": [
            f"engine.zero.stage={stage}",
            f"engine.gradient_accumulation_steps={n}",
            "checkpoint.save=false",
        ]
        for n in (1, 2)
    }
    for results in run_ranks(on_a_rank, world_size, tmp_path, runs):
        for n in (1, 2):
            losses, weights = results[f"accumulation-{n}"]
            wanted_losses, wanted = reference(config_of(tmp_path), world_size * n)
            where = f"stage {stage}, {world_size} ranks, accumulation {n}"
            assert losses == pytest.approx(wanted_losses, rel=1e-5), where
            assert weights.keys() == wanted.keys()
            for name, weight in weights.items():
                error = (weight - wanted[name]).norm() / wanted[name].norm()
                assert error <= 1e-5, f"{where}: {name} off by {error:.1e}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_run_repeats_every_bit(tmp_path, stage):
    base = [f"engine.zero.stage={stage}", "engine.gradient_accumulation_steps=2"]
    base += ["optim.state_dtype=bf16"]  # of AdamW's groups: their random rounding, too, is repeated
    runs = {
        "whole": [*base, "checkpoint.save=false"],
        # Two steps of the same schedule, then the rest of it from the checkpoint.
        "cut": [*base, "run.steps=2", "schedule.kind=constant", "checkpoint.every=2"],
        "cut+on": [*base, "checkpoint.every=0"],
    }
    # Warm-up takes the first two steps, so that both schedules agree there.
    for results in run_ranks(on_a_rank, 2, tmp_path, runs):
        losses, weights = results["whole"]
        assert results["cut"][0] == losses[:2]
        resumed_losses, resumed = results["cut+on"]
        assert resumed_losses == losses
        for name, weight in weights.items():
            assert torch.equal(resumed[name], weight), name


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    base = ["engine.zero.stage=2", "run.steps=2"]
    runs = {"run": base, "run+on": [*base, "optim.name=adamw"]}
    with pytest.raises(RuntimeError, match="optimizer must be adamw as in this run, got muon"):
        run_ranks(on_a_rank, 1, tmp_path, runs)


@pytest.mark.parametrize(
    "option", ["optim.muon.nesterov=false", "optim.muon.lr_scale=original"], ids=["plain", "scale"]
)
def test_options_reach_the_update(tmp_path, option):
    runs = {"run": ["engine.zero.stage=2", "checkpoint.save=false", option]}
    wanted_losses, wanted = reference(config_of(tmp_path, option), 2)
    for results in run_ranks(on_a_rank, 2, tmp_path, runs):
        losses, weights = results["run"]
        assert losses == pytest.approx(wanted_losses, rel=1e-5)
        for name, weight in weights.items():
            assert (weight - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_fp32_masters_of_bf16_weights_agree_between_stages(tmp_path, world_size):
    # ZeRO-1 in bf16 is another class of DeepSpeed's (BF16_Optimizer), ZeRO-0 an engine of ours.
    common = ["engine.precision=bf16", "run.steps=1", "schedule.warmup_steps=0"]
    runs = {
        f"stage-{n}": [f"engine.zero.stage={n}", *common, "checkpoint.save=false"] for n in range(4)
    }
    for results in run_ranks(on_a_rank, world_size, tmp_path, runs):
        _, wanted = results["stage-2"]
        for name, (_, weights) in results.items():
            for key, weight in weights.items():
                error = (weight - wanted[key]).norm() / wanted[key].norm()
                assert error <= 1e-6, f"{name}: {key} off by {error:.1e}"
