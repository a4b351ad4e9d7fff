"""What stages on packed rows share: configuration, plan, and the run from shards to export.

No stage itself: a stage says what of this it sets otherwise, and begins it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator
from running import carry_out, share_seed

from triptych_core.config import StageConfig, did_you_mean
from triptych_data.config import CostConfig, DataConfig
from triptych_data.tensors.config import TensorDataConfig
from triptych_models.bagel.settings import DrawConfig
from triptych_models.catalogue import FAMILIES, Part
from triptych_models.config import ModelConfig

if TYPE_CHECKING:
    import numpy as np

    from triptych_core.launch import Runtime
    from triptych_core.loop import Part as RowPart
    from triptych_core.metrics import Metrics
    from triptych_core.plan.plan import Plan
    from triptych_data.batch import Finish
    from triptych_data.heldout import Heldout
    from triptych_data.loader import PackLoader
    from triptych_data.processor import Processor
    from triptych_data.tensors.joined import JoinedLoader
    from triptych_models.packed import PackedModel


class GenerationData(TensorDataConfig):
    """What `data` is of stages on latents."""

    KEY: ClassVar[str] = "generation.data"


class GenerationConfig(DrawConfig):
    """Images that a row holds beside its chats, their latents kept by `triptych-data latents`."""

    data: GenerationData


class PackedConfig(StageConfig):
    """Sections of every stage that trains a model on packed rows; a stage says its own defaults."""

    model: ModelConfig
    data: DataConfig
    generation: GenerationConfig | None = Field(
        None, description="latents that are learnt in the same rows; of a model that draws"
    )
    export: bool = Field(True, description="write run.dir/export, a Hugging Face directory")

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        trained = [part for part in get_args(Part) if part not in self.model.freeze]
        if not trained:
            raise ValueError("model.freeze: must leave a part to train, got all; name fewer")
        for part in self.optim.lr_by_part:
            if part not in trained:
                raise ValueError(
                    f"optim.lr_by_part.{part}: must be a part that trains, got '{part}'"
                    f"{did_you_mean(part, trained)}"
                )
        return self

    @model_validator(mode="after")
    def _check_row(self) -> Self:
        self.parallel.check_row(self.data.seq_len)
        if self.parallel.tensor > 1 and self.model.compile == "layers":
            raise ValueError(
                "model.compile: must be none with parallel.tensor, got layers; its sums over ranks "
                "break a layer's graph"
            )
        if (
            self.parallel.expert > 1
            and self.model.compile == "layers"
            and self.engine.checkpointing == "selective"
        ):
            raise ValueError(
                "engine.checkpointing: must be none, full or offload with parallel.expert and "
                "model.compile=layers, got selective; what the compiler may keep cannot depend on "
                "the tokens of an expert, but norms and gates it computes again by itself"
            )
        return self

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        if self.model.lora is None:
            return self
        for key, value, wanted in (
            ("model.freeze", self.model.freeze, []),
            ("model.compile", self.model.compile == "layers", False),
            ("parallel.tensor", self.parallel.tensor, 1),
            ("parallel.expert", self.parallel.expert, 1),
        ):
            if value != wanted:
                said = "layers" if key == "model.compile" else value
                raise ValueError(
                    f"{key}: must be left out with model.lora, got {said}; all of the base is "
                    "frozen, and its layers are neither compiled nor cut"
                )
        return self

    @model_validator(mode="after")
    def _check_generation(self) -> Self:
        if self.generation is None:
            return self
        if self.generation.data.text_field is None:
            raise ValueError(
                "generation.data.text_field: must name the words of an image, got nothing; name "
                "the field of the samples' JSON"
            )
        if self.generation.weight == 0 and "generation" not in self.model.freeze:
            raise ValueError(
                "generation.weight: must be above 0 for a part that trains, got 0; weights without "
                "a gradient would decay: add generation to model.freeze"
            )
        if self.replay.step != "no":
            raise ValueError(
                f"replay.step: must be no with generation, got {self.replay.step}; only rows of "
                "chats are replayed"
            )
        return self

    @model_validator(mode="after")
    def _share_seed(self) -> Self:
        share_seed(self)
        if self.generation is not None and "seed" not in self.generation.data.model_fields_set:
            self.generation.data.seed = self.run.seed
        return self


def require_part(config: PackedConfig, part: Part, what: str, remedy: str) -> None:
    """Raise ValueError unless the model's family has this part, which a stage is about."""
    family = config.model.find_family()
    if part not in FAMILIES[family].parts:
        raise ValueError(
            f"model.path: must hold {what}, got {config.model.path} ({family}); {remedy}"
        )


