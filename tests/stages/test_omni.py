"""Rows with sound through the whole engine: divided weights give the step of one rank that has all.

On two ranks one has text while the other has recordings alone, then one has all media and the other
nothing but padding; or they hold each row between them. The same with all but the projectors
frozen, and with adapters, whose gradients and merged weights are stock peft's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.data.media import sound
from tests.models import tiny_audio
from tests.models.proofs import PROOFS
from tests.models.stock import stock_twin
from tests.ranks import run_ranks
from tests.stages.one_step import compare, on_a_rank
from tests.stages.rows import HEARD, build, has_experts, read
from tests.stages.test_align import align_stage, build_from
from tests.stages.test_lora import no_zeros, words_of
from tests.stages.test_sft import metrics
from tests.tiny import ROOT
from triptych_core.config import load_config
from triptych_data.shards.write import write_shards
from triptych_models import lora
from triptych_models.config import LoraConfig, ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model

STAGES = (0, 1, 2, 3)
SHIPPED = ROOT / "stages/configs/align_qwen2_5_omni_tiny.yaml"
ADAPTERS = LoraConfig(rank=3, alpha=4, targets=["language", "audio", "projector"])

WRITERS = (
    tiny_audio.write_aero_model_dir,
    tiny_audio.write_qwen2_5_omni_model_dir,
    tiny_audio.write_qwen3_omni_model_dir,
)


def words(stage: int, ranks: int, *more: str) -> list[str]:
    steps = 4 // ranks
    return [f"engine.zero.stage={stage}", f"engine.gradient_accumulation_steps={steps}", *more]


@pytest.mark.parametrize("write", WRITERS)
def test_two_ranks_are_one(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    exact = "engine.precision=fp32"
    runs = [words(0, 1), words(0, 1, exact)]
    ((wanted, of_shared),) = run_ranks(on_a_rank, 1, folder, folder.parent / "one", runs)
    layouts = [words(stage, 2) for stage in STAGES]
    layouts.append(words(3, 2, "engine.checkpointing=full"))
    shared = [words(stage, 1, exact, "parallel.sequence=2") for stage in (0, 3)]
    gradients = wanted.gradients.items()
    assert all(x.tensor.any() for name, x in gradients if "tower" in name and "conv" in name)
    runs = [*layouts, *shared]
    for rank, found in enumerate(run_ranks(on_a_rank, 2, folder, folder.parent / "two", runs)):
        for layout, step in zip(runs, found, strict=True):
            one = of_shared if layout in shared else wanted
            compare(step, one, f"rank {rank} of {layout}")


@pytest.mark.parametrize("write", WRITERS)
def test_projectors_train_alone_on_two_ranks_as_on_one(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Their gradients are those of a step in which all trains."""
    folder = write(tmp_path / "model")
    config = load_config(align_stage().AlignConfig, SHIPPED, [f"model.path={folder}"])
    frozen = f"model.freeze=[{','.join(config.model.freeze)}]"
    runs = [words(0, 1), words(0, 1, frozen)]
    ((whole, wanted),) = run_ranks(on_a_rank, 1, folder, tmp_path / "one", runs)
    layouts = [words(stage, 2, frozen) for stage in (1, 3)]
    assert all(is_projectors(name) for name in wanted.gradients)
    assert 2 < len(wanted.gradients) < len(whole.gradients)
    for name, part in wanted.gradients.items():
        torch.testing.assert_close(part.tensor, whole.gradients[name].tensor)
        assert part.tensor.any(), name
    for rank, found in enumerate(run_ranks(on_a_rank, 2, folder, tmp_path / "two", layouts)):
        for layout, step in zip(layouts, found, strict=True):
            compare(step, wanted, f"rank {rank} of {layout}")


def is_projectors(parameter: str) -> bool:
    """Whether it is of what takes features to the width of the language model."""
    kinds = ("merger", "multi_modal_projector", "ln_post", ".proj", "audio_tower.layer_norm")
    return any(kind in parameter for kind in kinds) and "layers" not in parameter


def align(words: list[str]) -> None:
    stage = align_stage()
    stage.main(load_config(stage.AlignConfig, SHIPPED, words))


