"""Gradients of the whole engine against stock transformers in fp64, one process, one by one.

The same ragged rows are trained on 1, 2 and 4 ranks under every ZeRO stage, with accumulation,
rows and experts divided, recomputed or not; rows have no images, no targets, one target, nothing
but padding. The reference never packs, partitions or accumulates.
"""

from __future__ import annotations

import json
import math
from functools import cache, partial
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch

from tests.models import tiny
from tests.ranks import run_ranks
from tests.stages.layouts import GRID, Layout, count
from tests.stages.one_step import MOE, Run, Step, compare, leave, on_a_rank, steps
from tests.stages.reference import Reference
from tests.stages.rows import SEQ_LEN, build, rows

WRITERS = {
    "qwen3_vl": tiny.write_model_dir,
    "qwen3": tiny.write_text_model_dir,
    "qwen2": tiny.write_qwen2_model_dir,
    "qwen3_moe": tiny.write_moe_model_dir,
    "qwen2_moe": tiny.write_qwen2_moe_model_dir,  # with a shared expert
    "dots1": tiny.write_dots1_model_dir,  # with biases that choose experts
    "qwen3_vl_moe": tiny.write_vl_moe_model_dir,
}
BALANCE = {"aux_loss": 1000.0, "z_loss": 0.0, "aux_over": "document"}  # a router's gradient is its


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Models with 4 query heads and 2 key heads and tied embeddings; one with neither."""
    path = tmp_path_factory.mktemp("parity")
    made = {name: write(path / name, tied=True) for name, write in WRITERS.items()}
    made["one_key_head"] = tiny.write_model_dir(path / "one_key_head", tied=False)
    file = made["one_key_head"] / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["num_key_value_heads"] = 1
    file.write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def reference(folders) -> Any:
    """By model; whether expert 0 gets all, the balance loss outweighs all, tokens have no loss."""

    @cache
    def of(model: str, forced: bool, aux: bool, alone: bool = False) -> Reference:
        moe = BALANCE if aux else MOE
        return Reference(folders[model], forced, moe, of_tokens=0.0 if alone else 1.0)

    return of


def first_expert(choose: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A router that sends every token to expert 0 twice, and nothing to the others."""
    logits, weights, experts = choose(x)
    return logits, weights, torch.zeros_like(experts)


def force(model: Any) -> None:
    for block in model.blocks():
        block.gate.forward = partial(first_expert, block.gate.forward)


def silence(model: Any) -> None:
    """Leave the routers' losses alone."""
    model.hf.lm_head.register_forward_hook(lambda _, given, loss_sum: 0.0 * loss_sum)


def run_of(layout: Layout) -> Run:
    aux = [f"model.moe.{key}={value}" for key, value in BALANCE.items()]
    words = [*layout.words(), *(aux if "aux" in layout.features else ())]
    change = next((CHANGES[name] for name in layout.features if name in CHANGES), leave)
    return Run(words, layout.numbers(), change)


CHANGES = {"forced": force, "alone": silence}


@pytest.mark.parametrize(("model", "ranks"), GRID, ids=str)
def test_a_step_equals_that_of_stock_in_fp64(folders, reference, tmp_path, model, ranks):
    chosen = [Layout.read(model, ranks, text) for text in GRID[model, ranks]]
    results = run_ranks(on_a_rank, ranks, folders[model], tmp_path, list(map(run_of, chosen)))
    for layout, *by_rank in zip(chosen, *results, strict=True):
        assert len({found.norm for found in by_rank}) == 1, f"{layout}: norms differ"
        names = layout.features
        kind = tuple(name in names for name in ("forced", "aux", "alone"))
        wanted = reference(model, *kind).step(layout.numbers())
        for found in by_rank:
            compare(found, wanted, str(layout))


def test_so_many_layouts_are_compared():
    assert count()["parity"] >= 45 and count()["together"] >= 55


# Images and text, text, nothing but padding, an image, no target: each beside each.
PAIRS = [n for pair in combinations_with_replacement((0, 4, 5, 1, 6), 2) for n in pair]


def paired(folder: Path, out: Path) -> list[list[Step]]:
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    runtime = launch(RunConfig(device="cpu"))
    still = ["engine.precision=fp32", f"run.steps={len(PAIRS) // 2}", "optim.lr=1e-30"]
    return [
        steps(folder, runtime, out / str(s), Run([*still, f"engine.zero.stage={s}"], PAIRS))
        for s in (2, 3)
    ]


def test_ranks_may_hold_rows_of_any_kinds(folders, reference, tmp_path):
    """Steps of the same weights; other stages have such rows in their layouts."""
    wanted = reference("qwen3_vl", False, False)
    for of_stages in run_ranks(paired, 2, folders["qwen3_vl"], tmp_path):
        for stage, found in zip((2, 3), of_stages, strict=True):
            assert len(found) == 15
            for number, step in enumerate(found):
                pair = PAIRS[2 * number : 2 * number + 2]
                where = f"stage {stage}, rows {pair}"
                compare(step, wanted.step(pair), where, of_masters=math.inf)


def test_a_tied_weight_gets_the_gradients_of_both_uses(folders, reference, tmp_path):
    """The reference's tied gradient is that of embeddings and head apart, of the same weights."""
    from tests.models.stock import stock_loss, stock_twin
    from tests.stages.rows import documents

    tied = build(folders["qwen3"])
    apart = build(tiny.write_text_model_dir(tmp_path / "apart", tied=False))
    weights = tied.hf.state_dict()
    apart.hf.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    stock = stock_twin(apart, torch.float64)
    stock_loss(stock, apart, documents(images=False)[0]).backward()
    both = stock.model.embed_tokens.weight.grad, stock.lm_head.weight.grad
    found = reference("qwen3", False, False).rows[0].gradients["hf.model.embed_tokens.weight"]
    assert min(each.norm() for each in both) > 0.1 * found.norm()
    torch.testing.assert_close(found, sum(both))


def test_the_rows_are_what_they_are_said_to_be():
    targets = [row["num_targets"] for row in rows()]
    assert targets[4] == targets[6] == 0 and targets[7] == 1 and max(targets) > 50
    assert [i for i, row in enumerate(rows()) if "pixel_values" in row] == [0, 3, 5, 6]
    assert rows()[4]["num_tokens"] == 0 and rows()[0]["input_ids"].shape == (1, SEQ_LEN)
