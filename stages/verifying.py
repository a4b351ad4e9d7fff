"""`--verify`: what may be wrong with a configuration, on its first rows, before the long run.

No stage itself; `wiring.run` comes here instead of training. Built three times, as configured: to
compare rows, documents and stock transformers and take six steps; to go on after the third of them
from the checkpoint; and to take the first step with every rank computing the rows of all. So it
costs about 9 steps and one of a window times the ranks, three loads of the model, two checkpoints
and one export on the disk of run.dir, and for a moment a copy of the model in fp32 in host memory.
What does not fit is skipped, and said. A checkpoint of the run itself is neither read nor touched.
"""

import gc
import shutil
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from planning import PackedConfig, begin
from torch import Tensor
from wiring import Job, build_job, join_images

from triptych_core.checkpoint.saver import Saver, resume
from triptych_core.checkpoint.together import on_main
from triptych_core.engine.build import compute_dtype, read_parameters
from triptych_core.launch import Runtime, shutdown
from triptych_core.loop import to_device, train
from triptych_core.metrics import Metrics
from triptych_core.run import device_name
from triptych_core.verify.checks import (
    ROUNDING,
    Check,
    as_table,
    compare_layouts,
    compare_rehearsals,
    cut_run,
    dump,
    judged,
    largest,
    relative_error,
    say,
    short_run,
    timed,
)
from triptych_core.verify.page import draw_page
from triptych_data.loader import PackLoader
from triptych_data.look.preview import build_page
from triptych_data.tensors.joined import JoinedLoader
from triptych_models.bagel.model import Bagel
from triptych_models.export import export
from triptych_models.generate import model_inputs

# Of a bf16 model against the same weights in fp32: what rounding adds up to over all layers.
STOCK_ROUNDING = {"fp32": 1e-4, "bf16": 6e-2}
SEARCHED = 64  # rows that are looked through for such with several documents


class Row(NamedTuple):
    """A packed row, and its documents alone in rows of their own."""

    batch: dict[str, Any]
    alone: list[dict[str, Any]]


def verify(config: PackedConfig) -> None:
    """Check, write run.dir/verify.html and verify.json, and exit with 1 if something is wrong."""
    config, runtime, _ = begin(config)
    folder = config.run.dir / "verify"
    if runtime.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "whole").mkdir(parents=True)
    dist.barrier()
    checks, samples = check_all(config, runtime, folder)
    if runtime.is_main:
        shutil.rmtree(folder)
        page = draw_page(checks, _facts(config, runtime), samples)
        (config.run.dir / "verify.html").write_text(page, "utf-8")
        (config.run.dir / "verify.json").write_text(dump(checks))
        say([*as_table(checks), f"written to {config.run.dir / 'verify.html'}"])
    shutdown()
    if any(check.status == "fail" for check in checks):
        sys.exit(1)


def check_all(config: PackedConfig, runtime: Runtime, folder: Path) -> tuple[list[Check], str]:
    """All checks, alike on every rank, and the page of samples; folder takes three short runs."""
    checks, samples = _check_rows(short_run(config, folder / "whole"), runtime, folder / "export")
    for check in (rehearse_resume, check_ranks):
        _free_memory()  # or two engines would be there at once
        checks.append(timed(partial(check, config, runtime, folder)))
    return checks, samples


def _check_rows(config: PackedConfig, runtime: Runtime, folder: Path) -> tuple[list[Check], str]:
    job = build_job(config, runtime)
    rows = first_rows(job)
    samples = _sample_page(job) if runtime.is_main else ""
    checks = [
        timed(partial(check, job, rows))
        for check in (
            check_targets,
            check_documents,
            check_packing,
            partial(check_stock, folder=folder),
        )
    ]
    take_steps(job, runtime)
    return checks, samples


