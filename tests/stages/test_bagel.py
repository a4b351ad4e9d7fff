"""A Bagel by the stage: chats and latents in one row, two losses by two counts, exact resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.test_text import shake
from tests.ranks import run_ranks
from tests.stages.test_pretrain import metrics
from tests.tiny import ROOT, make_shards, sft_stage

SHIPPED = ROOT / "stages/configs/bagel_tiny"
STEPS = 4
DRAWING = ("time_embedder", "vae2llm", "llm2vae", "latent_pos_embed")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: Any) -> Path:
    """A tiny Bagel whose every weight is random, chats, and latents of a few words each.

    The latents of sample 6 are damaged.
    """
    from triptych_data.tensors.write import write_tensor_shards
    from triptych_models.config import ModelConfig
    from triptych_models.export import export
    from triptych_models.families import build_model

    path = tmp_path_factory.mktemp("bagel")
    shutil.copytree(SHIPPED, path / "shape")
    config = json.loads((SHIPPED / "config.json").read_text())
    narrow = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    config["llm_config"] |= narrow | {"num_attention_heads": 2}
    config["vit_config"] |= narrow
    (path / "shape/config.json").write_text(json.dumps(config))
    model = build_model(ModelConfig(path=path / "shape", init="random"), dtype=torch.float32)
    shake(model)
    export(model.hf, path / "model", path / "shape", dtype=torch.float32)
    make_shards(path / "chats", 24)
    generator = torch.Generator().manual_seed(0)
    samples = [
        ({"text": "a digit " * (1 + i % 3)}, {"latents": torch.randn(1, 8, 8, generator=generator)})
        for i in range(10)
    ]
    (shard,) = write_tensor_shards(samples, path / "latents")
    damaged = samples[6][1]["latents"].numpy().tobytes()
    raw = bytearray(shard.read_bytes())
    raw[raw.index(damaged)] ^= 1
    shard.write_bytes(raw)
    return path


def words(workspace: Path, run_dir: Path, accumulation: int, stage: int, *more: str) -> list[str]:
    return [
        f"run.dir={run_dir}",
        "run.device=cpu",
        f"run.steps={STEPS}",
        f"model.path={workspace / 'model'}",
        f"data.shards=[{workspace / 'chats/shards'}]",
        "data.seq_len=320",
        "data.num_workers=0",
        "data.ledger=true",
        f"generation.data.shards=[{workspace / 'latents'}]",
        "generation.data.text_field=text",
        "generation.data.batch_size=3",
        "generation.data.num_workers=0",
        "generation.data.max_bad_rate=1",
        "generation.text_len=5",
        "generation.text_dropout=0.3",
        "generation.weight=0.5",
        "generation.prompts=[a digit, two]",
        "generation.steps=2",
        "engine.precision=fp32",
        f"engine.gradient_accumulation_steps={accumulation}",
        f"engine.zero.stage={stage}",
        "schedule.warmup_steps=0",
        "schedule.kind=constant",
        "optim.lr=1e-3",
        "checkpoint.every=2",
        *more,
    ]


def read(settings: list[str]) -> Any:
    from triptych_core.config import load_config

    return load_config(sft_stage().SftConfig, None, settings)


def sft(settings: list[str]) -> None:
    sft_stage().main(read(settings))


@pytest.fixture(scope="module")
def trained(workspace: Path) -> dict[int, Path]:
    """The same run, of two rows a step, on one rank and on two."""
    runs = {1: workspace / "one", 2: workspace / "two"}
    run_ranks(sft, 1, words(workspace, runs[1], 2, 0))
    run_ranks(sft, 2, words(workspace, runs[2], 1, 3))
    return runs


def rows(workspace: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of the run on one rank."""
    from triptych_data.loader import PackLoader
    from triptych_data.processor import Processor

    config = read(words(workspace, workspace / "nowhere", 2, 0))
    import wiring  # which `read` made known

    processor = Processor.from_directory(workspace / "model")
    ranks = {"rank": 0, "world_size": 1}
    loader = PackLoader(config.data, processor, **ranks)
    stream = iter(wiring.join_images(config, loader, processor, ranks))
    return [next(stream) for _ in range(count)]


