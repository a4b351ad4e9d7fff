"""Training of a diffusion model (SiT, Wan) on latents that lie in shards.

The autoencoder does not run: `triptych-data latents` keeps what it gave. Noise and time of a sample
follow from seed, sample and epoch. The loss is the squared error of what the objective says the
model predicts, summed over elements and divided by their number over all ranks. Every evaluation
draws the same samples from the same noise, with the averages of the weights.

    triptych-data latents LATENTS.npz shards/train
    deepspeed stages/diffusion.py --config stages/configs/diffusion_sit_xl_2.yaml

run.dir/export is of the family's public layout: the official SiT's model.pt, or diffusers' Wan.
A Wan also needs texts (`data.text_len`) that were encoded before. Measured on: two CPU ranks.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from running import OF_ROWS, begin_samples, carry_out, plan_samples, refuse, share_seed

from triptych_core.config import StageConfig, parse_args, run_main
from triptych_core.sections import OptimConfig, ScheduleConfig
from triptych_data.tensors.config import TensorDataConfig
from triptych_models.diffusion.config import DiffusionModelConfig, ObjectiveConfig, SamplerConfig

if TYPE_CHECKING:
    import numpy as np

    from triptych_core.launch import Runtime
    from triptych_core.metrics import Metrics
    from triptych_core.plan.plan import Plan
    from triptych_data.tensors.loader import TensorLoader
    from triptych_models.diffusion.model import DiffusionModel


class DiffusionOptim(OptimConfig):
    """The optimizer as DiT and SiT were trained (arXiv 2212.09748, section 4; 2401.08740)."""

    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="on matrices; never on norms and biases")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    ema_decay: float | None = Field(0.9999, gt=0, lt=1, description="of what is kept and drawn by")


class DiffusionSchedule(ScheduleConfig):
    """A constant rate."""

    kind: Literal["constant", "cosine", "linear", "wsd"] = Field("constant", description="shape")


class SamplesConfig(BaseModel):
    """What every evaluation draws."""

    model_config = ConfigDict(extra="forbid")

    count: int = Field(40, ge=1, le=4096, description="samples, their labels in turn from 0")
    columns: int = Field(10, ge=1, description="of the picture")
    seed: int = Field(0, ge=0, description="of their noise")
    reach: float = Field(2.0, gt=0, description="the value that is white; minus that is black")


class DiffusionConfig(StageConfig):
    """Everything that makes a run of diffusion training."""

    model: DiffusionModelConfig = DiffusionModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: TensorDataConfig
    sampler: SamplerConfig = SamplerConfig()
    samples: SamplesConfig = SamplesConfig()
    optim: DiffusionOptim = DiffusionOptim()
    schedule: DiffusionSchedule = DiffusionSchedule()
    export: bool = Field(True, description="write run.dir/export, weights and their configuration")

    @model_validator(mode="after")
    def _check_what_is_not_there(self) -> Self:
        refuse(self, OF_ROWS)
        return self

    @model_validator(mode="after")
    def _check_sampler(self) -> Self:
        for key, is_given in (
            ("data.given_frames", self.data.given_frames > 0),
            ("sampler.strength below 1", self.sampler.strength < 1),
        ):
            if is_given and self.sampler.method.startswith("sde"):
                raise ValueError(
                    f"sampler.method: must be euler, heun or dopri5 with {key}, got "
                    f"{self.sampler.method}; an SDE would put noise on what is given"
                )
        return self

    @model_validator(mode="after")
    def _share_seed(self) -> Self:
        share_seed(self)
        return self


@dataclass(frozen=True, eq=False)
class Job:
    """A rank's share of a run, ready to train."""

    engine: Any
    model: "DiffusionModel"
    batches: "TensorLoader"
    parameters: dict[str, int]
    part = staticmethod(dict)


def plan(config: DiffusionConfig) -> "Plan":
    """What a step needs and how long it takes; of a Wan, samples are like the shards' first."""
    from triptych_core.engine.build import compute_dtype
    from triptych_data.tensors.loader import open_batches
    from triptych_models.diffusion.pretend import build_pretend_diffusion, pretend_samples

    shape, classes = config.model, config.model.num_classes
    if shape.compile == "auto" and config.run.device != "cpu":
        shape = shape.model_copy(update={"compile": "layers"})
    model = build_pretend_diffusion(shape, config.objective, dtype=compute_dtype(config.engine))
    shapes = model.sample_shapes()
    if not shapes:
        shapes = dict(open_batches(config.data, config.data.shards, classes).shapes)
        model.check_data(shapes)
    make_batch = partial(
        pretend_samples,
        shapes,
        has_labels=classes is not None,
        given_frames=config.data.given_frames,
    )
    return plan_samples(config, model, make_batch)