def test_the_shipped_alignment_moves_what_lies_behind_both_towers(tmp_path: Path) -> None:
    pitches = [("low", 300.0), ("high", 2400.0)] * 6
    for number, (_, hertz) in enumerate(pitches):
        (tmp_path / f"{number}.wav").write_bytes(sound(0.3, hertz=hertz))
    chats = [
        {
            "messages": [
                {"role": "user", "content": "<audio>Which?"},
                {"role": "assistant", "content": pitch},
            ],
            "audios": [f"{number}.wav"],
        }
        for number, (pitch, _) in enumerate(pitches)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(chat) for chat in chats))
    write_shards(tmp_path / "chats.jsonl", tmp_path / "shards")
    folder = ROOT / "stages/configs/qwen2_5_omni_tiny"
    run = tmp_path / "run"
    words = [
        *(f"run.dir={run}", "run.device=cpu", "run.steps=2", f"model.path={folder}"),
        *(f"data.shards=[{tmp_path / 'shards'}]", "data.num_workers=0", "data.seq_len=256"),
        *("checkpoint.save=false", "schedule.warmup_steps=1"),
    ]
    run_ranks(align, 1, words)
    before, after = build_from(folder), load_file(run / "export/model.safetensors")
    moved = {name for name, value in before.items() if not torch.equal(value, stored(after, name))}
    assert moved == {f"model.audio_tower.{n}.{x}" for n in ("ln_post", "proj") for x in WEIGHTS}
    lines = metrics(run)
    assert json.loads((run / "run.json").read_text())["parameters"]["audio"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"]


WEIGHTS = ("weight", "bias")


def stored(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Of an exported thinker, by the name of its module."""
    published = name.replace("model.language_model.", "model.").replace("model.audio", "audio")
    return tensors[published.replace("model.visual", "visual")]


@pytest.fixture(params=WRITERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    written: Path = request.param(tmp_path / "model")
    return written


def test_adapters_are_those_of_stock_peft(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients on two ranks under ZeRO-2 and 3, weights of the merged export."""
    monkeypatch.setattr(lora, "first_values", no_zeros)
    model = build(folder)
    stock = stock_twin(model)
    lora.add_adapters(model, ADAPTERS, 3)
    lora.export_adapter(model.hf, ADAPTERS, tmp_path / "adapter", folder)
    theirs: Any = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter", is_trainable=True)
    family = read(folder)["model_type"]
    text, mixed, heard, both = HEARD[family][0]()
    chosen = [text, heard, both, text, mixed]  # of `heard_rows`
    targets = sum(int((document.shift_labels != -100).sum()) for document in chosen)
    for document in chosen:
        logits = PROOFS[family].logits(theirs, model, document)
        loss = F.cross_entropy(logits, document.shift_labels, reduction="sum") / targets
        loss.backward()
    wanted = {
        "hf." + name.removeprefix("base_model.model."): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert any("audio_tower.layers" in name for name in wanted)
    assert len(wanted) == 2 * len(list(lora.adapted_layers(model.hf)))
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    more = ["engine.precision=fp32", *words_of(ADAPTERS)]
    if has_experts(folder):  # stock has no losses of routers without labels
        more += ["model.moe.aux_loss=0", "model.moe.z_loss=0"]
    layouts = [words(stage, 2, *more) for stage in (2, 3)]
    for found in run_ranks(on_a_rank, 2, folder, tmp_path / "two", layouts):
        for layout, step in zip(layouts, found, strict=True):
            assert step.gradients.keys() == wanted.keys()
            for name, gradient in step.gradients.items():
                error = (gradient.tensor - wanted[name]).norm() / max(
                    wanted[name].norm(), 1e-3 * norm
                )
                assert error < 2e-5, f"{layout}: {name} off by {error:.1e}"
    export(model.hf, tmp_path / "merged", folder, dtype=torch.float32)
    again = build_model(ModelConfig(path=tmp_path / "merged"), dtype=torch.float32)
    merged = dict(again.hf.named_parameters())
    for name, value in theirs.merge_and_unload().named_parameters():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)


def test_adapters_cost_their_own_products(folder: Path) -> None:
    """Of rank 5 four ranks more than of 1, on the rows that their linears see."""
    family = read(folder)["model_type"]
    chosen = HEARD[family][0]()
    batch, costs = HEARD[family][1](chosen, 128), []
    for rank in (1, 5):
        model = build(folder)
        before = model.flops(batch)
        lora.add_adapters(model, LoraConfig(rank=rank, targets=["fc1", *LAST[family]]), 3)
        assert model.flops(batch) < before
        costs.append(model.flops(batch))
    lengths = torch.cat([document.audio_lengths for document in chosen])
    places, tokens = int(((lengths - 1) // 2 + 1).sum()), int(batch["audio_positions"].numel())
    places = tokens if has_experts(folder) else places  # of Qwen3-Omni no two become one
    rows = 2 * places * (32 + 40) + tokens * (32 + 32)  # of two layers, and of what is behind
    assert costs[1] - costs[0] == 4 * 6 * rows


LAST = {
    "aero": ["linear"],
    "qwen2_5_omni_thinker": ["audio_tower.proj"],
    "qwen3_omni_moe_thinker": ["proj1"],
}