def test_each_loss_is_a_mean_over_its_own_targets(workspace: Path, trained: Any) -> None:
    """Over accumulation and ranks, whose rows have other numbers of either."""
    from triptych_models.config import ModelConfig
    from triptych_models.families import build_model

    model = build_model(ModelConfig(path=workspace / "model"), dtype=torch.float32).train()
    window = rows(workspace, 2)
    assert len({row["num_targets"] for row in window}) == 2
    assert len({row["input_ids"].shape for row in window}) == 1
    sums = {"text_loss": torch.tensor(0.0), "image_loss": torch.tensor(0.0)}
    for row in window:
        figures = model(**row).metrics
        sums = {name: sums[name] + figures[name] for name in sums}
    text = float(sums["text_loss"]) / sum(row["num_targets"] for row in window)
    image = float(sums["image_loss"]) / sum(row["num_second_targets"] for row in window)
    assert abs(text - image) > 0.1
    for run in trained.values():
        first = metrics(run)[0]
        assert first["text_loss"] == pytest.approx(text, rel=1e-5)
        assert first["image_loss"] == pytest.approx(image, rel=1e-5)
        assert first["loss"] == pytest.approx(text + 0.5 * image, rel=1e-5)


def test_evaluations_draw_the_prompts(trained: Any) -> None:
    """The same picture on one rank and on two, another after the training."""
    pictures = [
        [json.loads(line)["picture"] for line in (run / "evaluation.jsonl").open()]
        for run in trained.values()
    ]
    assert len(pictures[0]) == 2 and pictures[0][0] != pictures[0][1]
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures[0])
    assert pictures[0][0] == pictures[1][0]
    assert pictures[0][0] in (trained[1] / "report.html").read_text()


def test_two_ranks_under_zero_3_are_one(trained: Any) -> None:
    for one, two in zip(metrics(trained[1]), metrics(trained[2]), strict=True):
        for key in ("loss", "text_loss", "image_loss", "grad_norm", "num_tokens"):
            assert one[key] == pytest.approx(two[key], rel=2e-4), (one["step"], key)


def test_noise_is_a_samples_and_an_epochs_own(workspace: Path) -> None:
    """Never the same twice, and always the same again."""
    first, again = rows(workspace, 8), rows(workspace, 8)
    seen = [row["latent_noise"] for row in first]
    times = torch.cat([row["latent_times"].unique() for row in first])
    assert len(times.unique()) == len(times) == 24 - 3  # ten samples, one lost, three epochs
    images = torch.cat([noise.view(-1, 64) for noise in seen])
    assert len(images.unique(dim=0)) == len(images) == 24 - 3
    for row, other in zip(first, again, strict=True):
        assert torch.equal(row["latent_noise"], other["latent_noise"])
        assert torch.equal(row["input_ids"], other["input_ids"])


def test_a_resumed_run_is_the_uninterrupted_one(workspace: Path, trained: Any) -> None:
    again = workspace / "again"
    shutil.copytree(trained[1], again)
    shutil.rmtree(again / f"checkpoints/step-{STEPS:06d}")
    run_ranks(sft, 1, words(workspace, again, 2, 0))
    assert ledger(again) == ledger(trained[1])
    for before, after in zip(metrics(trained[1]), metrics(again), strict=True):
        for key in ("loss", "image_loss", "grad_norm", "num_targets"):
            assert before[key] == after[key], before["step"]


def ledger(run: Path) -> list[str]:
    return [path.read_text() for path in sorted((run / "ledger").iterdir())]


def test_the_ledger_names_what_was_read_and_drawn(trained: dict[int, Path]) -> None:
    """The same on one rank and on two, and the damaged one as a hole, counted in the figures."""
    from triptych_data.plan.ledger import audit, read_ledger

    for run in trained.values():
        found = audit(run / "ledger")
        assert found.problems == []
        drawn = found.joined["generation"]
        assert (drawn.samples + drawn.holes, drawn.epochs) == (STEPS * 2 * 3, 3)
        packs = [
            pack
            for path in sorted((run / "ledger").iterdir())
            for line in read_ledger(path)
            for pack in line["joined"]["generation"]["packs"]
        ]
        lost = [hole for pack in packs for hole in pack["holes"]]
        assert [(hole[0], hole[2]) for hole in lost] == [("000000006", "damaged")] * 3
        assert all("shard-000000.tar: sample 000000006" in hole[3] for hole in lost)
        assert sum(line["bad_samples"] for line in metrics(run)) == 3


