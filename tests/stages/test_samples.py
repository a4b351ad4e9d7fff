"""Samples from shards to gradients, against stock transformers in fp64 on each sample alone.

Real images and chats through the data package's packing, on two ranks; the layouts are
test_parity.py's. One pack has no images, one has no targets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import make_model_dir, make_shards

SEQ_LEN = 512
# Samples of each pack; their number of images is index % 3. The second pack is text only, the
# third holds nothing but padding.
PACKS = [[0, 1, 2], [3, 6, 9], [], [4, 5], [7], [8, 10], [12, 13], [11]]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("parity")
    make_model_dir(path / "model")
    make_shards(path / "data", 14)
    return path


def encoded(workspace: Path) -> tuple[Any, list[Any]]:
    from triptych_data.processor import Processor
    from triptych_data.shards.reader import Shards

    processor = Processor.from_directory(workspace / "model")
    shards = Shards.open([workspace / "data/shards"])
    return processor, [processor.encode(shards.read(i)) for i in range(shards.num_samples)]


@pytest.fixture(scope="module")
def reference(workspace) -> dict[int, tuple[float, dict[str, torch.Tensor]]]:
    """For 8 packs: loss and gradients by stock transformers in fp64."""
    from transformers import Qwen3VLForConditionalGeneration

    from triptych_models.config import ModelConfig
    from triptych_models.export import export
    from triptych_models.families import build_model

    config = ModelConfig(path=workspace / "model", init="random", seed=3)
    ours = build_model(config, dtype=torch.float32)
    export(ours.hf, workspace / "start", workspace / "model", dtype=torch.float32)
    stock = Qwen3VLForConditionalGeneration.from_pretrained(
        workspace / "start", dtype=torch.float64, attn_implementation="sdpa"
    )
    processor, samples = encoded(workspace)
    results = {}
    for num_packs in (8,):
        chosen = [samples[i] for pack in PACKS[:num_packs] for i in pack]
        stock.zero_grad()
        num_targets = sum(sample.num_targets for sample in chosen)
        loss = sum(alone(stock, processor, sample) for sample in chosen) / num_targets
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in stock.named_parameters()}
        results[num_packs] = (loss.item(), gradients)
    return results


def alone(stock: Any, processor: Any, sample: Any) -> torch.Tensor:
    """Summed loss of one unpacked sample, with stock positions and stock label shift."""
    inputs: dict[str, Any] = {"input_ids": sample.input_ids[None]}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.image_token_id).int()
    if sample.pixel_values is not None:
        inputs["pixel_values"] = sample.pixel_values.double() / 127.5 - 1
        inputs["image_grid_thw"] = sample.image_grid_thw
    logits = stock(**inputs).logits[0]
    return torch.nn.functional.cross_entropy(
        logits, sample.shift_labels, ignore_index=-100, reduction="sum"
    )


def gradients_of_a_step(
    workspace: Path, stage: int, accumulation: int, seed: int = 3
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """One step of the real loop on this rank's share of the packs."""
    import torch.distributed as dist

    from tests.tiny import whole_gradients
    from triptych_core.config import StageConfig, load_config
    from triptych_core.engine.build import build_engine, gather_parameters, sharded_init
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_data.batch import collate
    from triptych_models.config import ModelConfig
    from triptych_models.families import build_model
    from triptych_models.freeze import parameter_parts

    rank, world_size = dist.get_rank(), dist.get_world_size()
    run_dir = workspace / f"run-{stage}-{world_size}-{accumulation}"
    config = load_config(
        StageConfig,
        None,
        [
            f"run.dir={run_dir}",
            "run.steps=1",
            "run.device=cpu",
            "engine.precision=fp32",
            f"engine.zero.stage={stage}",
            f"engine.gradient_accumulation_steps={accumulation}",
            "engine.zero.persistence_threshold=0",
            "engine.zero.bucket_size=5000",
            "optim.max_grad_norm=0.5",
        ],
    )
    if rank == 0:
        run_dir.mkdir()
    with sharded_init(config.engine, world_size):
        model = build_model(
            ModelConfig(path=workspace / "model", init="random", seed=seed),
            dtype=torch.float32,
            gather=gather_parameters(config.engine),
        )
    groups = parameter_groups(
        model.named_parameters(), config.optim, parameter_parts(model).__getitem__
    )
    optimizer = build_optimizer(groups, config.optim)
    engine = build_engine(model, optimizer, config.engine, config.optim, world_size, model.layers())
    gradients: dict[str, torch.Tensor] = {}
    take_step = engine.step

    def look_then_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            for name, gradient in whole_gradients(engine).items():
                gradients[name.removeprefix("hf.")] = gradient
        take_step()

    engine.step = look_then_step
    processor, samples = encoded(workspace)
    mine = PACKS[: world_size * accumulation][rank::world_size]
    batches = [
        collate(
            [samples[i] for i in pack],
            SEQ_LEN,
            pad_token_id=processor.pad_token_id,
            position_axes=processor.position_axes,
        )
        for pack in mine
    ]
    with Metrics(config, rank=rank, world_size=world_size) as metrics:
        train(engine, iter(batches), config, flops=model.flops, metrics=metrics)
    engine.destroy()
    dist.barrier()
    line = json.loads((run_dir / "metrics.jsonl").read_text())
    return line["loss"], line["grad_norm"], gradients


def on_a_rank(workspace: Path) -> list[dict[int, Any]]:
    """By stage, then by accumulation."""
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    launch(RunConfig(device="cpu"))
    return [{4: gradients_of_a_step(workspace, stage, 4)} for stage in (0, 3)]


def test_gradients_equal_those_of_each_sample_alone(workspace, reference):
    of_ranks = run_ranks(on_a_rank, 2, workspace)
    for number, stage in enumerate((0, 3)):
        check([found[number] for found in of_ranks], reference, stage)


def check(results: list[dict[int, Any]], reference: dict[int, Any], stage: int) -> None:
    world_size = len(results)
    for result in results:
        for accumulation, (loss, norm, gradients) in result.items():
            wanted_loss, wanted = reference[world_size * accumulation]
            where = f"stage {stage}, {world_size} ranks, accumulation {accumulation}"
            assert loss == pytest.approx(wanted_loss, rel=1e-5), where
            total = torch.stack([g.norm() for g in wanted.values()]).norm().item()
            assert norm == pytest.approx(total, rel=1e-5), where
            assert gradients.keys() == wanted.keys()
            for name, gradient in gradients.items():
                error = (gradient.double() - wanted[name]).norm().item()
                # A vision weight's gradient may be tiny beside the rest: relative to itself, or
                # to a ten-thousandth of the whole.
                scale = max(wanted[name].norm().item(), 1e-4 * total)
                assert error <= 1e-5 * scale, f"{where}: {name} off by {error / scale:.1e}"