def first_rows(job: Job) -> list[Row]:
    """The first rows of the stream that hold several documents, the same on every rank."""
    settings, found = job.config.verify, []
    for pack in islice(job.batches.plan.packs(0), SEARCHED):
        ids = pack.samples.tolist()
        if len(ids) > 1 and len(found) < settings.rows:
            alone = [_build(job, [number]) for number in ids[: settings.documents]]
            found.append(Row(_build(job, ids), alone))
    if not found:  # documents as long as rows
        ids = next(job.batches.plan.packs(0)).samples.tolist()
        found.append(Row(_build(job, ids), [_build(job, [number]) for number in ids]))
    return found


def check_targets(job: Job, rows: list[Row]) -> Check:
    """Every document has a target, and not everything is one in chats."""
    batches = [row.batch for row in rows]
    targets = sum(batch["num_targets"] for batch in batches)
    tokens = sum(batch["num_tokens"] for batch in batches)
    empty = [
        key
        for row in rows
        for alone in row.alone
        if alone["num_targets"] == 0
        for key in alone["sample_keys"]
    ]
    found = f"{targets:,} of {tokens:,} tokens ({targets / max(tokens, 1):.1%}) are targets"
    figures = [("documents without a target", ", ".join(empty) or "none")]
    status = "fail" if empty or not targets else "pass"
    return Check("Every document has something to train on", status, found, figures)


def check_documents(job: Job, rows: list[Row]) -> Check:
    """Other tokens in one document change nothing in the others: not a bit, but of experts."""
    name = "Documents of a row do not see each other"
    moved, changed = 0.0, 0.0
    for row in rows:
        starts = row.batch["cu_seqlens"].tolist()
        before = states(job, row.batch)
        for first, last in {(starts[0], starts[1]), (starts[-2], starts[-1])}:
            after = states(job, _other_tokens(job, row.batch, first, last))
            outside = torch.ones(len(before), dtype=torch.bool)
            outside[first:last] = False
            moved = largest([moved, relative_error(after[outside], before[outside])])
            changed = largest([changed, relative_error(after[~outside], before[~outside])])
    if changed == 0.0:
        return Check(name, "skipped", "no row has a document whose tokens can be exchanged")
    # How many tokens an expert gets may choose another kernel for it.
    limit = ROUNDING[job.config.engine.precision] if "experts" in job.model.parts() else 0.0
    figures = [("the document itself moved by", f"{changed:.1e}")]
    return judged(name, _worst(moved), limit, "the others moved by", figures=figures)


def check_packing(job: Job, rows: list[Row]) -> Check:
    """A document in a row has the states that it has alone."""
    figures, errors = [], []
    for row in rows:
        together = states(job, row.batch)
        for document, alone in enumerate(row.alone):
            first, last = row.batch["cu_seqlens"][document : document + 2].tolist()
            error = relative_error(together[first:last], states(job, alone)[: last - first])
            errors.append(_worst(error))
            figures.append((" ".join(alone["sample_keys"]), f"{errors[-1]:.1e}"))
    limit = ROUNDING[job.config.engine.precision]
    what = f"last states of {len(errors)} documents off by"
    return judged(
        "A document packed is as it is alone", largest(errors), limit, what, figures=figures
    )


