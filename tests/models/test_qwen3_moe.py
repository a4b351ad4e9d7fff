"""Qwen3-MoE over packed rows against stock transformers, one document after the other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, Qwen3MoeForCausalLM

from tests.models import tiny
from triptych_models.checkpointing import Checkpointing
from triptych_models.config import ModelConfig
from triptych_models.experts import ExpertGroup
from triptych_models.export import export
from triptych_models.families import build_model, build_shell
from triptych_models.qwen3_moe import Qwen3MoE

SEQ_LEN = 64
NO_AUX = {"aux_loss": 0.0}
Build = Callable[..., Qwen3MoE]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def build_tiny(*, dtype: torch.dtype = torch.float32, folder: Any = (), **fields: Any) -> Any:
        if "path" not in fields:
            fields["path"] = tiny.write_moe_model_dir(tmp_path / "tiny", **dict(folder))
            fields.setdefault("init", "random")
        return build_model(ModelConfig(**fields), dtype=dtype).train()

    return build_tiny


@pytest.fixture
def documents() -> list[tiny.Document]:
    """Four of 9, 1, 20 and 11 tokens."""
    return [tiny.document(seed, words=words) for seed, words in enumerate((9, 1, 20, 11))]


def stock_twin(model: Qwen3MoE, dtype: torch.dtype = torch.float32) -> Qwen3MoeForCausalLM:
    config = AutoConfig.for_model(**model.hf.config.to_dict())
    stock = Qwen3MoeForCausalLM._from_config(config, dtype=dtype)
    stock.set_experts_implementation("eager")  # the others know no fp64
    stock.load_state_dict(model.hf.state_dict(), strict=True)
    return stock


def stock_loss(
    stock: Qwen3MoeForCausalLM,
    documents: list[tiny.Document],
    balance: float = 0.0,
    z: float = 0.0,
    over: str = "row",
) -> Tensor:
    """Summed loss; with the routers' losses written down once more, from whole softmaxes."""
    total: Any = 0
    routed, targets = [], []
    for doc in documents:
        out = stock(doc.input_ids[None], output_router_logits=True)
        total = total + F.cross_entropy(out.logits[0], doc.shift_labels, reduction="sum")
        targets.append(int((doc.shift_labels != -100).sum()))
        routed.append(torch.stack(out.router_logits))  # (layers, n, E)
    groups = [[i] for i in range(len(documents))] if over == "document" else [[*range(4)]]
    for group in groups:
        mine = [i for i in group if targets[i]]
        if mine:
            weight = sum(targets[i] for i in mine)
            for logits in torch.cat([routed[i] for i in mine], 1):
                probabilities = logits.softmax(-1)
                chosen = F.one_hot(probabilities.topk(2).indices, 4).sum(1).to(logits.dtype) / 2
                even = 4 * (chosen.mean(0) * probabilities.mean(0)).sum()
                square = logits.logsumexp(-1).square().mean()
                total = total + weight * (balance * even + z * square)
    return total


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "moe",
    [
        NO_AUX,
        {"aux_loss": 0.1, "z_loss": 0.03},
        {"aux_loss": 0.1, "z_loss": 0.03, "aux_over": "document"},
    ],
)
def test_packed_losses_and_gradients_equal_stock_in_fp64(
    build: Build, documents: list[tiny.Document], moe: dict[str, Any], normalize: bool
) -> None:
    folder = {"norm_topk_prob": normalize}
    model = build(fuse=False, dtype=torch.float64, moe=moe, folder=folder)
    stock = stock_twin(model, torch.float64)

    out = model(**tiny.pack_text(documents, SEQ_LEN))
    out.loss_sum.backward()
    over = moe.get("aux_over", "row")
    expected = stock_loss(stock, documents, moe["aux_loss"], moe.get("z_loss", 0.0), over)
    expected.backward()

    torch.testing.assert_close(out.loss_sum.double(), expected, rtol=1e-6, atol=0)
    ours, theirs = dict(model.hf.named_parameters()), dict(stock.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        difference = (ours[name].grad - parameter.grad).norm()
        # stock rounds the router's softmax to fp32
        assert difference <= 1e-6 * parameter.grad.norm(), name


def test_the_losses_of_rows_add_up_whatever_row_a_document_is_in(
    build: Build, documents: list[tiny.Document]
) -> None:
    model = build(moe={"aux_loss": 0.3, "z_loss": 0.1, "aux_over": "document"})
    together = model(**tiny.pack_text(documents, SEQ_LEN))
    apart = [model(**tiny.pack_text([doc], 32)) for doc in documents]
    torch.testing.assert_close(together.loss_sum, sum(each.loss_sum for each in apart))
    for key, value in together.metrics.items():
        torch.testing.assert_close(value, sum(each.metrics[key] for each in apart))
    assert together.metrics["expert_load"].sum() == 2 * 2 * 40  # not the padding, nor one token


def test_held_out_rows_are_scored_by_their_loss_alone(
    build: Build, documents: list[tiny.Document]
) -> None:
    model = build(moe={"aux_loss": 10.0, "z_loss": 10.0}).eval()
    loss = model(**tiny.pack_text(documents, SEQ_LEN)).loss_sum
    torch.testing.assert_close(loss, stock_loss(stock_twin(model), documents))


@pytest.mark.parametrize("checkpointing", ["selective", "full", "offload"])
def test_checkpointing_changes_nothing(
    build: Build, documents: list[tiny.Document], checkpointing: Checkpointing
) -> None:
    moe = {"aux_loss": 0.1, "z_loss": 0.03}
    plain, checkpointed = build(moe=moe), build(moe=moe)
    checkpointed.set_checkpointing(checkpointing)
    for model in (plain, checkpointed):
        model(**tiny.pack_text(documents, SEQ_LEN)).loss_sum.backward()
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_the_router_is_fp32_in_a_bf16_model(build: Build, documents: list[tiny.Document]) -> None:
    model = build(dtype=torch.bfloat16)
    gate = model.blocks()[0].gate
    x = torch.randn(5, 32).bfloat16()
    logits, weights, _ = gate(x)
    assert gate.weight.dtype == torch.bfloat16
    assert torch.equal(logits, x.float() @ gate.weight.float().T)
    assert weights.dtype == torch.float32
    assert model(**tiny.pack_text(documents, SEQ_LEN)).loss_sum.isfinite()


def test_an_expert_without_tokens_has_zero_gradients(
    build: Build, documents: list[tiny.Document]
) -> None:
    model = build(folder={"num_experts_per_tok": 1})
    for block in model.blocks():
        force_onto_one(block)
    out = model(**tiny.pack_text(documents, SEQ_LEN))
    out.loss_sum.backward()
    assert out.metrics["expert_load"][:, 1:].sum() == 0
    for block in model.blocks():
        for parameter in block.experts.parameters():
            assert parameter.grad[0].norm() > 0
            assert torch.equal(parameter.grad[1:], torch.zeros_like(parameter.grad[1:]))


def force_onto_one(block: Any) -> None:
    """All tokens choose expert 0: its logit is 0, the others' far below."""
    choose = block.gate.forward

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, experts = choose(x)
        return logits, weights, torch.zeros_like(experts)

    block.gate.forward = forward


def test_experts_stacked_under_the_models_own_names_are_read(build: Build, tmp_path: Path) -> None:
    model = build()
    export(model.hf, tmp_path / "stacked", tmp_path / "tiny", dtype=torch.float32)
    file = tmp_path / "stacked/model.safetensors"
    save_file(model.hf.state_dict(), file, metadata={"format": "pt"})
    again = build(path=tmp_path / "stacked")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_what_cannot_be_is_refused(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine.mlp_chunks: must be 1 with experts"):
        build().set_mlp_chunks(2)
    dense = tiny.write_text_model_dir(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"model.moe: must be left out for a model without"):
        ModelConfig(path=dense, moe={}).check_path()
    with pytest.raises(ValueError, match=r"parallel.expert: must be 1 for a model without experts"):
        build_shell(ModelConfig(path=dense), dtype=torch.float32, experts=ExpertGroup(size=2))