def settle_parts(config: PackedConfig) -> str | None:
    """Freeze what rows without latents cannot train, and say so: without a gradient weights would
    still decay. Raises ValueError for settings of such a part, and if no other is left to train."""
    part: Part = "generation"
    if config.generation is not None or part not in FAMILIES[config.model.find_family()].parts:
        return None
    lora = config.model.lora
    for key, is_named in (
        (f"optim.lr_by_part.{part}", part in config.optim.lr_by_part),
        ("model.lora.targets", lora is not None and part in lora.targets),
    ):
        if is_named:
            raise ValueError(
                f"{key}: must leave {part} out of a run of chats alone, got it; set "
                "generation.data.shards for latents to learn"
            )
    if lora is not None or part in config.model.freeze:
        return None
    config.model.freeze = [*config.model.freeze, part]
    config.model.check_path()
    return f"{part}, since the rows hold no latents to learn"


def settle_compile(config: PackedConfig, *, on_cuda: bool) -> Literal["none", "layers"]:
    """What model.compile=auto comes to on this device."""
    if config.model.compile != "auto":
        return config.model.compile
    parallel = config.parallel
    if config.model.lora is not None or parallel.tensor > 1:
        return "none"
    if parallel.expert > 1 and config.engine.checkpointing == "selective":
        return "none"
    return "layers" if on_cuda else "none"


def settle_cost(config: PackedConfig) -> None:
    """Let `data.cost` be what this model computes on packs, unless something of it is named."""
    import torch

    from triptych_models.layout import ear, tower
    from triptych_models.pack_cost import pack_cost
    from triptych_models.pretend import build_pretend_model

    if "cost" not in config.data.model_fields_set:
        model = build_pretend_model(config.model, dtype=torch.float32)
        sees, hears = tower(model.hf) is not None, ear(model.hf) is not None
        ratios = pack_cost(model.flops, images=sees, sound=hears)
        config.data.cost = CostConfig.model_validate(ratios)


def plan(config: PackedConfig) -> "Plan":
    """What a step needs and how long it takes, from config.json alone."""
    from triptych_core.engine.build import compute_dtype
    from triptych_core.optim.groups import parameter_groups
    from triptych_core.plan.plan import plan_run, tracer, weights_of
    from triptych_models.experts import ExpertGroup
    from triptych_models.fake import CROSSINGS, WORKSPACES, pretend
    from triptych_models.freeze import parameter_parts
    from triptych_models.matrices import matrix_shapes
    from triptych_models.pretend import build_pretend_model, pretend_batch, pretend_part
    from triptych_models.sequence import SequenceGroup

    # Of both its first rank.
    sequence = SequenceGroup(size=config.parallel.sequence)
    model = build_pretend_model(
        config.model,
        dtype=compute_dtype(config.engine),
        sequence=sequence,
        experts=ExpertGroup(size=config.parallel.expert),
    )
    model.set_mlp_chunks(config.engine.mlp_chunks)
    part_of, matrices = parameter_parts(model).__getitem__, matrix_shapes(model)
    groups = parameter_groups(model.named_parameters(), config.optim, part_of, matrices)
    threshold = config.engine.zero.persistence_threshold
    weights = weights_of(model, groups, threshold, config.optim, model.layers())
    make_batch = partial(
        pretend_batch,
        model,
        document_len=config.plan.document_len,
        image_share=config.plan.image_share,
        target_share=config.plan.target_share,
        image_tokens=config.plan.image_tokens,
        audio_share=config.plan.audio_share,
        audio_seconds=config.plan.audio_seconds,
    )
    seq_len = config.data.seq_len + drawn_tokens(config)
    with pretend(model):
        trace = tracer(
            model,
            make_batch,
            WORKSPACES,
            crossings=CROSSINGS,
            part=partial(pretend_part, model=model),
            sequence=sequence.size,
        )
        return plan_run(config, weights, trace, size=seq_len)