def check_stock(job: Job, rows: list[Row], folder: Path) -> Check:
    """The exported model in stock transformers, fp32 on the host, has the same states."""
    name = "The model is that of stock transformers"
    if isinstance(job.model, Bagel):
        return Check(name, "skipped", "transformers has no such model")
    needed = 4 * sum(job.parameters.values())
    free = min(psutil.virtual_memory().available, shutil.disk_usage(folder.parent).free)
    if not _agree(needed * 2 < free):
        found = f"needs {needed / 2**30:.1f} GiB of host memory and disk, twice that free"
        return Check(name, "skipped", found)
    config, is_main = job.config, dist.get_rank() == 0
    export(
        job.model.hf,
        folder,
        config.model.path,
        dtype=compute_dtype(config.engine),
        gather=read_parameters(config.engine),
        is_main=is_main,
    )
    documents = [alone for row in rows for alone in row.alone]
    shortest = sorted(documents, key=lambda alone: int(alone["num_tokens"]))[:3]
    ours = [states(job, alone)[: int(alone["num_tokens"])] for alone in shortest]
    errors: list[Any] = [None]
    if is_main:
        stock = type(job.model.hf).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        shutil.rmtree(folder)
        wanted = (_stock_states(job, stock.eval(), alone) for alone in shortest)
        errors = [[relative_error(*pair) for pair in zip(ours, wanted, strict=True)]]
    dist.broadcast_object_list(errors, src=0)
    keys = (" ".join(alone["sample_keys"]) for alone in shortest)
    figures = [(key, f"{error:.1e}") for key, error in zip(keys, errors[0], strict=True)]
    what = f"last states of {len(shortest)} documents off by"
    limit = STOCK_ROUNDING[config.engine.precision]
    return judged(name, largest(errors[0]), limit, what, figures=figures)


def rehearse_resume(config: PackedConfig, runtime: Runtime, folder: Path) -> Check:
    """Go on from the checkpoint of a run that went through, in an engine built anew."""
    if runtime.is_main:
        cut_run(folder / "whole", folder / "cut")
    dist.barrier()
    take_steps(build_job(short_run(config, folder / "cut"), runtime), runtime)
    check: Check = on_main(partial(compare_rehearsals, folder / "whole", folder / "cut"))
    return check


def check_ranks(config: PackedConfig, runtime: Runtime, folder: Path) -> Check:
    """The first step, with every rank computing the rows of all of them."""
    name = "The ranks together take the step of one rank"
    accumulation = config.engine.gradient_accumulation_steps
    window = runtime.world_size // config.parallel.ranks_per_row * accumulation
    most = config.verify.max_window
    if window == accumulation:
        return Check(name, "skipped", "the ranks do not divide rows")
    if window > most:
        return Check(name, "skipped", f"a step has {window} rows, verify.max_window is {most}")
    together = short_run(config, folder / "together", gradient_accumulation_steps=window)
    together.checkpoint.save = False
    together.run.steps = 1
    if runtime.is_main:
        together.run.dir.mkdir()
    job = build_job(together, runtime)
    finish = job.batches.builder.finish
    alone = {"rank": 0, "world_size": 1}
    rows = PackLoader(config.data, job.processor, **alone, finish=finish)
    take_steps(job, runtime, join_images(config, rows, job.processor, alone))
    runs = folder / "whole", folder / "together"
    check: Check = on_main(partial(compare_layouts, *runs, config.engine.precision))
    return check


def take_steps(
    job: Job, runtime: Runtime, batches: PackLoader | JoinedLoader | None = None
) -> None:
    """Train a short run to its end, from its checkpoint if it has one, and let go of the engine."""
    config, batches = job.config, batches or job.batches
    start = resume(job.engine, config, batches).step
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
    with Metrics(config, **ranks, start_step=start) as metrics:
        train(
            job.engine,
            iter(batches),
            config,
            flops=job.model.flops,
            metrics=metrics,
            part=job.part,
            start_step=start,
            on_step=[Saver(job.engine, config, batches, metrics)],
            after_update=job.model.after_update,
        )
    job.engine.destroy()
    dist.barrier()


@torch.no_grad()
def states(job: Job, batch: dict[str, Any]) -> Tensor:
    """(T, H) fp32 on the host: what the head is given, of a row that all ranks compute."""
    given: list[Tensor] = []
    hook = job.model.hf.lm_head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    job.engine.eval()
    try:
        job.engine(**to_device(job.part(batch), job.engine.device))
    finally:
        hook.remove()
        job.engine.train()
    mine = given[0][0].float()  # (T / N, H)
    parallel = job.config.parallel
    if parallel.sequence == 1:
        return mine.cpu()
    whole = mine.new_zeros(batch["input_ids"].numel(), mine.shape[-1])
    if job.place["rank"] == 0 and dist.get_rank() % parallel.tensor == 0:
        numbers = torch.arange(len(whole))[None]
        whole[job.part(batch | {"input_ids": numbers})["input_ids"][0]] = mine
    dist.all_reduce(whole)
    return whole.cpu()


