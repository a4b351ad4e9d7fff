"""A run that balances experts by biases: moved by the load of all ranks, saved, gone on from."""

from __future__ import annotations

import json
from pathlib import Path

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.ranks import run_ranks
from tests.stages.test_moe import check_averaged, check_same, copy_until_step_2, run_stage
from tests.stages.test_moe import words_for as words_of_moe
from tests.stages.test_pretrain import make_documents, make_text_model_dir, metrics

RATE = 0.01


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bias")
    make_text_model_dir(path / "model")
    config = json.loads((path / "model/config.json").read_text())
    config |= {"architectures": ["Dots1ForCausalLM"], "model_type": "dots1"}
    config |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config |= {"n_shared_experts": 1, "norm_topk_prob": True, "sliding_window": None}
    (path / "model/config.json").write_text(json.dumps(config))
    make_documents(path / "data", 40)
    make_documents(path / "heldout", 5)
    return path


def words_for(workspace: Path, run_dir: Path, ranks: int, *more: str) -> list[str]:
    moe = [f"model.moe.bias_rate={RATE}", "model.moe.aux_loss=0", "log.every=1"]
    moe += ["checkpoint.keep=9", "optim.ema_decay=0.9"]  # the averager must know averages, too
    return [*words_of_moe(workspace, run_dir, ranks, *moe), *more]


@pytest.fixture(scope="module")
def finished(workspace) -> Path:
    words = words_for(workspace, workspace / "one", 1, "engine.zero.stage=0")
    run_ranks(run_stage, 1, words)
    return workspace / "one"


def biases(run: Path) -> torch.Tensor:
    """(layers, E) of the export."""
    stored = load_file(run / "export/model.safetensors")
    names = sorted(name for name in stored if name.endswith("e_score_correction_bias"))
    return torch.stack([stored[name] for name in names])


def test_biases_follow_the_load_of_every_step(finished):
    loads = torch.tensor([line["expert_load"] for line in metrics(finished)]).double()
    wanted = RATE * (loads.mean(-1, keepdim=True) - loads).sign().sum(0)
    assert wanted.abs().max() >= 2 * RATE
    torch.testing.assert_close(biases(finished).double(), wanted, rtol=0, atol=1e-7)
    stock, info = AutoModelForCausalLM.from_pretrained(
        finished / "export", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(stock.model.layers[0].mlp.gate.e_score_correction_bias, biases(finished)[0])


def test_a_run_goes_on_with_its_biases_and_experts_divided(workspace, finished):
    run_dir = workspace / "two"
    copy_until_step_2(finished, run_dir)
    words = ["engine.zero.stage=3", "parallel.expert=2"]
    run_ranks(run_stage, 2, words_for(workspace, run_dir, 2, *words))
    check_same(run_dir, finished)
    assert torch.equal(biases(run_dir), biases(finished))
    check_averaged(run_dir, finished)
