"""Every family with experts: packed rows give what stock gives for documents one by one.

Losses, gradients of routers, experts, shared experts and all else, FLOPs, the directories that
stock and we write for each other, answers. The routers' own losses are test_qwen3_moe.py's.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.models import tiny
from tests.models.stock import stock_logits, stock_loss, stock_twin
from triptych_models.catalogue import FAMILIES
from triptych_models.config import ModelConfig
from triptych_models.expert_weights import router_biases
from triptych_models.export import export
from triptych_models.families import build_model, family_class
from triptych_models.freeze import count_parameters, parameter_parts
from triptych_models.generate import generate
from triptych_models.layout import decoder, head_dim, text_config
from triptych_models.matrices import matrix_shapes
from triptych_models.mixture import Mixture

SEQ_LEN = 96
WRITERS: dict[str, Callable[..., Path]] = {
    "dots1": tiny.write_dots1_model_dir,
    "mixtral": tiny.write_mixtral_model_dir,
    "qwen2_moe": tiny.write_qwen2_moe_model_dir,
    "qwen3_5_moe_text": tiny.write_qwen3_5_moe_model_dir,
    "qwen3_moe": tiny.write_moe_model_dir,
    "qwen3_next": tiny.write_qwen3_next_model_dir,
    "qwen3_vl_moe": tiny.write_vl_moe_model_dir,
}
# What directories call an expert's matrices.
STORED = {
    "dots1": "model.layers.1.mlp.experts.3.up_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w3.weight",
    "qwen2_moe": "model.layers.1.mlp.experts.3.up_proj.weight",
    "qwen3_5_moe_text": "model.layers.1.mlp.experts.3.up_proj.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.3.up_proj.weight",
    "qwen3_next": "model.layers.1.mlp.experts.3.up_proj.weight",
    "qwen3_vl_moe": "model.language_model.layers.1.mlp.experts.gate_up_proj",
}
# Their blocks are those of families above; test_families.py has the rest.
LIKE_OTHERS = {"qwen3_5_moe": "qwen3_5_moe_text", "qwen3_omni_moe_thinker": "qwen3_vl_moe"}
HYBRID = ("qwen3_5_moe_text", "qwen3_next")  # FLOPs of Gated DeltaNet are test_families.py's
each_family = pytest.mark.parametrize("family", WRITERS)


def test_all_families_with_experts_are_here() -> None:
    mixtures = {name for name in FAMILIES if issubclass(family_class(name), Mixture)}
    assert mixtures == {*WRITERS, *LIKE_OTHERS}


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Any]:
    def build_tiny(
        family: str, *, dtype: torch.dtype = torch.float32, folder: Any = (), **fields: Any
    ) -> Any:
        if "path" not in fields:
            shutil.rmtree(tmp_path / "tiny", ignore_errors=True)
            fields["path"] = WRITERS[family](tmp_path / "tiny", **dict(folder))
            fields.setdefault("init", "random")
        fields.setdefault("moe", {"aux_loss": 0.0})
        model = build_model(ModelConfig(**fields), dtype=dtype).train()
        if fields.get("init") == "random":
            for bias in router_biases(model).values():
                bias.copy_(torch.tensor([0.03, -0.02, 0.01, 0.0]))
        return model

    return build_tiny


def documents(family: str) -> list[tiny.Document]:
    """Four of 9, 1, 20 and 11 words; with images between where the family sees them."""
    grids: list[list[tuple[int, int, int]]] = [[], [], [], []]
    if family == "qwen3_vl_moe":
        grids = [[], [(1, 4, 6)], [], [(1, 8, 2), (1, 2, 2)]]
    return [
        tiny.document(seed, words=words, grids=each)
        for seed, (words, each) in enumerate(zip((9, 1, 20, 11), grids, strict=True))
    ]


def pack(family: str, chosen: list[tiny.Document], seq_len: int = SEQ_LEN) -> dict[str, Any]:
    return (tiny.pack if family == "qwen3_vl_moe" else tiny.pack_text)(chosen, seq_len)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_packed_loss_and_gradients_equal_stock(build: Any, family: str, dtype: torch.dtype) -> None:
    # In fp64 by plain ops, in fp32 by the grouped kernels.
    model = build(family, dtype=dtype, fuse=dtype == torch.float32)
    stock = stock_twin(model, dtype)
    out = model(**pack(family, documents(family)))
    out.loss_sum.backward()
    expected = stock_loss(stock, model, documents(family))
    expected.backward()
    torch.testing.assert_close(out.loss_sum.double(), expected.double(), rtol=1e-6, atol=0)
    ours, theirs = dict(model.hf.named_parameters()), dict(stock.named_parameters())
    assert ours.keys() == theirs.keys()
    whole = torch.stack([p.grad.norm() for p in theirs.values()]).norm()
    for name, parameter in theirs.items():
        difference = (ours[name].grad - parameter.grad).norm()
        # Key biases have no gradient but rounding; stock rounds a router's softmax to fp32.
        assert difference <= 1e-5 * parameter.grad.norm() + 1e-8 * whole, name


@pytest.mark.parametrize("family", [name for name in WRITERS if name not in HYBRID])
def test_flops_are_those_of_the_experts_that_run(build: Any, family: str) -> None:
    model = build(family)
    stock = stock_twin(model)
    lengths = (9, 1, 20, 11)
    chosen = [tiny.document(seed, words=words) for seed, words in enumerate(lengths)]
    batch = pack(family, chosen)
    batch["num_targets"] = SEQ_LEN  # the counted model computes every row's logits
    with FlopCounterMode(display=False) as counter:
        stock(batch["input_ids"]).logits.sum().backward()
    with FlopCounterMode(display=False) as rotary:
        decoder(model.hf).rotary_emb(torch.zeros(1), batch["position_ids"])
    everything = counter.get_flop_counts()["Global"].items()
    linear = sum(n for operator, n in everything if "scaled_dot_product" not in str(operator))
    linear -= rotary.get_total_flops()
    text = text_config(model.hf.config)
    width = text.num_attention_heads * head_dim(text)
    pairs = sum(n * (n + 1) // 2 for n in (*lengths, SEQ_LEN - sum(lengths)))
    attention = 2 * 2 * text.num_hidden_layers * width * pairs  # matmuls, FLOPs a multiply-add
    assert model.flops(batch) == linear + 3 * attention


@each_family
def test_weights_go_into_stock_and_come_back(build: Any, family: str, tmp_path: Path) -> None:
    chosen = documents(family)
    # Matrices of (E, 32, 32) are square, where shapes do not tell how they are stored.
    width = {"intermediate_size" if family == "mixtral" else "moe_intermediate_size": 12}
    for number, folder in enumerate(({}, width)):
        model, out = build(family, folder=folder), tmp_path / f"export-{number}"
        export(model.hf, out, tmp_path / "tiny", dtype=torch.float32)
        assert STORED[family] in load_file(out / "model.safetensors")
        auto = AutoModelForImageTextToText if "vl" in family else AutoModelForCausalLM
        stock, info = auto.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        loss = model(**pack(family, chosen)).loss_sum
        torch.testing.assert_close(stock_loss(stock, model, chosen), loss)
        stock.save_pretrained(tmp_path / f"stock-{number}")
        for path in (out, tmp_path / f"stock-{number}"):
            again = build(family, path=path)
            for name, parameter in model.named_parameters():
                assert torch.equal(again.get_parameter(name), parameter), (path.name, name)
            for name, bias in router_biases(model).items():
                assert torch.equal(router_biases(again)[name], bias), (path.name, name)


def test_a_hub_folder_of_transposed_stacks_is_read_as_one(build: Any, tmp_path: Path) -> None:
    model = build("qwen3_vl_moe", folder={"moe_intermediate_size": 12})
    export(model.hf, tmp_path / "export", tmp_path / "tiny", dtype=torch.float32)
    stored = load_file(tmp_path / "export/model.safetensors")
    prefix = "model.language_model.layers.0.mlp.experts"
    assert stored[f"{prefix}.gate_up_proj"].shape == (4, 32, 24)
    assert stored[f"{prefix}.down_proj"].shape == (4, 12, 32)


@each_family
def test_answers_are_stocks(build: Any, family: str) -> None:
    model = build(family)
    settings = {"max_new_tokens": 5, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    text = [document for document in documents(family) if not len(document.image_grid_thw)]
    answers = generate(model, text, **settings)
    stock = stock_twin(model)
    for document, answer in zip(text, answers, strict=True):
        length = len(document.input_ids)
        tokens = stock.generate(document.input_ids[None], do_sample=False, **settings)[0]
        assert [*answer, tiny.EOS][: len(tokens) - length] == tokens[length:].tolist()


@each_family
def test_parts_are_those_that_the_configuration_knows(build: Any, family: str) -> None:
    model = build(family, freeze=["language"])
    counts = count_parameters(model)
    assert tuple(counts) == FAMILIES[family].parts
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    parts = parameter_parts(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parts[name] != "language"), name
        if ".experts." in name:
            assert parts[name] == "experts", name
        elif ".gate." in name or "shared_expert_gate" in name:
            assert parts[name] == "router", name
        elif "shared_expert" in name:
            assert parts[name] == "language", name
    loss = model(**pack(family, documents(family))).loss_sum
    loss.backward()
    matrices = matrix_shapes(model)
    experts = [name for name in matrices if ".experts.gate_up_proj" in name]
    assert len(experts) == len(model.blocks()) and len(matrices[experts[0]]) == 2 * 4
    assert not [name for name in matrices if ".gate." in name or "shared_expert_gate" in name]


@pytest.mark.parametrize(
    ("family", "folder", "message"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise must be 0, got 0.1"),
        ("dots1", {"n_group": 2}, "n_group must be 1, got 2"),
        ("dots1", {"sliding_window": 8, "max_window_layers": 1}, "sliding_window must be false"),
        ("mixtral", {"sliding_window": 8}, "sliding_window must be false or null, got 8"),
        ("qwen2_moe", {"hidden_act": "gelu"}, "hidden_act must be silu"),
        ("qwen3_vl_moe", {"hidden_act": "gelu"}, "hidden_act must be silu"),
    ],
)
def test_what_cannot_be_is_refused(build: Any, family: str, folder: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(family, folder=folder)


def test_load_of_images_is_that_of_their_tokens(build: Any) -> None:
    model = build("qwen3_vl_moe")
    chosen = documents("qwen3_vl_moe")
    chosen[1].shift_labels[:] = -100  # a document without a target is not counted
    metrics = model(**pack("qwen3_vl_moe", chosen)).metrics
    # Routed one by one: what stock's routers choose for each token.
    stock, wanted = stock_twin(model), torch.zeros(2, 2, 4)
    picked: list[Tensor] = []
    for layer in stock.model.language_model.layers[:2]:
        layer.mlp.gate.register_forward_hook(lambda *call: picked.append(call[-1][-1]))
    for document in (chosen[0], chosen[2], chosen[3]):
        picked.clear()
        stock_logits(stock, model, document)
        kind = (document.input_ids == tiny.IMAGE).long()
        for number, experts in enumerate(picked):
            for token, pair in zip(kind, experts, strict=True):
                wanted[number, token, pair] += 1
    assert torch.equal(metrics["expert_load"], wanted.sum(1))
    assert torch.equal(metrics["expert_load_images"], wanted[:, 1])
    alone = model(**pack("qwen3_vl_moe", chosen[:1])).metrics
    assert alone.keys() == metrics.keys() and not alone["expert_load_images"].any()