def _stock_states(job: Job, stock: Any, alone: dict[str, Any]) -> Tensor:
    """(L, H) of a document, by stock transformers from ids and pixels; of videos in one grid, from
    our positions, too, and of a LLaVA-OneVision from what its language model is given."""
    document = _Document(
        alone["input_ids"][0, : alone["num_tokens"]],
        alone.get("pixel_values"),
        alone.get("image_grid_thw"),
        alone.get("audio_features"),
        alone.get("audio_lengths"),
        alone["position_ids"].flatten(0, -2)[:, : alone["num_tokens"]],
        alone.get("image_positions"),
        alone.get("image_taps"),
        alone.get("image_tap_weights"),
    )
    given: list[Tensor] = []
    hook = stock.lm_head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    inputs = model_inputs(job.model, [document], job.processor.pad_token_id, force_image=False)
    if job.model.diffusion is not None:  # stock looks both ways if a mask of its own says so
        inputs["attention_mask"] = torch.zeros(1, 1, *2 * document.input_ids.shape)
    with torch.no_grad():
        given_to_stock = {key: value.cpu() for key, value in inputs.items()}
        if "inputs_embeds" in inputs:
            given_to_stock["inputs_embeds"] = given_to_stock["inputs_embeds"].float()
        stock(**given_to_stock)
    hook.remove()
    return given[0][0].float()


class _Document(NamedTuple):
    """A document as `model_inputs` takes a prompt."""

    input_ids: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    audio_features: Tensor | None
    audio_lengths: Tensor | None
    position_ids: Tensor
    image_positions: Tensor | None
    image_taps: Tensor | None
    image_tap_weights: Tensor | None


def _other_tokens(job: Job, batch: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """The row with the text of one document turned by a place; media stay where they are."""
    ids = batch["input_ids"].clone()
    here = torch.zeros_like(ids, dtype=torch.bool)
    here[:, first:last] = True
    media = (
        job.processor.image_token_id,
        job.processor.video_token_id,
        job.processor.audio_token_id,
    )
    for token in media:
        if token is not None:
            here &= ids != token
    ids[here] = ids[here].roll(1)
    return batch | {"input_ids": ids}


def _build(job: Job, ids: list[int]) -> dict[str, Any]:
    return job.batches.builder.build(ids, lambda sample: None)


def _sample_page(job: Job) -> str:
    count = job.config.verify.samples
    if count == 0:
        return ""
    path = job.config.model.path
    return build_page(job.batches.shards, path, count, processor=job.processor)


def _free_memory() -> None:
    gc.collect()
    get_accelerator().empty_cache()


def _worst(error: float) -> float:
    """Of all ranks."""
    device = torch.device(get_accelerator().current_device_name())
    worst = torch.tensor(error, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def _agree(fits: bool) -> bool:
    """Whether it fits on all ranks."""
    return _worst(float(not fits)) == 0.0


def _facts(config: PackedConfig, runtime: Runtime) -> dict[str, str]:
    parallel = config.parallel
    return {
        "model": str(config.model.path),
        "data": ", ".join(str(s) for s in config.data.shards) or ", ".join(config.data.sources),
        "rows": f"{config.data.seq_len:,} tokens",
        "ranks": f"{runtime.world_size} × {device_name()}; {parallel.sequence} a row, "
        f"{parallel.tensor} a weight, {parallel.expert} for all experts",
        "engine": f"ZeRO-{config.engine.zero.stage}, {config.engine.precision}, "
        f"accumulation {config.engine.gradient_accumulation_steps}, "
        f"checkpointing {config.engine.checkpointing}, compile {config.model.compile}",
        "optimizer": f"{config.optim.name}, lr {config.optim.lr:g}",
    }
