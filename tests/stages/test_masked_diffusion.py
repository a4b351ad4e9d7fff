"""Masked diffusion by the stages: parity of layouts, exact resumes, and that it learns."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch
from click.testing import CliRunner

from tests.models import tiny
from tests.models.test_masked_diffusion import looks_both_ways
from tests.ranks import run_ranks
from tests.stages.one_step import Run, compare, on_a_rank
from tests.stages.reference import Reference, Row
from tests.stages.test_pretrain import make_text_model_dir, metrics, pretrain_stage
from tests.tiny import ROOT, sft_stage
from triptych_models.masked_diffusion.config import DiffusionConfig
from triptych_models.masked_diffusion.noise import MaskRow

STYLES = {
    "llada": DiffusionConfig(),
    "dream": DiffusionConfig(predict="next", weight="context", divide_by="masked"),
}
# Ranks -> style and settings: stage, accumulation, ranks that share a row.
GRID = {
    1: [("llada", 0, 4, 1), ("dream", 3, 2, 1)],
    2: [("llada", 0, 2, 1), ("llada", 3, 2, 1), ("dream", 3, 1, 1), ("dream", 1, 2, 2)],
}


class MaskedReference(Reference):
    """The same of masked diffusion, noised rows given."""

    def __init__(self, folder: Path, style: DiffusionConfig) -> None:
        self.style = style
        super().__init__(folder)

    def _row(self, model: Any, chosen: Any, batch: dict[str, Any], routers: Any) -> Row:
        model.diffusion = self.style
        noised = MaskRow(self.style, model.mask_token_id, 0)(batch, 0)
        objective = torch.zeros((), dtype=torch.float64)
        names = ("input_ids", "shift_labels", "target_weights")
        lengths = [len(document.input_ids) for document in chosen]
        rest = [batch["input_ids"].shape[1] - sum(lengths)]
        pieces = zip(*(noised[name][0].split(lengths + rest) for name in names), strict=True)
        for (ids, labels, weights), _ in zip(pieces, lengths, strict=False):
            at = labels != -100
            if at.any():
                chances = looks_both_ways(self.stock, ids).log_softmax(-1)[at]
                objective = (
                    objective - (weights[at] * chances[range(len(chances)), labels[at]]).sum()
                )
        figures = {
            "num_targets": torch.tensor(noised["num_targets"]),
            "num_tokens": torch.tensor(batch["num_tokens"]),
            "flops": torch.tensor(int(model.flops(noised))),
        }
        return self._differentiated(objective, figures)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return tiny.write_text_model_dir(tmp_path_factory.mktemp("diffusion") / "model", tied=True)


@pytest.mark.parametrize("ranks", GRID)
def test_a_step_equals_that_of_stock_in_fp64(folder: Path, tmp_path: Path, ranks: int) -> None:
    runs = []
    for style, stage, accumulation, sequence in GRID[ranks]:
        settings = STYLES[style].model_dump(include={"predict", "weight", "divide_by"})
        runs.append(
            Run(
                [
                    *(f"model.diffusion.{key}={value}" for key, value in settings.items()),
                    "engine.precision=fp32",
                    f"engine.zero.stage={stage}",
                    f"engine.gradient_accumulation_steps={accumulation}",
                    f"parallel.sequence={sequence}",
                ]
            )
        )
    references = {name: MaskedReference(folder, style) for name, style in STYLES.items()}
    results = run_ranks(on_a_rank, ranks, folder, tmp_path, runs)
    for layout, *by_rank in zip(GRID[ranks], *results, strict=True):
        style, _, accumulation, sequence = layout
        wanted = references[style].step(range(ranks // sequence * accumulation))
        for found in by_rank:
            compare(found, wanted, str(layout))


CHATS = [("red", "one two"), ("green", "three"), ("blue", "four five six"), ("grey", "seven")] * 3


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: Any) -> Path:
    """A tiny model that takes chats, and four of them, three times each, to learn by heart."""
    from triptych_data.shards.write import write_shards

    path = tmp_path_factory.mktemp("learning")
    make_text_model_dir(path / "model")
    template = ROOT / "stages/configs/qwen3_vl_tiny/chat_template.jinja"
    shutil.copy(template, path / "model/chat_template.jinja")
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"{question}?"},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
        for question, answer in CHATS
    ]
    (path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    write_shards(path / "chats.jsonl", path / "shards")
    return path


def words(workspace: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        f"run.dir={run_dir}",
        "run.device=cpu",
        f"model.path={workspace / 'model'}",
        "model.init=random",
        "model.diffusion.block_length=8",
        f"data.shards=[{workspace / 'shards'}]",
        "data.seq_len=512",
        "data.chat.fill_answer=16",
        "data.num_workers=0",
        "engine.precision=fp32",
        "optim.lr=1e-2",
        "evaluation.max_new_tokens=16",
        f"evaluation.shards=[{workspace / 'shards'}]",
        *more,
    ]


def sft(settings: list[str]) -> None:
    from triptych_core.config import load_config

    stage = sft_stage()
    stage.main(load_config(stage.SftConfig, None, settings))


def show_unmasking() -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    import show_unmasking

    return show_unmasking.show_unmasking


def test_it_learns_answers_by_heart(workspace: Path) -> None:
    run_dir = workspace / "learnt"
    more = ["run.steps=220", "evaluation.every=220", "checkpoint.every=200", "log.every=100"]
    run_ranks(sft, 1, words(workspace, run_dir, *more, "data.num_workers=1"), timeout=600)
    lines = metrics(run_dir)
    assert sum(line["loss"] for line in lines[-20:]) / 20 < 0.1 < 2 < lines[0]["loss"]
    held = [json.loads(line) for line in (run_dir / "evaluation.jsonl").open()]
    assert held[0]["exact_match"] == {"all": 0.0} and held[-1]["exact_match"] == {"all": 1.0}
    note = json.loads((run_dir / "export/diffusion.json").read_text())
    assert note["diffusion"]["mask_token_id"] == 511 and "not causal" in note["note"]
    asked = [str(run_dir / "export"), "blue?", "--max-new-tokens", "16"]
    told = CliRunner().invoke(show_unmasking(), asked)
    assert told.exit_code == 0, told.output
    *steps, answer = told.output.splitlines()
    assert answer == "four five six" and len(steps) == 8
    assert steps[0].count("·") == 15 and steps[-1].count("·") == 8  # its block of 8 ends it
    # The last steps again, from the checkpoint before them and without workers: the same noise.
    resumed = workspace / "resumed"
    shutil.copytree(run_dir, resumed)
    shutil.rmtree(resumed / "checkpoints/step-000220")
    run_ranks(sft, 1, words(workspace, resumed, *more), timeout=600)
    for before, after in zip(lines, metrics(resumed), strict=True):
        for key in ("loss", "grad_norm", "num_targets"):
            assert before[key] == after[key], before["step"]


def test_it_is_verified(workspace: Path) -> None:
    """--verify: its documents apart, packed as alone, as stock told to look both ways, resumed."""
    more = ["run.steps=6", "verify.only=true", "engine.zero.stage=0", "verify.samples=0"]
    run_ranks(sft, 1, words(workspace, workspace / "verified", *more), timeout=600)
    checks = json.loads((workspace / "verified/verify.json").read_text())
    found = [each["status"] for each in checks]
    assert found == ["pass"] * 5 + ["skipped"], checks  # one rank does not divide rows


def test_the_shipped_configurations_are_read() -> None:
    from triptych_core.config import load_config

    stage = pretrain_stage()
    found = {}
    for path in (ROOT / "stages/configs").glob("pretrain_*.yaml"):
        found[path.stem] = load_config(stage.PretrainConfig, path).model.diffusion
    assert found["pretrain_diffusion_tiny"] == DiffusionConfig()
    assert found["pretrain_qwen3_1.7b_dream"] == STYLES["dream"]
