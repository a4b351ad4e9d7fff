"""Every dense family of text alone: packed rows give what stock gives for documents one by one.

Losses and gradients in fp64, FLOPs, directories that stock and we write for each other, answers,
and the names and shapes of the published sizes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import tiny
from tests.models.stock import stock_loss, stock_twin
from triptych_models.config import ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model, family_class
from triptych_models.freeze import count_parameters
from triptych_models.generate import generate
from triptych_models.matrices import matrix_shapes

SEQ_LEN = 64
WRITERS: dict[str, Callable[..., Path]] = {"qwen2": tiny.write_qwen2_model_dir}
# Matrices that Muon trains in the tiny model's two layers.
MATRICES = {"qwen2": 2 * 7}
each_family = pytest.mark.parametrize("family", WRITERS)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Any]:
    """A tiny model of a family; no weight is 0 or 1, as those of a norm or bias begin."""

    def build_tiny(family: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
        path = tmp_path / family
        if not path.exists():
            WRITERS[family](path, tied=True)
        config = ModelConfig(**({"path": path, "init": "random"} | fields))
        model = build_model(config, dtype=dtype).train()
        if config.init == "random":
            shake(model)
        return model

    return build_tiny


def shake(model: torch.nn.Module) -> None:
    """Move every vector, so that none is what it begins with."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                moved = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(moved.to(parameter.dtype))


@pytest.fixture
def documents() -> list[tiny.Document]:
    """Four of 9, 1, 20 and 11 tokens."""
    return [tiny.document(seed, words=words) for seed, words in enumerate((9, 1, 20, 11))]


@each_family
def test_packed_loss_and_gradients_equal_stock_in_fp64(build, documents, family: str) -> None:
    model = build(family, torch.float64, fuse=False)
    stock = stock_twin(model, torch.float64)
    out = model(**tiny.pack_text(documents, SEQ_LEN))
    out.loss_sum.backward()
    expected = stock_loss(stock, model, [d for d in documents if len(d.input_ids) > 1])
    expected.backward()
    torch.testing.assert_close(out.loss_sum.double(), expected, rtol=1e-6, atol=0)
    ours = dict(model.hf.named_parameters())
    for name, parameter in stock.named_parameters():
        difference = (ours[name].grad - parameter.grad).norm()
        # A bias of all keys moves no softmax: its gradient is 0, up to rounding.
        assert difference <= 1e-7 * parameter.grad.norm() + 1e-12, name


@each_family
def test_weights_go_into_stock_and_come_back(build, documents, tmp_path, family: str) -> None:
    model, out = build(family), tmp_path / "export"
    export(model.hf, out, tmp_path / family, dtype=torch.float32)
    stock, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    loss = model(**tiny.pack_text(documents, SEQ_LEN)).loss_sum
    wanted = stock_loss(stock, model, [d for d in documents if len(d.input_ids) > 1])
    torch.testing.assert_close(wanted, loss, rtol=1e-5, atol=1e-5)
    stock.save_pretrained(tmp_path / "stock")
    again = build(family, path=tmp_path / "stock", init="pretrained")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


@each_family
def test_answers_are_stocks(build, documents, family: str) -> None:
    model = build(family)
    settings = {"max_new_tokens": 5, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    answers = generate(model, documents, **settings)
    stock = stock_twin(model).eval()
    for document, answer in zip(documents, answers, strict=True):
        tokens = stock.generate(document.input_ids[None], do_sample=False, **settings)[0]
        new = tokens[len(document.input_ids) :].tolist()
        assert [*answer, tiny.EOS][: len(new)] == new


@each_family
def test_flops_equal_what_torch_counts(build, documents, family: str) -> None:
    model = build(family)
    batch = tiny.pack_text(documents, SEQ_LEN)
    batch["num_targets"] = SEQ_LEN  # the counted model computes every row's logits
    with FlopCounterMode(display=False) as counter:
        model.logits(**tiny.inputs_only(batch)).float().sum().backward()
    with FlopCounterMode(display=False) as rotary:  # old releases make the angles by matmul
        model.hf.model.rotary_emb(torch.zeros(1), batch["position_ids"])
    everything = counter.get_flop_counts()["Global"].items()
    linear = sum(n for operator, n in everything if "scaled_dot_product" not in str(operator))
    pairs = sum(n * (n + 1) // 2 for n in (9, 1, 20, 11, SEQ_LEN - 41))
    attention = 2 * 2 * 2 * 32 * pairs  # matmuls, FLOPs a multiply-add, layers, width
    assert model.flops(batch) == linear - rotary.get_total_flops() + 3 * attention
    assert build(family, freeze=["language"]).flops(batch) == model.flops(batch) / 3


@each_family
def test_it_has_one_part_and_muon_knows_its_matrices(build, family: str) -> None:
    model = build(family)
    assert count_parameters(model) == {"language": sum(p.numel() for p in model.parameters())}
    assert len(matrix_shapes(model)) == MATRICES[family]


# Published sizes: configuration, and parameters as the hub counts them.
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "Qwen2.5-0.5B": (
        "qwen2",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "Qwen2.5-7B": (
        "qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        7_615_616_512,
    ),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_names_and_shapes_of_published_sizes_are_stocks(size: str) -> None:
    model_type, fields, count = PUBLISHED[size]
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, **fields)
        model = family_class(model_type)(config, dtype=torch.bfloat16)
        stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    assert {n: p.shape for n, p in model.hf.named_parameters()} == {
        n: p.shape for n, p in stock.named_parameters()
    }
    assert sum(p.numel() for p in model.parameters()) == count
