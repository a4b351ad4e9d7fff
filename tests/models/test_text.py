"""Families of text alone, beside what test_families.py proves of every one.

Answers, Muon's matrices, first values, and layers of Gated DeltaNet.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from tests.models import tiny
from tests.models.stock import stock_loss, stock_twin
from triptych_kernels.dispatch import use_backend
from triptych_models.config import ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model
from triptych_models.generate import generate
from triptych_models.matrices import matrix_shapes
from triptych_models.pack_cost import pack_cost
from triptych_models.sequence import SequenceGroup

SHIPPED = Path(__file__).parents[2] / "stages/configs/gated_delta_net_tiny"
SEQ_LEN = 64
WRITERS: dict[str, Callable[..., Path]] = {
    "qwen2": tiny.write_qwen2_model_dir,
    "qwen3_5_text": tiny.write_qwen3_5_model_dir,
    "gated_delta_net": tiny.write_gated_delta_net_dir,
    "qwen3_next": tiny.write_qwen3_next_model_dir,
}
# Matrices that Muon trains in the tiny model's layers; of in_proj_qkv three.
MATRICES = {"qwen2": 2 * 7, "qwen3_5_text": 3 * (7 + 3) + 7, "gated_delta_net": 4 * (7 + 3)}
each_family = pytest.mark.parametrize("family", WRITERS)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Any]:
    """A tiny model; no weight is 0 or 1, as those of a norm or bias begin."""

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
    """Move every vector, and what is 0, so that none is what it begins with."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                moved = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(moved.to(parameter.dtype))


@pytest.fixture
def documents() -> list[tiny.Document]:
    """Four of 9, 1, 20 and 11 tokens."""
    return [tiny.document(seed, words=words) for seed, words in enumerate((9, 1, 20, 11))]


