"""Bit-exact resume with everything on, at every step: packing, images, adapters, averages, experts.

A run saves after every step. Cut at each of them in turn and gone on with in an engine built anew,
it ends with the same bytes: masters, moments, averages, generators; and logs the same losses.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.tiny import make_model_dir, make_shards, sft_stage

LAST = 3
# All on packed rows with images, two a rank and step, with averages of weights.
RUNS = {
    "experts divided, ZeRO-3": [
        *("engine.zero.stage=3", "engine.precision=fp32", "parallel.expert=2"),
        *("model.moe.aux_loss=0.01", "model.moe.z_loss=0.001", "optim.ema_warmup=true"),
    ],
    "experts divided, ZeRO-0, bf16": [
        *("engine.zero.stage=0", "engine.precision=bf16", "parallel.expert=2", "optim.name=muon"),
        "optim.state_dtype=bf16",
    ],
    "adapters, ZeRO-2, bf16": [
        *("engine.zero.stage=2", "engine.precision=bf16", "model.lora.rank=4"),
        "engine.checkpointing=full",
    ],
    "Muon, frozen tower, ZeRO-3": [
        *("engine.zero.stage=3", "engine.precision=fp32", "optim.name=muon"),
        "model.freeze=[vision]",
    ],
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("everything")
    make_model_dir(path / "dense")
    make_mixture(make_model_dir(path / "experts") / "config.json")
    make_shards(path / "train", 60)
    return path


def make_mixture(file: Path) -> None:
    """Give a dense model's configuration four experts."""
    config = json.loads(file.read_text())
    config |= {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config["text_config"] |= {"model_type": "qwen3_vl_moe_text", **experts}
    config["vision_config"]["model_type"] = "qwen3_vl_moe_vision"
    file.write_text(json.dumps(config))


def resumed_at_every_step(workspace: Path, names: list[str]) -> dict[str, list[str]]:
    """Of each run what differs after a cut at each step; nothing, it is hoped."""
    import torch.distributed as dist

    sys.path.insert(0, str(Path(sft_stage().__file__).parent))
    import wiring
    from verifying import take_steps

    from triptych_core.config import RunConfig, load_config
    from triptych_core.launch import launch

    runtime = launch(RunConfig(device="cpu"))
    problems: dict[str, list[str]] = {}
    for number, name in enumerate(names):
        kind = "experts" if "experts" in name else "dense"
        base = [
            *(f"run.steps={LAST}", "run.device=cpu", "optim.lr=1e-2", "optim.ema_decay=0.9"),
            *(f"model.path={workspace / kind}", "model.init=random", "model.compile=none"),
            *(f"data.shards=[{workspace / 'train/shards'}]", "data.seq_len=256"),
            *("data.num_workers=0", "engine.gradient_accumulation_steps=2"),
            *("checkpoint.every=1", "checkpoint.keep=9", "engine.zero.persistence_threshold=40"),
            *RUNS[name],
        ]
        whole = workspace / f"runs/{number}"
        for cut in range(LAST):
            run_dir = whole if cut == 0 else whole.with_name(f"{number}-{cut}")
            if runtime.is_main:
                run_dir.mkdir(parents=True)
                if cut:
                    copy_until(whole, run_dir, cut)
            dist.barrier()
            config = load_config(sft_stage().SftConfig, None, [f"run.dir={run_dir}", *base])
            take_steps(wiring.build_job(config, runtime), runtime)
            if cut:
                problems.setdefault(name, []).extend(differences(whole, run_dir, cut))
    return problems


def copy_until(whole: Path, run_dir: Path, cut: int) -> None:
    for step in range(1, cut + 1):
        name = f"checkpoints/step-{step:06d}"
        shutil.copytree(whole / name, run_dir / name)
    shutil.copy(whole / "metrics.jsonl", run_dir)


def differences(whole: Path, run_dir: Path, cut: int) -> list[str]:
    from triptych_core.checkpoint.manifest import read_manifest
    from triptych_core.verify.checks import steps

    name = f"checkpoints/step-{LAST:06d}"
    ours, theirs = read_manifest(whole / name), read_manifest(run_dir / name)
    found = [
        f"cut after {cut}: {file}"
        for file in ours | theirs
        if file != "state.json" and ours.get(file) != theirs.get(file)
    ]
    exact = ("step", "loss", "grad_norm", "num_targets", "lr")
    lines = [[[line[k] for k in exact] for line in steps(folder)] for folder in (whole, run_dir)]
    assert len(lines[0]) == LAST
    return found + ([] if lines[0] == lines[1] else [f"cut after {cut}: losses"])


def test_a_run_cut_at_any_step_ends_with_the_same_bytes(workspace):
    for problems in run_ranks(resumed_at_every_step, 2, workspace, list(RUNS)):
        assert problems == {name: [] for name in RUNS}
