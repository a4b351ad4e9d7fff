"""Qwen3 over packed rows against stock transformers, one document after the other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM

from tests.models import tiny
from triptych_kernels import unfuse
from triptych_models.checkpointing import Checkpointing
from triptych_models.config import ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model
from triptych_models.freeze import count_parameters
from triptych_models.generate import generate
from triptych_models.matrices import matrix_shapes
from triptych_models.packed import PackedModel
from triptych_models.pretend import pretend_batch

SEQ_LEN = 64
Build = Callable[..., PackedModel]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def build_tiny(*, tied: bool = False, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
        if "path" not in fields:
            fields["path"] = tiny.write_text_model_dir(tmp_path / f"tiny-{tied}", tied=tied)
            fields.setdefault("init", "random")
        return build_model(ModelConfig(**fields), dtype=dtype)

    return build_tiny


@pytest.fixture
def documents() -> list[tiny.Document]:
    """Four of 9, 1, 20 and 11 tokens."""
    return [tiny.document(seed, words=words) for seed, words in enumerate((9, 1, 20, 11))]


def stock_twin(model: PackedModel, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    config = AutoConfig.for_model(**model.hf.config.to_dict())
    stock = Qwen3ForCausalLM._from_config(config, dtype=dtype)
    stock.load_state_dict(model.hf.state_dict(), strict=True)
    return stock


def stock_loss(stock: Qwen3ForCausalLM, documents: list[tiny.Document]) -> Tensor:
    losses = [
        F.cross_entropy(stock(doc.input_ids[None]).logits[0], doc.shift_labels, reduction="sum")
        for doc in documents
        if (doc.shift_labels != -100).any()
    ]
    return torch.stack(losses).sum()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_packed_loss_and_gradients_equal_stock_in_fp64(
    build: Build, documents: list[tiny.Document], tied: bool, fused: bool
) -> None:
    model = build(tied=tied, fuse=fused, dtype=torch.float64)
    stock = stock_twin(model, torch.float64)

    out = model(**tiny.pack_text(documents, SEQ_LEN))
    out.loss_sum.backward()
    expected = stock_loss(stock, documents)
    expected.backward()

    assert out.num_targets == sum(int((d.shift_labels != -100).sum()) for d in documents)
    torch.testing.assert_close(out.loss_sum.double(), expected, rtol=1e-6, atol=0)
    ours = dict(model.hf.named_parameters())
    theirs = dict(stock.named_parameters())
    assert ours.keys() == theirs.keys()
    tolerance = 1e-6 if fused else 1e-9  # stock's own norms round to fp32, the fused ones do not
    for name, parameter in theirs.items():
        difference = (ours[name].grad - parameter.grad).norm()
        assert difference <= tolerance * parameter.grad.norm(), name


def test_changing_one_document_leaves_the_others_bit_equal(
    build: Build, documents: list[tiny.Document]
) -> None:
    model = build()
    with torch.no_grad():
        before = model.logits(**tiny.inputs_only(tiny.pack_text(documents, SEQ_LEN)))[0]
        documents[2].input_ids[0] += 1
        after = model.logits(**tiny.inputs_only(tiny.pack_text(documents, SEQ_LEN)))[0]
    assert torch.equal(before[:10], after[:10])
    assert torch.equal(before[30:], after[30:])
    assert not torch.equal(before[10:30], after[10:30])


def test_every_norm_and_mlp_is_fused_and_keeps_its_name(build: Build) -> None:
    names = set(build().hf.state_dict())
    assert set(build(fuse=False).hf.state_dict()) == names
    norms = {n.removesuffix(".weight") for n in names if n.endswith("norm.weight")}
    mlps = {n.removesuffix(".gate_proj.weight") for n in names if n.endswith("gate_proj.weight")}
    assert mlps and set(unfuse(build().hf)) == norms | mlps


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_changes_nothing(
    build: Build, documents: list[tiny.Document], checkpointing: Checkpointing
) -> None:
    plain, checkpointed = build(), build()
    checkpointed.set_checkpointing(checkpointing)
    for model in (plain, checkpointed):
        model(**tiny.pack_text(documents, SEQ_LEN)).loss_sum.backward()
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("cast_afterwards", [False, True])
def test_rotary_frequencies_are_stocks_in_fp32_under_bf16(
    build: Build, cast_afterwards: bool
) -> None:
    stock = dict(stock_twin(build()).named_buffers(remove_duplicate=False))
    model = build().bfloat16() if cast_afterwards else build(dtype=torch.bfloat16)
    buffers = dict(model.hf.named_buffers(remove_duplicate=False))
    assert buffers.keys() == stock.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, stock[name]), name


def test_flops_equal_what_torch_counts(build: Build, documents: list[tiny.Document]) -> None:
    model = build()
    batch = tiny.pack_text(documents, SEQ_LEN)
    batch["num_targets"] = SEQ_LEN  # the counted model computes every row's logits
    with FlopCounterMode(display=False) as counter:
        model.logits(**tiny.inputs_only(batch)).float().sum().backward()
    with FlopCounterMode(display=False) as rotary:  # old releases make the angles by matmul
        model.hf.model.rotary_emb(torch.zeros(1), batch["position_ids"])
    everything = counter.get_flop_counts()["Global"].items()
    linear = sum(n for operator, n in everything if "scaled_dot_product" not in str(operator))
    linear -= rotary.get_total_flops()
    pairs = sum(n * (n + 1) // 2 for n in (9, 1, 20, 11, SEQ_LEN - 41))
    attention = 2 * 2 * 2 * 64 * pairs  # matmuls, FLOPs a multiply-add, layers, width
    assert model.flops(batch) == linear + 3 * attention
    assert build(freeze=["language"]).flops(batch) == model.flops(batch) / 3


@pytest.mark.parametrize("tied", [False, True])
def test_weights_go_into_stock_and_come_back(
    build: Build, documents: list[tiny.Document], tmp_path: Path, tied: bool
) -> None:
    model, out = build(tied=tied), tmp_path / "export"
    export(model.hf, out, tmp_path / f"tiny-{tied}", dtype=torch.float32)
    stock, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) == (not tied)
    loss = model(**tiny.pack_text(documents, SEQ_LEN)).loss_sum
    torch.testing.assert_close(stock_loss(stock, documents), loss)
    stock.save_pretrained(tmp_path / "stock")
    again = build(path=tmp_path / "stock")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_answers_are_stocks(build: Build, documents: list[tiny.Document]) -> None:
    model = build()
    settings = {"max_new_tokens": 5, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    answers = generate(model, documents, **settings)
    stock = stock_twin(model)
    for document, answer in zip(documents, answers, strict=True):
        tokens = stock.generate(document.input_ids[None], do_sample=False, **settings)[0]
        assert [*answer, tiny.EOS][: len(tokens) - len(document.input_ids)] == (
            tokens[len(document.input_ids) :].tolist()
        )


def test_it_has_one_part_and_muon_knows_its_matrices(build: Build) -> None:
    model = build(tied=True)
    assert count_parameters(model) == {"language": sum(p.numel() for p in model.parameters())}
    assert len(matrix_shapes(model)) == 2 * 7
    batch = pretend_batch(
        model, 32, document_len=8, image_share=0.5, target_share=1.0, image_tokens=4
    )
    assert model(**batch).num_targets == 32


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_sliding_window", True, "use_sliding_window must be false"),
        ("attention_dropout", 0.1, "attention_dropout must be 0"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "rope_type must be default"),
    ],
)
def test_what_packed_rows_cannot_compute_is_refused(
    build: Build, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    path = tiny.write_text_model_dir(tmp_path / "odd")
    config = (path / "config.json").read_text()
    tree = json.loads(config) | {key: value}
    (path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=message):
        build(path=path, init="random")
    with pytest.raises(ValueError, match=r"model.freeze: must name parts"):
        ModelConfig(path=path, freeze=["vision"]).check_path()