def drawn_tokens(config: PackedConfig) -> int:
    """How much longer rows are by the images that are drawn in them, of the first one's size."""
    if config.generation is None:
        return 0
    from triptych_data.tensors.loader import open_batches
    from triptych_models.bagel.join import slot_tokens
    from triptych_models.bagel.model import read_bagel

    data = config.generation.data
    *_, height, width = open_batches(data, data.shards, None).shape
    latents = height * width // read_bagel(config.model.path).latent_patch_size ** 2
    return data.batch_size * slot_tokens(config.generation, latents)


@dataclass(frozen=True, eq=False)
class Job:
    """A rank's share of a run, ready to train: of model, optimizer states and data."""

    config: PackedConfig
    engine: Any
    model: "PackedModel"
    batches: "PackLoader | JoinedLoader"
    processor: "Processor"
    part: "RowPart"
    """of a row, what this rank computes"""
    place: Mapping[str, int]
    """the `rank` and `world_size` of its rows, which several ranks may hold"""
    is_first: bool
    """of the ranks that hold its rows"""
    is_synced: bool
    """whether a forward is a collective"""
    parameters: dict[str, int]


def begin(config: PackedConfig) -> "tuple[PackedConfig, Runtime, str | None]":
    """Join the other ranks and settle what the configuration leaves open, and why so."""
    from triptych_core.launch import launch
    from triptych_core.plan.settle import settle

    runtime = launch(config.run)
    config.parallel.check_ranks(runtime.world_size)  # before a plan is made for them
    config.model.compile = settle_compile(config, on_cuda=runtime.on_cuda)
    settle_cost(config)  # first: a configuration that was settled names everything
    config, chosen = settle(config, plan)
    return config, runtime, chosen


def find_finish(config: PackedConfig) -> "Finish | None":
    """What is done to a row beside packing it: of a diffusion model, tokens are masked; of a Bagel
    its images are found, unless it is joined with others."""
    from triptych_models.masked_diffusion.noise import MaskRow

    if config.model.find_family() == "bagel" and config.generation is None:
        from triptych_models.bagel.layout import LayOutRow
        from triptych_models.bagel.model import read_bagel

        return LayOutRow(read_bagel(config.model.path))
    diffusion = config.model.diffusion
    if diffusion is None:
        return None
    return MaskRow(diffusion, diffusion.mask_of(config.model.path), config.data.seed)


def join_images(
    config: PackedConfig, rows: "PackLoader", processor: "Processor", ranks: dict[str, int]
) -> "PackLoader | JoinedLoader":
    """The rows, with documents of latents before them where there is generation."""
    if config.generation is None:
        return rows
    from triptych_data.tensors.joined import JoinedLoader
    from triptych_data.tensors.loader import TensorLoader
    from triptych_models.bagel.join import JoinImages
    from triptych_models.bagel.model import read_bagel

    images = TensorLoader(config.generation.data, **ranks, num_classes=None)
    hf_config = read_bagel(config.model.path)
    encode, pad = processor.encode_words, processor.pad_token_id
    join = JoinImages(hf_config, config.generation, encode, pad)
    return JoinedLoader(rows, images, join, name="generation")