def test_what_runs_out_of_memory_names_both(workspace: Path) -> None:
    from triptych_core.plan.postmortem import name_batch

    (row,) = rows(workspace, 1)
    with pytest.raises(torch.OutOfMemoryError) as caught, name_batch(torch.nn.Linear(1, 1), row):
        raise torch.OutOfMemoryError("none left")
    assert caught.value.__notes__[1] == f"samples: {', '.join(row['sample_keys'])}"
    drawn = [key for key in row["sample_keys"] if key.startswith("generation/")]
    assert len(drawn) == 3 and len(row["sample_keys"]) > 3


def test_the_plan_counts_rows_as_they_are(workspace: Path) -> None:
    config = read(words(workspace, workspace / "plan", 1, 0))
    (row,) = rows(workspace, 1)
    import planning  # which `read` made known

    assert config.data.seq_len + planning.drawn_tokens(config) == row["input_ids"].shape[1]
    config.generation = None
    assert planning.drawn_tokens(config) == 0


def test_latents_of_another_autoencoder_are_refused(workspace: Path) -> None:
    from triptych_models.bagel.join import JoinImages
    from triptych_models.bagel.model import read_bagel

    config = read(words(workspace, workspace / "nowhere", 2, 0))
    join = JoinImages(read_bagel(workspace / "model"), config.generation, lambda text: [1], 0)
    images = {"latents": torch.zeros(1, 16, 8, 8), "noise": torch.zeros(1, 16, 8, 8)}
    with pytest.raises(ValueError, match=r"latents must have 1 channels .* got \(16, 8, 8\)"):
        join({}, images | {"weights": torch.ones(1)})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["generation.data.text_field=null"], "generation.data.text_field: must name the words"),
        (["generation.data.std=[0.0]"], "generation.data.std: must be finite and above 0"),
        (["replay.step=2"], "replay.step: must be no with generation"),
        (["generation.weight=0"], "generation.weight: must be above 0 for a part that trains"),
    ],
)
def test_what_generation_cannot_have_is_refused(
    workspace: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(words(workspace, workspace / "nowhere", 2, 0, *more))


def chats_alone(workspace: Path, name: str, *more: str) -> list[str]:
    settings = words(workspace, workspace / name, 1, 0, *more)
    return [word for word in settings if not word.startswith("generation.")]


def test_chats_alone_leave_what_draws_as_it_was(workspace: Path) -> None:
    """To the last bit, under a decay that would move it; the rest trains, and the run says so."""
    settings = chats_alone(workspace, "chats_alone", "optim.weight_decay=0.5", "run.steps=2")
    run_ranks(sft, 1, settings)
    run = workspace / "chats_alone"
    assert json.loads((run / "run.json").read_text())["frozen"].startswith("generation, since")
    before, after = (
        load_file(path / "model.safetensors") for path in (workspace / "model", run / "export")
    )
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    drawing = {name for name in before if "_moe_gen" in name or name.startswith(DRAWING)}
    assert len(drawing) > 30 and not moved & drawing
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in moved


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "optim.lr_by_part.generation=1e-3",
            r"optim\.lr_by_part\.generation: must leave generation",
        ),
        ("model.lora.targets=[generation]", r"model\.lora\.targets: must leave generation out"),
        ("model.freeze=[vision, projector, language]", "model.freeze: must leave a part to train"),
    ],
)
def test_chats_alone_cannot_train_what_draws(workspace: Path, more: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sft(chats_alone(workspace, "nowhere", more))


def test_a_model_that_does_not_draw_is_refused(workspace: Path) -> None:
    settings = words(workspace, workspace / "nowhere", 2, 0)
    config = read([*settings, f"model.path={ROOT / 'stages/configs/qwen3_vl_tiny'}"])
    with pytest.raises(ValueError, match=r"model\.path: must hold a model that draws"):
        sft_stage().main(config)


def test_it_is_verified(workspace: Path) -> None:
    """On two ranks: documents apart, packed as alone, resumed, and the step of one rank."""
    run_dir = workspace / "verified"
    more = ["verify.only=true", "verify.samples=0", f"run.steps={STEPS}"]
    run_ranks(sft, 2, words(workspace, run_dir, 1, 1, *more))
    checks = json.loads((run_dir / "verify.json").read_text())
    found = [each["status"] for each in checks]
    assert found == ["pass"] * 3 + ["skipped"] + ["pass"] * 2, checks  # there is no stock
