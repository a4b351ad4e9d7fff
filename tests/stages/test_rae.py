"""The stage of autoencoders: straight gradients on any ranks, exact resumes, and it learns."""

from __future__ import annotations

import json
import shutil
import sys
from base64 import b64decode
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from tests.models.straight_rae import straight_step
from tests.models.tiny_rae import configs, draw_batch
from tests.ranks import run_ranks
from tests.tiny import ROOT, make_shards
from triptych_core.engine import build
from triptych_core.evaluation import drawings  # noqa: F401  imported once, for all ranks
from triptych_data.media.images import decode_image
from triptych_data.pixels import loader  # noqa: F401
from triptych_models.autoencoder.build import build_rae

IMAGES = 7  # of draw_batch(8)


def stage() -> ModuleType:
    sys.path.insert(0, str(ROOT / "stages"))
    import rae

    return rae


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rae")
    configs(path / "nets")
    for name, count in (("train", 21), ("heldout", 6)):
        make_shards(path / name, count)
    return path


def words(workspace: Path, run_dir: Path, *more: str) -> list[str]:
    nets = workspace / "nets"
    return [
        f"run.dir={run_dir}",
        "run.steps=6",
        "run.device=cpu",
        f"model={{encoder: {{path: {nets / 'dinov2'}}}, input_size: 28, decoder: {{size: custom, "
        "hidden_size: 24, num_layers: 2, num_heads: 2, intermediate_size: 40, patch_size: 4}}",
        f"perceptual={{path: {nets / 'like'}, depths: [0, 1], weight: 0.7}}",
        f"adversary={{path: {nets / 'critic'}, depths: [0], image_size: 12, kernel_size: 3, "
        "discriminator_start: 2, start: 3}",
        f"data.shards=[{workspace / 'train/shards'}]",
        "data.batch_size=4",
        "data.shorter_side=12",
        "data.num_workers=0",
        "engine.precision=fp32",
        "engine.zero.persistence_threshold=0",
        "engine.zero.stage=0",
        "optim.lr=1e-3",
        "optim.ema_decay=0.9",
        "schedule.warmup_steps=2",
        "samples={count: 3, columns: 2}",
        "checkpoint.every=3",
        "checkpoint.keep=9",
        f"evaluation.shards=[{workspace / 'heldout/shards'}]",
        "evaluation.every=3",
        "log.progress=false",
        *more,
    ]


def train(overrides: list[str]) -> None:
    from triptych_core.config import load_config

    rae = stage()
    rae.main(load_config(rae.RaeConfig, None, overrides))


def lines(run_dir: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run_dir / "export/diffusion_pytorch_model.safetensors")


def one_step(workspace: Path, divisions: list[tuple[int, int]]) -> list[Any]:
    """Means and gradients of a step's first batch under ZeRO stages, by so many micro-steps."""
    import torch.distributed as dist

    from triptych_core.config import load_config
    from triptych_core.launch import launch
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_models.freeze import parameter_parts

    found, runtime, batch = [], None, draw_batch(8)
    for zero, micro_steps in divisions:
        more = (f"engine.zero.stage={zero}", f"engine.gradient_accumulation_steps={micro_steps}")
        all_words = words(workspace, workspace / "x", "engine.zero.bucket_size=3000", *more)
        config = load_config(stage().RaeConfig, None, all_words)
        runtime = runtime or launch(config.run)
        gather = build.gather_parameters(config.engine)
        model = build_rae(
            *configs(workspace / "nets"),
            dtype=torch.float32,
            gather=gather,
            sum_over_ranks=dist.all_reduce,
        )
        part_of = parameter_parts(model).__getitem__
        groups = parameter_groups(model.named_parameters(), config.optim, part_of)
        optimizer = build_optimizer(groups, config.optim)
        engine = build.build_engine(
            model, optimizer, config.engine, config.optim, runtime.world_size, model.layers()
        )
        engine.train()
        size = 8 // (runtime.world_size * micro_steps)
        firsts = [(m * runtime.world_size + runtime.rank) * size for m in range(micro_steps)]
        window = [
            {k: v[at : at + size] if k != "num_targets" else v for k, v in batch.items()}
            for at in firsts
        ]
        model.begin_step(1)
        if micro_steps > 1:
            model.survey(window)
        figures: dict[str, torch.Tensor] = {}
        for micro in window:
            output = engine(**micro)
            engine.backward(output.loss_sum * runtime.world_size / IMAGES)
            for name, value in {"loss": output.loss_sum, **output.metrics}.items():
                figures[name] = figures.get(name, torch.zeros(())) + value.detach() / IMAGES
            if not engine.is_gradient_accumulation_boundary():
                engine.step()
        for value in figures.values():
            dist.all_reduce(value)
        names = {parameter: name for name, parameter in model.named_parameters()}
        gradients = {names[p]: g.clone() for p, g in engine.gradients().items()}
        found.append(({k: v.item() for k, v in figures.items()}, gradients))
        engine.destroy()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_gradients_are_those_of_straight_formulas(workspace: Path, ranks: int):
    """Of decoder and discriminator, in fp64 on one rank at once."""
    divisions = [(0, 2), (1, 1), (1, 2), (2, 2), (3, 1), (3, 2)] if ranks == 2 else [(0, 1), (3, 2)]
    model = build_rae(*configs(workspace / "nets"), dtype=torch.float32)
    expected = straight_step(model, configs(workspace / "nets"), draw_batch(8))
    assert expected.margin > 1e-5, "fp32 may take the other side of a jump: draw other numbers"
    for rank in run_ranks(one_step, ranks, workspace, divisions):
        for division, (figures, gradients) in zip(divisions, rank, strict=True):
            assert figures.keys() == expected.figures.keys()
            for name, value in expected.figures.items():
                assert figures[name] == pytest.approx(value, rel=2e-4), (division, name)
            assert gradients.keys() == expected.gradients.keys()
            for name, wanted in expected.gradients.items():
                atol = 2e-4 * wanted.abs().max().item() + 1e-7
                torch.testing.assert_close(
                    gradients[name].double(), wanted, rtol=1e-3, atol=atol, msg=f"{division} {name}"
                )


