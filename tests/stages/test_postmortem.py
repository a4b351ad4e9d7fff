"""A run that is out of memory ends with the module, the samples and the line that helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import make_model_dir, make_shards, sft_stage


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("postmortem")
    make_model_dir(path / "model")
    make_shards(path / "train", 20, seed=1)
    return path


def words(workspace: Path, *more: str) -> list[str]:
    return [
        f"run.dir={workspace / 'run'}",
        "run.steps=3",
        "run.device=cpu",
        f"model.path={workspace / 'model'}",
        "model.init=random",
        f"data.shards=[{workspace / 'train/shards'}]",
        "data.seq_len=256",
        "data.num_workers=0",
        "data.ledger=true",
        "checkpoint.save=false",
        "engine.zero.stage=1",
        "engine.zero.bucket_size=1000",
        "export=false",
        *more,
    ]


def fail_in_attention(at_call: int) -> None:
    """Let the attention of layer 1 run out of memory at its n-th call."""
    calls = [0]

    def hook(module: torch.nn.Module, args: Any) -> None:
        if type(module).__name__ == "Qwen3VLTextAttention" and module.layer_idx == 1:
            calls[0] += 1
            if calls[0] == at_call:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    torch.nn.modules.module.register_module_forward_pre_hook(hook)


def notes_of_a_failed_run(workspace: Path, at_call: int, more: list[str]) -> list[str]:
    from triptych_core.config import load_config

    fail_in_attention(at_call)
    module = sft_stage()
    try:
        module.main(load_config(module.SftConfig, None, words(workspace, *more)))
    except torch.OutOfMemoryError as error:
        return error.__notes__
    raise AssertionError("the run did not fail")


def peaks(workspace: Path) -> dict[str, float]:
    """GiB under ZeRO-1, by checkpointing."""
    from triptych_core.config import load_config

    module = sft_stage()
    arguments = words(workspace, "engine.checkpointing=auto")
    plan = module.plan(load_config(module.SftConfig, None, arguments))
    return {choice.checkpointing: choice.memory.peak / 2**30 for choice in plan.choices}


def test_the_end_names_module_samples_and_remedy(workspace):
    (peak,) = run_ranks(peaks, 1, workspace)
    fits_selective = f"plan.gpu_memory_gib={(peak['none'] + peak['selective']) / 2:.9f}"
    more = [fits_selective, "plan.headroom=0"]
    # Under ZeRO-1 on one rank; the second call is of the second step.
    (notes,) = run_ranks(notes_of_a_failed_run, 1, workspace, 2, more)
    assert notes[0].startswith(
        "out of memory in hf.model.language_model.layers.1.self_attn (forward), input_ids (1, 256)"
    )
    assert notes[2] == "to make it fit: set engine.checkpointing=selective"
    # The samples are those of the second step's batch, which the ledger of a whole run names.
    assert notes[1].startswith("samples: ")
    named = notes[1].removeprefix("samples: ").split(", ")
    assert len(named) == len(second_batch(workspace)) > 0
    assert named == second_batch(workspace)


def second_batch(workspace: Path) -> list[str]:
    from triptych_core.config import load_config
    from triptych_data.loader import PackLoader
    from triptych_data.processor import Processor

    config = load_config(sft_stage().SftConfig, None, words(workspace))
    processor = Processor.from_directory(config.model.path)
    batches = iter(PackLoader(config.data, processor, rank=0, world_size=1))
    next(batches)
    return list(next(batches)["sample_keys"])


def test_in_recomputation_the_phase_is_backward(workspace):
    # With full checkpointing every second call is the recomputation.
    more = ["engine.checkpointing=full", "plan.gpu_memory_gib=0.0001"]
    (notes,) = run_ranks(notes_of_a_failed_run, 1, workspace, 2, more)
    assert "layers.1.self_attn (backward)" in notes[0]
    assert notes[2] == "to make it fit: take more ranks, or set engine.zero.offload_optimizer=true"
