"""SiT against straight formulas, its published sizes, and its checkpoints."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models import straight_sit
from triptych_models.diffusion.build import build_diffusion, build_shell
from triptych_models.diffusion.config import DiffusionModelConfig, ObjectiveConfig, SiTConfig
from triptych_models.diffusion.sit import SiT, sit_flops
from triptych_models.diffusion.sit_model import SiTModel, initialize_sit
from triptych_models.diffusion.sit_weights import export_sit, load_sit

TINY = {
    "size": "custom",
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 2,
    "image_size": 6,
    "channels": 3,
    "num_classes": 5,
}


def tiny(objective: ObjectiveConfig | None = None, **fields) -> SiTModel:
    """A net of which nothing is zero, in fp64."""
    sit = SiTConfig(**TINY | fields)
    model = build_shell(
        DiffusionModelConfig(sit=sit), objective or ObjectiveConfig(), dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.2 * value)
    return model


def batch(model: SiTModel, count: int = 3) -> dict:
    generator = torch.Generator().manual_seed(2)
    shape = (count, *model.latent_shape)
    latents, noise = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return {
        "latents": latents,
        "noise": noise,
        "times": torch.tensor([0.9, 0.3, 0.6], dtype=torch.float64)[:count],
        "drops": torch.tensor([0.5, 0.05, 0.99])[:count],
        "weights": torch.tensor([1.0, 1.0, 0.0])[:count],
        "labels": torch.tensor([4, 2, 0])[:count],
        "num_targets": 2 * latents[0].numel(),
    }


@pytest.mark.parametrize(
    ("objective", "patch", "learn_sigma"),
    [
        (("linear", "velocity", "none"), 2, False),
        (("linear", "noise", "velocity"), 3, True),
        (("gvp", "velocity", "none"), 1, True),
        (("gvp", "score", "likelihood"), 2, False),
        (("vp", "velocity", "none"), 2, False),
        (("vp", "noise", "none"), 2, False),
        (("vp", "score", "velocity"), 2, False),
    ],
)
def test_loss_and_gradients_are_those_of_a_straight_formula(objective, patch, learn_sigma):
    path, prediction, weighting = objective
    settings = ObjectiveConfig(path=path, prediction=prediction, weighting=weighting)
    sizes = {"image_size": 6} if patch != 3 else {"image_size": 4, "patch_size": 4}
    model = tiny(settings, **({"patch_size": patch} | sizes), learn_sigma=learn_sigma)
    given = batch(model)
    output = model.train()(**given)
    output.loss_sum.backward()
    found = {name: parameter.grad for name, parameter in model.net.named_parameters()}
    model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = None
    expected = straight_sit.loss(model.net, objective, given, drop_below=0.1)
    expected.backward()
    assert output.num_targets == given["num_targets"]
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-9, atol=0)
    for name, parameter in model.net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-9, msg=name)


def test_nothing_is_dropped_in_evaluation():
    model, objective = tiny(), ("linear", "velocity", "none")
    given = batch(model)
    found = model.eval()(**given).loss_sum
    torch.testing.assert_close(found, straight_sit.loss(model.net, objective, given, -1.0))


@pytest.mark.parametrize(
    ("size", "patch", "millions", "gmacs"),
    # Table 1 and 4 of DiT (arXiv 2212.09748): parameters, and "Gflops", which are multiply-adds.
    [("S", 2, 33, 6.06), ("B", 2, 130, 23.01), ("L", 2, 458, 80.71), ("XL", 2, 675, 118.64)],
)
def test_sizes_and_flops_are_the_published_ones(size, patch, millions, gmacs):
    config = SiTConfig(size=size, patch_size=patch, learn_sigma=True)
    with torch.device("meta"):
        net = SiT(config)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
    products, _, attention = sit_flops(config)
    assert abs((products + attention) / 2e9 - gmacs) < 0.03


def test_names_and_shapes_are_those_of_the_official_xl_2():
    with torch.device("meta"):
        net = SiT(SiTConfig(size="XL", patch_size=2, learn_sigma=True))
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    shapes["pos_embed"] = tuple(net.pos_embed.shape)
    width = 1152
    expected = {
        "x_embedder.proj.weight": (width, 4, 2, 2),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (1001, width),
        "pos_embed": (1, 256, width),
        "final_layer.linear.weight": (32, width),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    for i in range(28):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
            ("adaLN_modulation.1", 6 * width, width),
        ):
            expected[f"blocks.{i}.{name}.weight"] = (rows, columns)
            expected[f"blocks.{i}.{name}.bias"] = (rows,)
    assert shapes == expected
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert total == 675_129_632  # what the official script prints


def test_flops_are_those_a_profiler_counts():
    model = tiny().train()
    given = batch(model)
    # It knows no other attention of a CPU than that of matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**given).loss_sum.backward()
    assert model.flops(given) == counter.get_total_flops()


@pytest.mark.parametrize("way", ["full", "selective", "offload"])
def test_what_is_computed_again_changes_no_gradient(way):
    model = tiny().train()
    given, found = batch(model), []
    for checkpointing in ("none", way):
        model.set_checkpointing(checkpointing)
        model.zero_grad()
        model(**given).loss_sum.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weights_are_drawn_by_the_rule_of_dit():
    model = tiny(hidden_size=96)
    initialize_sit(model.net, seed=3)
    net = model.net
    assert not net.final_layer.linear.weight.any()
    assert not net.blocks[1].adaLN_modulation[1].weight.any()
    weight = net.blocks[0].attn.qkv.weight
    bound = (6 / (96 + 3 * 96)) ** 0.5
    assert 0.95 * bound < weight.abs().max() <= bound
    assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.05  # of a uniform distribution
    assert abs(net.y_embedder.embedding_table.weight.std() - 0.02) < 0.004
    again = tiny(hidden_size=96)
    initialize_sit(again.net, seed=3)
    pairs = zip(net.parameters(), again.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_weights_go_out_and_in_by_the_official_layout(tmp_path: Path):
    model = tiny(learn_sigma=True)
    export_sit(model.net, tmp_path / "export", model.objective, dtype=torch.float64)
    stored = torch.load(tmp_path / "export/model.pt", weights_only=True)
    assert stored["pos_embed"].shape == (1, 9, 24)
    torch.save({"ema": stored, "opt": {}}, tmp_path / "training.pt")
    for file in (tmp_path / "export/model.pt", tmp_path / "training.pt"):
        config = DiffusionModelConfig(
            sit=SiTConfig(**TINY, learn_sigma=True), init="pretrained", path=file
        )
        again = build_diffusion(config, ObjectiveConfig(), dtype=torch.float64)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, again.get_parameter(name)), name


class Runs:
    """What a hostile file would have unpickled."""

    def __reduce__(self):
        return (print, ("ran",))


def test_other_files_are_refused(tmp_path: Path, capsys):
    model = tiny()
    export_sit(model.net, tmp_path, model.objective)
    stored = torch.load(tmp_path / "model.pt", weights_only=True)
    hurt = {
        "missing": {k: v for k, v in stored.items() if k != "blocks.1.mlp.fc1.bias"},
        "must be": stored | {"blocks.1.mlp.fc1.bias": torch.zeros(3)},
        "pos_embed": stored | {"pos_embed": stored["pos_embed"].flip(1)},
        "whole file": stored | {"x": Runs()},
        "names and tensors": {"ema": 3, "x": "y"},
    }
    for message, content in hurt.items():
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=message):
            load_sit(model.net, tmp_path / "bad.pt")
    (tmp_path / "bad.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match="whole file"):
        load_sit(model.net, tmp_path / "bad.pt")
    assert capsys.readouterr().out == ""
