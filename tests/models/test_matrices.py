"""Which parameters of a model Muon trains, and which rows are matrices of their own."""

import torch
from torch import nn

from tests.tiny import make_model_dir
from triptych_models.config import ModelConfig
from triptych_models.families import build_model
from triptych_models.matrices import matrix_shapes


def test_linear_layers_of_qwen3_vl_and_nothing_else(tmp_path):
    for tied in (True, False):
        path = make_model_dir(tmp_path / f"tied-{tied}", tied=tied)
        model = build_model(ModelConfig(path=path, init="random"), dtype=torch.float32)
        found = matrix_shapes(model)
        named = dict(model.named_parameters())
        left = {name.rpartition(".")[0] for name, p in named.items() if name not in found}
        matrices_left = {n.rpartition(".")[0] for n, p in named.items() if p.dim() > 1} - {
            n.rpartition(".")[0] for n in found
        }
        heads = set() if tied else {"hf.lm_head"}
        assert matrices_left == heads | {
            "hf.model.language_model.embed_tokens",
            "hf.model.visual.pos_embed",
            "hf.model.visual.patch_embed.proj",
        }
        assert "hf.model.language_model.layers.0.input_layernorm" in left
        assert found["hf.model.visual.blocks.0.attn.qkv.weight"] == [(32, 32)] * 3
        assert found["hf.model.language_model.layers.0.mlp.down_proj.weight"] == [(48, 64)]
        for name, shapes in found.items():
            assert sum(rows * columns for rows, columns in shapes) == named[name].numel(), name


def test_experts_are_stacks_and_routers_are_left_out():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 6, 5))
            self.down_proj = nn.Parameter(torch.zeros(4, 5, 3))

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 5))

    found = matrix_shapes(nn.ModuleDict({"gate": Router(), "experts": Experts()}))
    assert found == {
        "experts.gate_up_proj": [(3, 5)] * 8,
        "experts.down_proj": [(5, 3)] * 4,
    }


def test_a_partitioned_parameter_is_judged_by_its_whole_shape():
    layer = nn.Linear(3, 6, bias=False)
    layer.weight = nn.Parameter(torch.empty(0))
    layer.weight.ds_shape = torch.Size([6, 3])  # what ZeRO-3 leaves behind
    assert matrix_shapes(nn.ModuleDict({"qkv": layer})) == {"qkv.weight": [(2, 3)] * 3}
