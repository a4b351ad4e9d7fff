"""Training of a representation autoencoder: a decoder gives back what a frozen encoder has seen.

The decoder learns by L1, by how alike image and reconstruction look to a frozen network
(`perceptual.path`) and by deceiving a discriminator on a frozen network's features
(`adversary.path`), which learns beside it; without their folders both are off. Noise, cuts and
augmentations of an image follow from seed, image and epoch. Every evaluation shows the same images
beside their reconstructions, with the averages of the weights.

    triptych-data shard IMAGES.jsonl shards/train
    deepspeed stages/rae.py --config stages/configs/rae_dinov2_b_xl.yaml

run.dir/export is diffusers' AutoencoderRAE, encoder and decoder. Measured on: two CPU ranks.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from running import OF_ROWS, begin_samples, carry_out, plan_samples, refuse, share_seed

from triptych_core.config import StageConfig, parse_args, run_main
from triptych_core.sections import OptimConfig, ScheduleConfig
from triptych_data.pixels.config import PixelDataConfig
from triptych_models.autoencoder.config import AdversaryConfig, PerceptualConfig, RAEModelConfig

if TYPE_CHECKING:
    import numpy as np

    from triptych_core.launch import Runtime
    from triptych_core.metrics import Metrics
    from triptych_core.plan.plan import Plan
    from triptych_data.pixels.loader import PixelLoader
    from triptych_models.autoencoder.rae import RAE


class RaeOptim(OptimConfig):
    """The optimizer of decoder and discriminator as RAE was trained (arXiv 2510.11690)."""

    lr: float = Field(2e-4, gt=0, description="peak rate; lr_by_part={discriminator: …} of that")
    weight_decay: float = Field(0.0, ge=0, description="on matrices; never on norms and biases")
    max_grad_norm: float = Field(
        0.0, ge=0, description="clip the norms of decoder and discriminator, each; 0 = never"
    )
    ema_decay: float | None = Field(0.9978, gt=0, lt=1, description="of what is kept and shown")


class RaeSchedule(ScheduleConfig):
    """Of both; the discriminator's begins with its first step."""

    min_ratio: float = Field(0.1, ge=0, le=1, description="the factor reached at the last step")


class SamplesConfig(BaseModel):
    """What every evaluation shows."""

    model_config = ConfigDict(extra="forbid")

    count: int = Field(16, ge=1, le=1024, description="images, of the held-out shards the first")
    columns: int = Field(8, ge=1, description="of the picture: a row of images, one made of them")


class RaeConfig(StageConfig):
    """Everything that makes a run of autoencoder training."""

    model: RAEModelConfig = RAEModelConfig()
    perceptual: PerceptualConfig = PerceptualConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    data: PixelDataConfig
    samples: SamplesConfig = SamplesConfig()
    optim: RaeOptim = RaeOptim()
    schedule: RaeSchedule = RaeSchedule()
    export: bool = Field(True, description="write run.dir/export, weights and their configuration")

    @model_validator(mode="after")
    def _check_what_is_not_there(self) -> Self:
        offloads = {"engine.zero.offload_optimizer": False, "engine.zero.offload_params": False}
        refuse(self, OF_ROWS | offloads)
        return self

    @model_validator(mode="after")
    def _share_seed(self) -> Self:
        share_seed(self)
        return self

    def loss_in_words(self) -> str:
        """What is learnt by, and what is not."""
        off = "off, as {0}.path names no folder or {0}.weight is 0"
        perceptual = self.perceptual.weight if self.perceptual.is_on else off.format("perceptual")
        adversary = off.format("adversary")
        if self.adversary.is_on:
            begins, steps = self.adversary.start, self.run.steps
            when = (
                f"from step {begins} on" if begins <= steps else f"never: from {begins} of {steps}"
            )
            adversary = f"{self.adversary.weight} {when}"
        return f"L1, an image; perceptual distance × {perceptual}; discriminator × {adversary}"


@dataclass(frozen=True, eq=False)
class Job:
    """A rank's share of a run, ready to train."""

    engine: Any
    model: "RAE"
    batches: "PixelLoader"
    parameters: dict[str, int]
    part = staticmethod(dict)

    def begin_step(self, step: int, window: Sequence[dict[str, Any]]) -> None:
        """Of several micro-batches the adaptive weight is found before the first."""
        from triptych_core.loop import to_device

        self.model.begin_step(step)
        if len(window) > 1:
            self.model.survey(to_device(batch, self.engine.device) for batch in window)


def plan(config: RaeConfig) -> "Plan":
    """What the last step needs, in which all judges are asked, and how long it takes."""
    from triptych_core.engine.build import compute_dtype
    from triptych_models.autoencoder.pretend import begin_window, build_pretend_rae, pretend_images

    parts = config.model, config.perceptual, config.adversary
    model = build_pretend_rae(*parts, dtype=compute_dtype(config.engine))
    window = config.engine.gradient_accumulation_steps
    return plan_samples(
        config,
        model,
        partial(pretend_images, model),
        begin=partial(begin_window, model, step=config.run.steps, micro_steps=window),
        beside=model.beside,
    )


