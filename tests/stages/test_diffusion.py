"""The diffusion stage: on other ranks the same, resumed to the last bit, and it learns."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partialmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import ROOT
from triptych_core.engine import build  # noqa: F401  imported once, not in every forked process
from triptych_core.evaluation import drawings  # noqa: F401
from triptych_data.tensors import loader  # noqa: F401
from triptych_data.tensors.write import write_tensor_shards
from triptych_models.diffusion import sit_model  # noqa: F401

SHAPE = (2, 4, 4)


def stage() -> ModuleType:
    sys.path.insert(0, str(ROOT / "stages"))
    import diffusion

    return diffusion


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("diffusion")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 22), ("heldout", 5), ("few", 4)):
        rows = torch.randn(count, *SHAPE, generator=generator)
        samples = [({"label": i % 3}, {"latents": row}) for i, row in enumerate(rows)]
        write_tensor_shards(samples, path / name, samples_per_shard=9)
    return path


def words(workspace: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        f"run.dir={run_dir}",
        "run.steps=6",
        "run.device=cpu",
        "model.sit={size: custom, hidden_size: 16, num_layers: 2, num_heads: 2, image_size: 4, "
        "channels: 2, num_classes: 3}",
        f"data.shards=[{workspace / 'train'}]",
        "data.batch_size=4",
        "data.num_workers=0",
        "engine.precision=fp32",
        "engine.zero.persistence_threshold=0",
        "engine.zero.stage=0",
        "optim.lr=1e-2",
        "optim.ema_decay=0.9",
        "sampler={method: sde_euler, steps: 3, guidance: 2.0}",
        "samples.count=6",
        "checkpoint.every=3",
        "checkpoint.keep=9",
        f"evaluation.shards=[{workspace / 'heldout'}]",
        "evaluation.every=3",
        "log.progress=false",
        *more,
    ]


def train(overrides: list[str]) -> None:
    from triptych_core.config import load_config

    diffusion = stage()
    diffusion.main(load_config(diffusion.DiffusionConfig, None, overrides))


def lines(run_dir: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "export/model.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(workspace: Path) -> Path:
    """One rank, two micro-batches a step."""
    run_dir = workspace / "alone"
    run_ranks(train, 1, words(workspace, run_dir, "engine.gradient_accumulation_steps=2"))
    return run_dir


@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_compute_what_one_does(workspace: Path, alone: Path, zero: int):
    run_dir = workspace / f"zero-{zero}"
    run_ranks(train, 2, words(workspace, run_dir, f"engine.zero.stage={zero}"))
    for ours, theirs in zip(lines(run_dir), lines(alone), strict=True):
        for name in ("num_targets", "num_images", "flops", "lr", "packing_fill"):
            assert ours[name] == theirs[name], name
        for name in ("loss", "grad_norm"):
            assert abs(ours[name] / theirs[name] - 1) < 1e-4, name
    for ours, theirs in zip(lines(run_dir, "evaluation"), lines(alone, "evaluation"), strict=True):
        assert abs(ours["heldout_loss"] / theirs["heldout_loss"] - 1) < 1e-4
    expected = weights(alone)
    for name, value in weights(run_dir).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_resumed_run_is_the_same_to_the_last_bit(workspace: Path, alone: Path):
    run_dir = workspace / "resumed"
    shutil.copytree(alone, run_dir)
    shutil.rmtree(run_dir / "checkpoints/step-000006")
    shutil.rmtree(run_dir / "export")
    run_ranks(train, 1, words(workspace, run_dir, "engine.gradient_accumulation_steps=2"))
    assert len(json.loads((run_dir / "run.json").read_text())["resumes"]) == 1
    for ours, theirs in zip(lines(run_dir), lines(alone), strict=True):
        for name in ("step", "loss", "grad_norm", "num_targets"):
            assert ours[name] == theirs[name], name
    assert lines(run_dir, "evaluation") == lines(alone, "evaluation")  # pictures, too
    expected = weights(alone)
    for name, value in weights(run_dir).items():
        assert torch.equal(value, expected[name]), name


def test_the_run_folder_tells_what_was_learnt(alone: Path):
    assert [line["step"] for line in lines(alone, "evaluation")] == [0, 3, 6]
    assert lines(alone)[0]["num_targets"] == 8 * 32  # elements of eight latents
    report = (alone / "report.html").read_text()
    assert report.count('alt="samples at step') == 3
    assert "squared error of velocity, an element" in report
    assert "images/s, median" in report
    assert "nats" not in report
    config = json.loads((alone / "export/config.json").read_text())
    assert config["sit"]["hidden_size"] == 16


def test_a_handful_of_latents_is_memorised(workspace: Path):
    run_dir = workspace / "few"
    more = ("run.steps=150", f"data.shards=[{workspace / 'few'}]", "evaluation.every=0")
    more += ("objective.condition_dropout=0", "checkpoint.save=false", "data.batch_size=16")
    more += ("optim.lr=1e-2", "evaluation.shards=[]", "sampler.method=euler")
    run_ranks(train, 1, words(workspace, run_dir, *more))
    losses = [line["loss"] for line in lines(run_dir)]
    assert losses[0] > 1.5  # of a net that gives zeros: the variance of data less noise
    assert sum(losses[-20:]) / 20 < 0.75


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("plan.image_share=0.1", r"plan.image_share: must be 0.5 in this stage, got 0.1"),
        ("parallel.sequence=2", r"parallel.sequence: must be 1 in this stage, got 2"),
        ("model.sit.sise=XL", r"model.sit.sise: .* did you mean 'size'"),
        ("model.freeze=[vision]", r"model.freeze: must name parts of the model \(embedders"),
        ("objective.weighting=velocity", r"objective.weighting: must be none"),
        ("sampler.strength=0.5", r"euler, heun or dopri5 with sampler.strength below 1, got sde"),
    ],
)
def test_what_the_stage_cannot_do_is_refused(workspace: Path, word: str, message: str):
    from triptych_core.config import load_config

    with pytest.raises(ValueError, match=message):
        load_config(stage().DiffusionConfig, None, words(workspace, workspace / "x", word))


def test_latents_of_another_shape_are_refused(workspace: Path):
    bad = words(workspace, workspace / "bad", "model.sit.image_size=8")
    with pytest.raises(RuntimeError, match=r"channels and image_size must be those of the latents"):
        run_ranks(train, 1, bad)


@pytest.mark.parametrize(
    "name", ["diffusion_sit_tiny", "diffusion_sit_xl_2", "diffusion_wan_2.1_v2v_1.3b"]
)
def test_the_shipped_configurations_are_valid(name: str):
    from triptych_core.config import load_config

    path = ROOT / f"stages/configs/{name}.yaml"
    config = load_config(stage().DiffusionConfig, path)
    assert config.optim.weight_decay == 0.0


@pytest.mark.parametrize("way", ["ti2v", "v2v"])
def test_a_wan_with_a_given_frame_or_source_is_the_same_on_two_ranks(workspace: Path, way: str):
    pytest.importorskip("diffusers")
    from tests.models.test_wan import folder
    from triptych_data.tensors.write import write_tensor_shards

    generator = torch.Generator().manual_seed(1)
    samples = [
        (
            {},
            {
                "latents": torch.randn(4, 3, 4, 4, generator=generator),
                "text_features": torch.randn(2 + i % 3, 6, generator=generator),
                "source_latents": torch.randn(4, 3, 4, 4, generator=generator),
            },
        )
        for i in range(9)
    ]
    write_tensor_shards(samples, workspace / f"videos-{way}")
    channels = 8 if way == "v2v" else 4
    wan = folder(workspace / f"wan-{way}", in_channels=channels)
    more = [f"model={{family: wan, path: {wan}}}", "run.steps=2"]
    more += [
        f"data.shards=[{workspace / f'videos-{way}'}]",
        "evaluation.shards=[]",
        "data.batch_size=1",
    ]
    more += ["data.text_len=5", "objective.shift=5.0", "samples.count=2"]
    sampler = "method: euler, steps: 2, guidance: 2.0, shift: 5.0"
    if way == "v2v":
        more += ["data.features=[source_latents]", f"sampler={{{sampler}, strength: 0.5}}"]
    else:
        more += ["data.given_frames=1", f"sampler={{{sampler}}}"]
    one, two = workspace / f"wan-1-{way}", workspace / f"wan-2-{way}"
    run_ranks(
        train, 1, words(workspace, one, *more, "engine.gradient_accumulation_steps=2"), timeout=600
    )
    run_ranks(train, 2, words(workspace, two, *more, "engine.zero.stage=3"), timeout=600)
    for ours, theirs in zip(lines(two), lines(one), strict=True):
        assert (
            ours["num_targets"] == theirs["num_targets"] == 2 * 4 * (2 if way == "ti2v" else 3) * 16
        )
        for name in ("loss", "grad_norm"):
            assert abs(ours[name] / theirs[name] - 1) < 1e-4, name
    from safetensors.torch import load_file

    file = "export/diffusion_pytorch_model.safetensors"
    expected = load_file(one / file)
    for name, value in load_file(two / file).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_verify_passes_and_turns_red_where_ranks_or_resumes_are_wrong(workspace: Path):
    """A loader that gives every rank the first one's samples; a resume without moments."""
    run_dir = workspace / "verify"
    sound, broken = run_ranks(verify_twice, 2, words(workspace, run_dir, "verify.only=true"))[0]
    assert [check["status"] for check in sound] == ["pass"] * 3
    assert [check["status"] for check in broken] == ["pass", "fail", "fail"]
    assert not (run_dir / "verify").exists() and (run_dir / "verify.html").is_file()


def _first_ranks(self: Any, build_of: Any, at: int, note: Any) -> Any:
    return build_of(self, at - self.rank * self.batches.batch_size, note)


def verify_twice(overrides: list[str]) -> list[Any]:
    """A sound verification, then one of a stage in which two things are wrong."""
    import torch.distributed as dist

    from triptych_core.checkpoint import load
    from triptych_core.config import load_config
    from triptych_core.launch import launch
    from triptych_data.tensors.stream import SampleStream

    config = load_config(stage().DiffusionConfig, None, overrides)
    config.model.compile = "none"
    import rehearsing

    rehearsing.shutdown = dist.barrier
    runtime, found = launch(config.run), []
    for breaks in (False, True):
        if breaks:
            SampleStream._build = partialmethod(_first_ranks, SampleStream._build)
            load.load_stretches = lambda *_: None
        try:
            rehearsing.verify(config, runtime, stage().build_job, stage()._loop)
        except SystemExit:
            assert breaks
        found.append(json.loads((config.run.dir / "verify.json").read_text()))
    return found
