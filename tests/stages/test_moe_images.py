"""A mixture that sees images, through the whole stage: its experts divided anew when it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.ranks import run_ranks
from tests.stages.test_moe import check_same, copy_until_step_2, run_stage
from tests.stages.test_pretrain import metrics
from tests.tiny import make_model_dir, make_shards
from tests.tools.average_folders import average

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("moe-images")
    file = make_model_dir(path / "model") / "config.json"
    config = json.loads(file.read_text())
    config |= {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
    }
    config["text_config"] |= {"model_type": "qwen3_vl_moe_text", **_EXPERTS}
    config["vision_config"]["model_type"] = "qwen3_vl_moe_vision"
    file.write_text(json.dumps(config))
    make_shards(path / "data", 30)
    make_shards(path / "heldout", 4, seed=1)
    return path


def words_for(workspace: Path, run_dir: Path, ranks: int, *more: str) -> list[str]:
    return [
        *(f"run.dir={run_dir}", "run.steps=4", "run.device=cpu", "log.every=2"),
        *(f"model.path={workspace / 'model'}", "model.init=random", "engine.precision=fp32"),
        *("data.seq_len=256", "data.num_workers=0", f"data.shards=[{workspace}/data/shards]"),
        f"evaluation.shards=[{workspace}/heldout/shards]",
        *("evaluation.max_questions=2", "evaluation.max_new_tokens=3"),
        *("checkpoint.every=2", "checkpoint.keep=9", "optim.eps=1e-3", "optim.lr=1e-3"),
        f"engine.gradient_accumulation_steps={2 // ranks}",
        *more,
    ]


def test_a_run_with_images_goes_on_with_experts_divided(workspace: Path) -> None:
    one, two = workspace / "one", workspace / "two"
    run_ranks(run_stage, 1, words_for(workspace, one, 1, "engine.zero.stage=0"))
    copy_until_step_2(one, two)
    divided = ["engine.zero.stage=3", "parallel.expert=2"]
    run_ranks(run_stage, 2, words_for(workspace, two, 2, *divided))
    check_same(two, one)
    known = json.loads((two / "run.json").read_text())["parameters"]
    assert [*known] == ["vision", "projector", "language", "router", "experts"]
    ours, theirs = metrics(two)[-1], metrics(one)[-1]
    assert len(ours["expert_load"]) == len(ours["expert_entropy_text"]) == 3
    assert ours["expert_load_images"] == theirs["expert_load_images"]
    assert 0 < sum(ours["expert_load_images"][0]) < sum(ours["expert_load"][0])
    assert "Tokens of images" in (two / "report.html").read_text()
    stock, info = AutoModelForImageTextToText.from_pretrained(
        two / "export", output_loading_info=True
    )
    assert not any(info.values()), info
    assert stock.config.text_config.num_experts == 4
    # The averager has stacks as transformers 5 does, the export as the hub: stock loads the same.
    average(two / "average", *(run / "checkpoints/step-000004" for run in (one, two)))
    again, info = AutoModelForImageTextToText.from_pretrained(
        two / "average", dtype=stock.dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    other = AutoModelForImageTextToText.from_pretrained(one / "export").state_dict()
    for name, value in stock.state_dict().items():
        assert torch.equal(again.state_dict()[name], (value + other[name]) / 2), name