def build_job(config: DiffusionConfig, runtime: "Runtime") -> Job:
    """Wire data, model and engine together, as they are before the first step."""
    from triptych_core.engine.build import (
        build_engine,
        compute_dtype,
        gather_parameters,
        sharded_init,
    )
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_data.tensors.loader import TensorLoader
    from triptych_models.diffusion.build import build_diffusion
    from triptych_models.freeze import count_parameters, parameter_parts
    from triptych_models.matrices import matrix_shapes

    # Data: shards of latents, one order of samples for any number of ranks.
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
    batches = TensorLoader(config.data, **ranks, num_classes=config.model.num_classes)

    # Model: born in pieces under ZeRO-3, filled part by part.
    with sharded_init(config.engine, runtime.world_size):
        model = build_diffusion(
            config.model,
            config.objective,
            dtype=compute_dtype(config.engine),
            gather=gather_parameters(config.engine),
        )
    model.check_data(batches.batches.shapes)
    model.set_checkpointing(config.engine.checkpointing)
    groups = parameter_groups(
        model.named_parameters(),
        config.optim,
        parameter_parts(model).__getitem__,
        matrix_shapes(model),
    )
    optimizer = build_optimizer(groups, config.optim, seed=config.run.seed)
    parameters = count_parameters(model)  # before a rank has only a part of them
    engine = build_engine(
        model, optimizer, config.engine, config.optim, runtime.world_size, model.layers()
    )
    return Job(engine, model, batches, parameters)


def main(config: DiffusionConfig) -> None:
    """Train, draw, export; or show the plan, verify, or replay a step."""
    config.model.check_path()
    if config.plan.show != "no":
        from triptych_core.plan.plan import show_plan

        show_plan(plan(config), config.plan)
        return
    config, runtime, chosen = begin_samples(config, plan)
    if config.verify.only:
        from rehearsing import verify

        verify(config, runtime, build_job, _loop)
        return
    if config.replay.step != "no":
        from replaying_samples import replay

        replay(config, runtime, build_job, _loop)
        return
    job = build_job(config, runtime)
    export = partial(_export, config, job.model, is_main=runtime.is_main)
    carry_out(
        config,
        runtime,
        job,
        {
            "parameters": job.parameters,
            "data": job.batches.describe(),
            "loss": f"squared error of {config.objective.prediction}, an element",
            "chosen": chosen,
        },
        test=partial(_test, config, job, runtime),
        export=export if config.export else None,
        plan=plan,
        compiles=config.model.compile == "layers",
        unit="images",
        **_loop(job),
    )


def _loop(job: Job) -> dict[str, Any]:
    """What the loop is told of these batches."""
    return {"capacity": lambda batch: len(batch["latents"])}


def _test(
    config: DiffusionConfig, job: Job, runtime: "Runtime", metrics: "Metrics", step: int
) -> None:
    """Held-out loss and samples, if the step is due; every rank takes part."""
    from triptych_core.evaluation.drawings import draw_if_due
    from triptych_data.tensors.loader import heldout_batches

    def heldout() -> Iterator[dict[str, Any]]:
        shards, classes = config.evaluation.shards, config.model.num_classes
        return heldout_batches(config.data, shards, runtime.rank, runtime.world_size, classes)

    asked = heldout if config.evaluation.shards else None
    draw_if_due(job.engine, config, asked, partial(_draw, config, job), metrics, step)


def _draw(config: DiffusionConfig, job: Job) -> "np.ndarray":
    """The same samples on every rank: under ZeRO-3 a forward is a collective."""
    import torch

    from triptych_data.tensors.loader import heldout_batches
    from triptych_models.diffusion.picture import grid
    from triptych_models.diffusion.sampling import sample

    shards, count = config.evaluation.shards or config.data.shards, config.samples.count
    batch = next(heldout_batches(config.data, shards, 0, 1, config.model.num_classes))
    generator = torch.Generator().manual_seed(config.samples.seed)
    noise = torch.randn(count, *job.batches.batches.shape, generator=generator)
    rows = torch.arange(count) % batch["num_tokens"]
    frames, given, source = config.data.given_frames, None, None
    if frames:
        given = batch["latents"][rows, :, :frames].to(job.engine.device)
    if config.sampler.strength < 1:
        source = batch.get("source_latents", batch["latents"])[rows].to(job.engine.device)
    asked = job.model.drawn_condition(batch, count)
    condition = {name: value.to(job.engine.device) for name, value in asked.items()}
    noise = noise.to(job.engine.device)
    drawn = sample(job.model, noise, condition, config.sampler, generator, given, source)
    return grid(drawn, config.samples.columns, config.samples.reach)


def _export(config: DiffusionConfig, model: "DiffusionModel", *, is_main: bool) -> None:
    """Write run.dir/export; every rank takes part."""
    from triptych_core.engine.build import read_parameters

    gather = read_parameters(config.engine)
    model.export(config.run.dir / "export", gather=gather, is_main=is_main)


if __name__ == "__main__":
    run_main(main, parse_args(DiffusionConfig, sys.argv[1:], __doc__ or ""))