def build_job(config: PackedConfig, runtime: "Runtime") -> Job:
    """Wire data, model and engine together, as they are before the first step."""
    from triptych_core.engine.build import (
        build_engine,
        compute_dtype,
        gather_parameters,
        read_parameters,
        sharded_init,
    )
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_core.parallel.expert import make_expert_place
    from triptych_core.parallel.mesh import make_mesh
    from triptych_core.parallel.tensor import TensorCuts
    from triptych_data.loader import PackLoader
    from triptych_data.processor import Processor
    from triptych_models.experts import ExpertGroup
    from triptych_models.families import build_model
    from triptych_models.freeze import count_parameters, parameter_parts
    from triptych_models.lora import add_adapters
    from triptych_models.matrices import matrix_shapes
    from triptych_models.sequence import SequenceGroup
    from triptych_models.tensor import tensor_cuts

    mesh = make_mesh(config.parallel, runtime)
    place = make_expert_place(config.parallel, runtime)

    # Data: shards → packs of whole documents, the same global stream on any number of ranks; those
    # that hold a row between them all read it, and each computes its part.
    ranks = {"rank": mesh.dp_rank, "world_size": mesh.dp_size}
    sequence = SequenceGroup(mesh.sp_group, mesh.sp_size, mesh.sp_rank)
    processor = Processor.from_directory(
        config.model.path,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        video=config.data.video,
        jpeg=config.data.jpeg,
        chat=config.data.chat,
    )
    rows = PackLoader(config.data, processor, **ranks, finish=find_finish(config))
    batches = join_images(config, rows, processor, ranks)

    # Model: born in pieces under ZeRO-3, filled part by part.
    dtype = compute_dtype(config.engine)
    experts = ExpertGroup(place.group, place.size, place.rank, place.mark)
    with sharded_init(config.engine, runtime.world_size, tensor_size=mesh.tp_size):
        gather = gather_parameters(config.engine)
        model = build_model(
            config.model, dtype=dtype, gather=gather, sequence=sequence, experts=experts
        )
    if config.model.lora is not None:
        read = read_parameters(config.engine)
        add_adapters(model, config.model.lora, config.model.seed, read)
    model.check_processor(processor)
    model.set_checkpointing(config.engine.checkpointing)
    model.set_mlp_chunks(config.engine.mlp_chunks)
    part_of = parameter_parts(model).__getitem__
    matrices = matrix_shapes(model)
    groups = parameter_groups(model.named_parameters(), config.optim, part_of, matrices)
    optimizer = build_optimizer(groups, config.optim, seed=config.run.seed)
    parameters = count_parameters(model)  # before a rank has only a part of them
    tensor = TensorCuts()
    if mesh.tp_size > 1:
        tensor = TensorCuts(mesh.tp_size, tensor_cuts(model, mesh.tp_size, mesh.sp_size))
    engine = build_engine(
        model, optimizer, config.engine, config.optim, runtime.world_size, model.layers(), tensor
    )
    return Job(
        config,
        engine,
        model,
        batches,
        processor,
        part=model.take_part,
        place=ranks,
        is_first=mesh.sp_rank == mesh.tp_rank == 0,
        is_synced=config.engine.stage == 3 or place.size > 1,
        parameters=parameters,
    )


def run(config: PackedConfig) -> None:
    """Train, evaluate, export; or show the plan, verify, or replay a step."""
    config.model.check_path(config.optim.lr_by_part)
    frozen = settle_parts(config)
    if config.generation is not None:
        require_part(config, "generation", "a model that draws", "leave generation out")
    if config.plan.show != "no":
        from triptych_core.plan.plan import show_plan

        show_plan(plan(config), config.plan)
        return
    if config.verify.only:
        from verifying import verify

        verify(config)
        return
    if config.replay.step != "no":
        from replaying_rows import replay

        replay(config)
        return
    # Not at the top: the configuration is checked before torch is imported.
    from triptych_core.engine.build import compute_dtype
    from triptych_data.heldout import Heldout
    from triptych_data.plan.ledger import Ledger
    from triptych_models.backends import backends

    config, runtime, chosen = begin(config)
    job = build_job(config, runtime)
    heldout = None
    if config.evaluation.shards:
        heldout = Heldout(
            config.evaluation.shards,
            job.processor,
            seq_len=config.data.seq_len,
            limit=config.evaluation.max_questions,
            finish=job.batches.builder.finish,
            **job.place,
        )

    def open_ledger(start_step: int) -> Ledger:
        return Ledger(config.run.dir / "ledger", start_step=start_step, **job.place)

    export = partial(_export, config, job.model, is_main=runtime.is_main)
    carry_out(
        config,
        runtime,
        job,
        {
            "parameters": job.parameters,
            "data": job.batches.describe(),
            "chosen": chosen,
            "frozen": frozen,
            "kernels": backends(job.model, job.engine.device, compute_dtype(config.engine)),
            **_loss_told(config),
        },
        test=partial(_test, job, heldout),
        export=export if config.export else None,
        plan=plan,
        ledger=open_ledger if config.data.ledger and job.is_first else None,
        compiles=config.model.compile == "layers",
        after_update=job.model.after_update,
    )