def build_job(config: RaeConfig, runtime: "Runtime") -> Job:
    """Wire data, model and engine together, as they are before the first step."""
    import torch.distributed as dist

    from triptych_core.engine.build import build_engine, compute_dtype, gather_parameters
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_data.pixels.loader import PixelLoader
    from triptych_models.autoencoder.build import build_rae
    from triptych_models.freeze import count_parameters, parameter_parts
    from triptych_models.matrices import matrix_shapes

    # Model: filled part by part; encoder and judges are whole on every rank.
    model = build_rae(
        config.model,
        config.perceptual,
        config.adversary,
        dtype=compute_dtype(config.engine),
        gather=gather_parameters(config.engine),
        sum_over_ranks=dist.all_reduce,
    )
    model.set_checkpointing(config.engine.checkpointing)

    # Data: images out of shards, one order of them for any number of ranks.
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
    shape = model.noise_shape
    batches = PixelLoader(config.data, **ranks, side=model.image_size, noise_shape=shape)

    # One optimizer for both; the discriminator's groups rest until it begins.
    groups = parameter_groups(
        model.named_parameters(),
        config.optim,
        parameter_parts(model).__getitem__,
        matrix_shapes(model),
    )
    for group in groups:
        if group["name"].startswith("discriminator/"):
            group["first_step"] = config.adversary.discriminator_start
            group["clip"] = "discriminator"
    optimizer = build_optimizer(groups, config.optim, seed=config.run.seed)
    parameters = count_parameters(model)  # before a rank has only a part of them
    engine = build_engine(
        model, optimizer, config.engine, config.optim, runtime.world_size, model.layers()
    )
    return Job(engine, model, batches, parameters)


def main(config: RaeConfig) -> None:
    """Train, show, export; or show the plan, verify, or replay a step."""
    config.model.check_path()
    config.perceptual.check_path("perceptual")
    config.adversary.check_path("adversary")
    if config.plan.show != "no":
        from triptych_core.plan.plan import show_plan

        show_plan(plan(config), config.plan)
        return
    config, runtime, chosen = begin_samples(config, plan)
    if config.verify.only:
        from rehearsing import verify

        config.adversary.discriminator_start = config.adversary.start = 1
        verify(config, runtime, build_job, _loop)
        return
    if config.replay.step != "no":
        from replaying_samples import replay

        replay(config, runtime, build_job, _loop)
        return
    job = build_job(config, runtime)
    if runtime.is_main:
        sys.stdout.write(f"loss: {config.loss_in_words()}\n")
    export = partial(_export, config, job.model, is_main=runtime.is_main)
    carry_out(
        config,
        runtime,
        job,
        {
            "parameters": job.parameters,
            "data": job.batches.describe(),
            "loss": config.loss_in_words(),
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
    return {"capacity": lambda batch: len(batch["pixels"]), "on_window": job.begin_step}


def _test(config: RaeConfig, job: Job, runtime: "Runtime", metrics: "Metrics", step: int) -> None:
    """Held-out loss and reconstructions, if the step is due; every rank takes part."""
    from triptych_core.evaluation.drawings import draw_if_due
    from triptych_data.pixels.loader import heldout_pixels

    def heldout() -> Iterator[dict[str, Any]]:
        shards, side = config.evaluation.shards, job.model.image_size
        return heldout_pixels(config.data, shards, runtime.rank, runtime.world_size, side)

    asked = heldout if config.evaluation.shards else None
    draw_if_due(job.engine, config, asked, partial(_show, config, job), metrics, step)


def _show(config: RaeConfig, job: Job) -> "np.ndarray":
    """Images, and below each what is made of it; the same on every rank."""
    import torch

    from triptych_data.pixels.loader import first_pixels
    from triptych_models.diffusion.picture import grid

    shards, columns = config.evaluation.shards or config.data.shards, config.samples.columns
    pixels = first_pixels(config.data, shards, config.samples.count, job.model.image_size)
    pixels = pixels.to(job.engine.device)
    both = torch.stack([pixels.float() / 255, job.model.reconstruct(pixels)])  # (2, n, 3, S, S)
    columns = min(columns, len(pixels))
    missing = both.new_ones(2, -len(pixels) % columns, *both.shape[2:])  # of the last row, white
    rows = torch.cat([both, missing], 1).unflatten(1, (-1, columns)).transpose(0, 1)
    return grid(2 * rows.flatten(0, 2) - 1, columns, reach=1.0)


def _export(config: RaeConfig, model: "RAE", *, is_main: bool) -> None:
    """Write run.dir/export; every rank takes part."""
    from triptych_core.engine.build import read_parameters
    from triptych_models.autoencoder.weights import export_rae

    gather = read_parameters(config.engine)
    export_rae(model, config.run.dir / "export", gather=gather, is_main=is_main)


if __name__ == "__main__":
    run_main(main, parse_args(RaeConfig, sys.argv[1:], __doc__ or ""))