def clipped_with(workspace: Path) -> dict[str, str]:
    from triptych_core.config import load_config
    from triptych_core.launch import launch

    rae = stage()
    config = load_config(rae.RaeConfig, None, words(workspace, workspace / "x"))
    engine = rae.build_job(config, launch(config.run)).engine
    return {group["name"]: group.get("clip", "") for group in engine.optimizer.param_groups}


def test_the_discriminator_is_clipped_for_itself(workspace: Path):
    """How is tested in tests/core/test_light.py."""
    found = run_ranks(clipped_with, 1, workspace)[0]
    assert len(found) == 8
    for name, clip in found.items():
        assert clip == ("discriminator" if name.startswith("discriminator/") else ""), name


@pytest.fixture(scope="module")
def alone(workspace: Path) -> Path:
    """One rank, two micro-batches a step."""
    run_dir = workspace / "alone"
    run_ranks(train, 1, words(workspace, run_dir, "engine.gradient_accumulation_steps=2"))
    return run_dir


@pytest.mark.parametrize("zero", [1, 3])
def test_two_ranks_compute_what_one_does(workspace: Path, alone: Path, zero: int):
    run_dir = workspace / f"zero-{zero}"
    run_ranks(train, 2, words(workspace, run_dir, f"engine.zero.stage={zero}"))
    for ours, theirs in zip(lines(run_dir), lines(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("num_targets", "num_images", "flops", "lr", "packing_fill"):
            assert ours[name] == theirs[name], name
        for name in ("loss", "grad_norm", *LATE):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3), name
    for ours, theirs in zip(lines(run_dir, "evaluation"), lines(alone, "evaluation"), strict=True):
        assert abs(ours["heldout_loss"] / theirs["heldout_loss"] - 1) < 1e-4
    expected = weights(alone)
    for name, value in weights(run_dir).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-4, msg=name)


LATE = ("discriminator", "adaptive_weight", "deceit")


def test_judges_come_in_when_they_should(alone: Path):
    seen = [tuple(name in line for name in LATE) for line in lines(alone)]
    assert seen == [(False, False, False), (True, False, False), *[(True, True, True)] * 4]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_the_same_to_the_last_bit(workspace: Path, alone: Path, ranks: int):
    """Discriminator, its optimizer's states and its singular vectors, too: the files are equal.

    On two ranks under ZeRO-3, from before the discriminator began.
    """
    more = ["engine.gradient_accumulation_steps=2"]
    first = alone
    if ranks == 2:
        more += ["engine.zero.stage=3", "data.batch_size=2", "adversary.discriminator_start=5"]
        more += ["adversary.start=5"]
        first = workspace / "whole"
        run_ranks(train, 2, words(workspace, first, *more))
    run_dir = workspace / f"resumed-{ranks}"
    shutil.copytree(first, run_dir)
    shutil.rmtree(run_dir / "checkpoints/step-000006")
    shutil.rmtree(run_dir / "export")
    run_ranks(train, ranks, words(workspace, run_dir, *more))
    assert len(json.loads((run_dir / "run.json").read_text())["resumes"]) == 1
    for ours, theirs in zip(lines(run_dir), lines(first), strict=True):
        for name in ("step", "loss", "grad_norm", "num_targets", *LATE):
            assert ours.get(name) == theirs.get(name), name
    assert lines(run_dir, "evaluation") == lines(first, "evaluation")  # pictures, too
    for rank in range(ranks):
        file = f"checkpoints/step-000006/rank-{rank:05d}.safetensors"
        assert (run_dir / file).read_bytes() == (first / file).read_bytes()
        assert b"discriminator.heads.0.score.left|buffer" in (first / file).read_bytes() or rank
    expected = weights(first)
    for name, value in weights(run_dir).items():
        assert torch.equal(value, expected[name]), name


