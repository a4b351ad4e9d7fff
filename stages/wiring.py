"""What stages on packed rows share once they are configured: the run from shards to export.

No stage itself: a stage says what it sets otherwise of `planning.PackedConfig`, and begins the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from planning import GenerationConfig, PackedConfig, begin, plan, require_part, settle_parts
from running import carry_out

if TYPE_CHECKING:
    import numpy as np

    from triptych_core.launch import Runtime
    from triptych_core.loop import Part as RowPart
    from triptych_core.metrics import Metrics
    from triptych_data.batch import Finish
    from triptych_data.heldout import Heldout
    from triptych_data.loader import PackLoader
    from triptych_data.processor import Processor
    from triptych_data.tensors.joined import JoinedLoader
    from triptych_models.packed import PackedModel


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