def _loss_told(config: PackedConfig) -> dict[str, str]:
    """What a loss of two means is of, for the report."""
    if config.generation is None:
        return {}
    weight = "" if config.generation.weight == 1 else f"{config.generation.weight:g} × "
    return {"loss": f"nats a token, plus {weight}squared error of a latent"}


def _test(job: Job, heldout: "Heldout | None", metrics: "Metrics", step: int) -> None:
    """Evaluate if the step is due; every rank takes part."""
    from triptych_core.evaluation.drawings import draw_if_due
    from triptych_core.evaluation.evaluate import evaluate_if_due

    generation = job.config.generation
    draw = partial(_draw, job, generation) if generation and generation.prompts else None
    if heldout is None and draw is not None:
        draw_if_due(job.engine, job.config, None, draw, metrics, step)
        return
    answer = partial(_answer, job, heldout)
    evaluate_if_due(
        job.engine, job.config, heldout, answer, metrics, step, part=job.part, draw=draw
    )


def _draw(job: Job, generation: GenerationConfig) -> "np.ndarray":
    """What the model draws of the prompts, from the same noise each time, on every rank alike."""
    import torch

    from triptych_data.tensors.joined import JoinedLoader
    from triptych_models.bagel.drawing import draw
    from triptych_models.bagel.model import Bagel
    from triptych_models.diffusion.picture import grid

    assert isinstance(job.batches, JoinedLoader) and isinstance(job.model, Bagel)
    words = [job.processor.encode_words(prompt) for prompt in generation.prompts]
    generator = torch.Generator().manual_seed(0)
    shape = job.batches.tensors.batches.shape
    noise = torch.randn(len(words), *shape, generator=generator).to(job.engine.device)
    drawn = draw(
        job.model,
        words,
        noise,
        steps=generation.steps,
        guidance=generation.guidance,
        shift=job.model.hf.config.timestep_shift,
    )
    return grid(drawn, min(len(words), 10), generation.reach)


def _answer(job: Job, heldout: "Heldout | None", questions: list[int]) -> list[str]:
    """The model's greedy answers to held-out questions."""
    from triptych_models.generate import generate

    assert heldout is not None
    tokens = generate(
        job.model,
        [heldout.prompt(question) for question in questions],
        max_new_tokens=job.config.evaluation.max_new_tokens,
        eos_token_id=job.processor.eos_token_id,
        pad_token_id=job.processor.pad_token_id,
        synced=job.is_synced,
    )
    return [job.processor.decode(row) for row in tokens]


def _export(config: PackedConfig, model: "PackedModel", *, is_main: bool) -> None:
    """Write run.dir/export, and run.dir/adapter of adapters; every rank takes part."""
    from triptych_core.engine.build import compute_dtype, read_parameters
    from triptych_models.export import export
    from triptych_models.lora import export_adapter

    diffusion = config.model.diffusion
    notes = {} if diffusion is None else diffusion.as_note(config.model.path)
    lora, read = config.model.lora, read_parameters(config.engine)
    source, out = config.model.path, config.run.dir
    if lora is not None:
        export_adapter(model.hf, lora, out / "adapter", source, gather=read, is_main=is_main)
    if lora is None or lora.merge:
        export(
            model.hf,
            out / "export",
            source,
            dtype=compute_dtype(config.engine),
            gather=read,
            is_main=is_main,
            overwrite=True,  # this run's own, from before it was continued
            notes=notes,
        )