def test_a_run_goes_on_beside_the_same_frozen_networks_alone(workspace: Path, alone: Path):
    from tests.models.tiny_rae import write_vit

    run_dir, other = workspace / "other", write_vit(workspace / "other-critic", 9)
    shutil.copytree(alone, run_dir)
    more = ("engine.gradient_accumulation_steps=2", "run.steps=7", f"adversary.path={other}")
    with pytest.raises(RuntimeError, match=r"model.frozen.features must be"):
        run_ranks(train, 1, words(workspace, run_dir, *more))


def test_the_run_folder_tells_what_was_learnt(workspace: Path, alone: Path, capfd):
    assert [line["step"] for line in lines(alone, "evaluation")] == [0, 3, 6]
    assert lines(alone)[0]["num_targets"] == 8
    report = (alone / "report.html").read_text()
    assert report.count('alt="samples at step') == 3
    # Two images, two made of them; one, one made of it: 34 pixels a cell.
    picture = decode_image(b64decode(lines(alone, "evaluation")[0]["picture"].partition(",")[2]))
    assert picture.shape == (3, 4 * 34, 2 * 34)
    assert (picture[:, 2 * 34 :, 34:] == 255).all() and (picture[:, 34:68, 34:] < 255).any()
    assert "discriminator × 0.75" in report
    assert "images/s, median" in report
    more = ("perceptual.path=null", "adversary.path=null", "run.steps=1", "checkpoint.save=false")
    more += ("schedule.warmup_steps=0",)
    run_ranks(train, 1, words(workspace, workspace / "l1", *more))
    assert "perceptual distance × off, as perceptual.path names no folder" in capfd.readouterr().out


def test_a_handful_of_images_is_memorised(workspace: Path):
    run_dir = workspace / "few"
    make_shards(workspace / "four", 4)  # four images
    more = ("run.steps=130", f"data.shards=[{workspace / 'four/shards'}]", "evaluation.every=0")
    more += ("data.crop=false", "model.noise=0", "checkpoint.save=false", "optim.lr=5e-3")
    more += ("adversary.discriminator_start=30", "adversary.start=60", "evaluation.shards=[]")
    run_ranks(train, 1, words(workspace, run_dir, *more))
    losses = [line["l1"] for line in lines(run_dir)]
    assert losses[0] > 0.08
    assert sum(losses[-10:]) / 10 < 0.035


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("plan.image_share=0.1", r"plan.image_share: must be 0.5 in this stage, got 0.1"),
        ("parallel.sequence=2", r"parallel.sequence: must be 1 in this stage, got 2"),
        ("engine.zero={stage: 1, offload_optimizer: true}", r"offload_optimizer: must be False in"),
        ("model.decoder.sise=XL", r"model.decoder.sise: .* did you mean 'size'"),
        ("adversary.strat=3", r"adversary.strat: .* did you mean 'start'"),
        ("model.freeze=[vision]", r"model.freeze: must name parts of the model \(embedders"),
        ("adversary.discriminator_start=9", r"adversary.start: must not come before"),
        ("adversary.kernel_size=4", r"adversary.kernel_size: must be odd, got 4"),
    ],
)
def test_what_the_stage_cannot_do_is_refused(workspace: Path, word: str, message: str):
    from triptych_core.config import load_config

    with pytest.raises(ValueError, match=message):
        load_config(stage().RaeConfig, None, words(workspace, workspace / "x", word))


@pytest.mark.parametrize("name", ["rae_tiny", "rae_dinov2_b_xl"])
def test_the_shipped_configurations_are_valid(name: str):
    from triptych_core.config import load_config

    config = load_config(stage().RaeConfig, ROOT / f"stages/configs/{name}.yaml")
    assert config.optim.weight_decay == 0.0


def test_verify_passes(workspace: Path):
    """With both judges from the first step on."""
    run_dir = workspace / "verify"
    run_ranks(train, 2, words(workspace, run_dir, "verify.only=true", "engine.zero.stage=3"))
    checks = json.loads((run_dir / "verify.json").read_text())
    assert [check["status"] for check in checks] == ["pass"] * 3
    assert not (run_dir / "verify").exists() and not (run_dir / "checkpoints").exists()