@each_family
def test_answers_are_stocks(build: Any, documents: Any, family: str) -> None:
    model = build(family)
    settings = {"max_new_tokens": 5, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    answers = generate(model, documents, **settings)
    stock = stock_twin(model).eval()
    # Stock's cache of such layers alone has no length, and it cannot begin.
    settings["use_cache"] = family != "gated_delta_net"
    for document, answer in zip(documents, answers, strict=True):
        tokens = stock.generate(document.input_ids[None], do_sample=False, **settings)[0]
        new = tokens[len(document.input_ids) :].tolist()
        assert [*answer, tiny.EOS][: len(new)] == new


@pytest.mark.parametrize("family", MATRICES)
def test_muon_knows_the_matrices(build: Any, family: str) -> None:
    found = matrix_shapes(build(family))
    assert sum(map(len, found.values())) == MATRICES[family]
    for name, shapes in found.items():
        assert "conv1d" not in name
        if name.endswith("in_proj_qkv.weight"):
            assert shapes == [(16, 32), (16, 32), (48, 32)]


def test_a_plain_gated_delta_net_equals_stock(build: Any, documents: Any) -> None:
    """Without a layer of attention; long documents, so that a state goes over chunks of 64."""
    documents = [tiny.document(seed, words=words) for seed, words in enumerate((150, 3, 70))]
    model = build("gated_delta_net", torch.float64)
    stock = stock_twin(model, torch.float64)
    stock.config.use_cache = False
    loss = model(**tiny.pack_text(documents, 256)).loss_sum
    loss.backward()
    wanted = stock_loss(stock, model, documents)
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    ours = dict(model.hf.named_parameters())
    whole = torch.stack([p.grad.norm() for p in stock.parameters()]).norm()
    for name, parameter in stock.named_parameters():
        difference = (ours[name].grad - parameter.grad).norm()
        # Stock's rule is fp32 whatever comes in, and norms of small states make that larger.
        assert difference <= 2e-4 * parameter.grad.norm() + 1e-6 * whole, name


def test_flops_of_the_delta_rule_are_those_of_its_recurrence(build: Any, documents: Any) -> None:
    model = build("gated_delta_net")
    batch = tiny.pack_text(documents, SEQ_LEN) | {"num_targets": SEQ_LEN}
    with FlopCounterMode(display=False) as counter, use_backend(gated_delta_rule="reference"):
        model.logits(**tiny.inputs_only(batch))
    forward = counter.get_flop_counts()["Global"]
    with FlopCounterMode(display=False) as rotary:
        model.hf.model.rotary_emb(torch.zeros(1), batch["position_ids"])
    counted = {str(operator): n for operator, n in forward.items()}
    # Of the three products the last, k (beta u)^T, is none to torch, which broadcasts it.
    state = counted["aten.bmm"] * 3 / 2
    assert model.flops(batch) == 3 * (counted["aten.mm"] - rotary.get_total_flops() + state)
    # Nothing grows with pairs of tokens: packs cost what their tokens do.
    cost = pack_cost(model.flops, images=False)
    assert cost["linear"] == pytest.approx(2**30, rel=1e-4) and cost["target"] > 2**24


def test_random_weights_begin_as_stocks_do(tmp_path: Path) -> None:
    path = tiny.write_qwen3_next_model_dir(tmp_path / "model")
    model = build_model(ModelConfig(path=path, init="random"), dtype=torch.float32)
    norms = [p for n, p in model.named_parameters() if n.endswith("norm.weight")]
    assert {p.unique().item() for p in norms} == {0.0, 1.0}
    for layer in model.hf.model.layers:
        assert (
            not layer.input_layernorm.weight.any()
            and not layer.post_attention_layernorm.weight.any()
        )
        if hasattr(layer, "linear_attn"):
            mixer = layer.linear_attn
            assert (mixer.norm.weight == 1).all() and (mixer.dt_bias == 1).all()
            assert (mixer.A_log.exp() >= 0.01).all() and (mixer.A_log.exp() < 16).all()
    assert len({float(x) for x in model.hf.model.layers[0].linear_attn.A_log}) == 4


def test_what_stock_leaves_aside_may_be_stored(build: Any, tmp_path: Path) -> None:
    model, out = build("qwen3_next"), tmp_path / "export"
    export(model.hf, out, tmp_path / "qwen3_next", dtype=torch.float32)
    tensors = load_file(out / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": torch.ones(2, 2)}, out / "model.safetensors")
    again = build("qwen3_next", path=out, init="pretrained")
    assert all(torch.equal(again.get_parameter(n), p) for n, p in model.named_parameters())
    save_file(tensors | {"model.fc.weight": torch.ones(2, 2)}, out / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected \['model.fc.weight'\]"):
        build("qwen3_next", path=out, init="pretrained")


def test_ranks_that_share_a_row_are_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=r"parallel.sequence: must be 1 for layers of Gated"):
        build("qwen3_5_text").set_sequence(SequenceGroup("", 2, 0))


def test_a_quarter_of_a_head_is_turned_in_fp32_under_bf16(build: Any) -> None:
    model = build("qwen3_5_text").bfloat16()
    stock = stock_twin(build("qwen3_5_text"))
    frequencies = model.hf.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32 and frequencies.shape == (2,)
    assert torch.equal(frequencies, stock.model.rotary_emb.inv_freq)


def test_the_shipped_gated_delta_net_is_one() -> None:
    model = build_model(ModelConfig(path=SHIPPED, init="random"), dtype=torch.float32)
    assert all(hasattr(layer, "linear_attn") for layer in model.hf.model.layers)
    assert 2_000_000 < sum(p.numel() for p in model.parameters()) < 2_300_000


def test_the_tiny_configuration_has_widths_that_differ(tmp_path: Path) -> None:
    """Or a mix-up of keys and values would not show."""
    config = json.loads((tiny.write_qwen3_5_model_dir(tmp_path / "x") / "config.json").read_text())
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    assert keys != config["linear_num_value_heads"] * config["linear_value_head_dim"]
