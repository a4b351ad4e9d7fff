"""RAE against straight formulas, diffusers' own module, its published sizes and its files."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

diffusers = pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.models.straight_rae import straight_step  # noqa: E402
from tests.models.tiny_rae import configs, draw_batch, write_encoder  # noqa: E402
from triptych_models.autoencoder.build import build_rae  # noqa: E402
from triptych_models.autoencoder.config import (  # noqa: E402
    AdversaryConfig,
    DecoderConfig,
    FrozenConfig,
    PerceptualConfig,
    RAEModelConfig,
)
from triptych_models.autoencoder.encoder import Encoder, make_decoder  # noqa: E402
from triptych_models.autoencoder.perceptual import load_perceptual  # noqa: E402
from triptych_models.autoencoder.rae import RAE  # noqa: E402
from triptych_models.autoencoder.weights import export_rae  # noqa: E402
from triptych_models.freeze import count_parameters, parameter_parts  # noqa: E402


def tiny(folder: Path, kind: str = "dinov2", way: str = "none", **adversary) -> RAE:
    """A model of which nothing is zero."""
    config, *judges = configs(folder, kind, **adversary)
    config = config.model_copy(update={"compile": way})
    model = build_rae(config, *judges, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def run(model: RAE, batch: dict, pieces: int = 1) -> dict[str, float]:
    """The first step's means, by so many micro-batches; gradients are of means, too."""
    size = len(batch["pixels"]) // pieces
    window = [
        {k: v[i * size :][:size] if k != "num_targets" else v for k, v in batch.items()}
        for i in range(pieces)
    ]
    model.begin_step(1)
    if pieces > 1:
        model.survey(window)
    total: dict[str, float] = {}
    for micro in window:
        output = model(**micro)
        (output.loss_sum / batch["num_targets"]).backward()
        for name, value in {"loss": output.loss_sum, **output.metrics}.items():
            total[name] = total.get(name, 0.0) + value.item() / batch["num_targets"]
    return total


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("kind", ["dinov2", "siglip2", "mae"])
def test_losses_and_gradients_are_those_of_straight_formulas(tmp_path, kind, pieces):
    model = tiny(tmp_path / "nets", kind)
    batch = draw_batch(4, seed=11)
    expected = straight_step(model, configs(tmp_path / "nets", kind), batch)
    assert expected.margin > 1e-5, "fp32 may take the other side of a jump: draw other numbers"
    found = run(model, batch, pieces)
    assert found.keys() == expected.figures.keys()
    for name, value in expected.figures.items():
        assert found[name] == pytest.approx(value, rel=2e-4), name
    names = {name for name, _ in model.named_parameters()}
    assert names == expected.gradients.keys()
    for name, parameter in model.named_parameters():
        wanted = expected.gradients[name]
        scale = wanted.abs().max().item()
        torch.testing.assert_close(
            parameter.grad.double(), wanted, rtol=1e-3, atol=2e-4 * scale + 1e-8, msg=name
        )
        # The first cancels in a softmax, the second where no score is beyond its margin.
        if not name.endswith(("to_k.bias", "score.bias")):
            assert scale > 1e-6, name


def test_before_its_start_the_discriminator_is_not_heeded(tmp_path):
    model = tiny(tmp_path / "nets", discriminator_start=2, start=3)
    batch, seen = draw_batch(4), []
    for step in (1, 2, 3):
        model.zero_grad()
        model.begin_step(step)
        output = model(**batch)
        output.loss_sum.backward()
        assert model.discriminator is not None
        learns = model.discriminator.heads[0].score.weight.grad is not None
        seen.append((learns, "deceit" in output.metrics))
    assert seen == [(False, False), (True, False), (True, True)]
    assert set(model.eval()(**batch).metrics) == set()


def test_without_folders_only_l1_is_left(tmp_path):
    config, *_ = configs(tmp_path / "nets")
    model = build_rae(config, PerceptualConfig(), AdversaryConfig(), dtype=torch.float32).train()
    batch = draw_batch(4)
    model.begin_step(1)
    output = model(**batch)
    assert set(output.metrics) == {"l1", "perceptual"}
    assert torch.equal(output.loss_sum, output.metrics["l1"])
    assert "discriminator" not in model.parts()


@pytest.mark.parametrize("adversary", [{}, {"start": 5, "discriminator_start": 5}])
def test_flops_are_those_a_profiler_counts(tmp_path, adversary):
    model, batch = tiny(tmp_path / "nets", **adversary), draw_batch(3)
    model.begin_step(1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch).loss_sum.backward()
    assert model.flops(batch) == counter.get_total_flops()


@pytest.mark.parametrize("way", ["full", "selective"])
def test_what_is_computed_again_changes_no_gradient(tmp_path, way):
    model, batch, found = tiny(tmp_path / "nets"), draw_batch(3), []
    for checkpointing in ("none", way):
        model.set_checkpointing(checkpointing)
        model.zero_grad()
        model.begin_step(2)
        for conv in model.discriminator.convs():
            conv.is_due = False  # or the second would begin from other vectors
        model(**batch).loss_sum.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_compiled_is_what_uncompiled_is_and_settles(tmp_path, monkeypatch):
    """Of a step by one micro-batch and by two, of other numbers of images, and in evaluation."""
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    torch._dynamo.reset()
    plain, compiled = (tiny(tmp_path / "nets", way=way) for way in ("none", "layers"))
    counts = []
    for images, pieces in [(4, 1), (4, 2), (6, 1), (10, 2)]:
        batch, found = draw_batch(images), []
        for model in (plain, compiled):
            model.zero_grad()
            found.append(run(model, batch, pieces))
        assert found[1] == pytest.approx(found[0], rel=1e-5)
        for name, parameter in plain.named_parameters():
            wanted = parameter.grad
            assert wanted is not None
            atol = 1e-5 * wanted.abs().max().item() + 1e-7
            given = compiled.get_parameter(name).grad
            torch.testing.assert_close(given, wanted, rtol=1e-4, atol=atol, msg=name)
        counts.append(graphs.frame_count)
    # Decoder, encoder; a judge's ViT with and without gradients, in two numbers of tokens; its
    # distance; the discriminator's two norms of one and of twice the images.
    assert counts[0] <= 11
    assert counts[1] == counts[2] == counts[3], counts
    with torch.no_grad():
        for images in (3, 5):
            batch = draw_batch(images)
            expected, given = (model.eval()(**batch).losses for model in (plain, compiled))
            torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_positions_are_fitted_once_and_again_for_other_weights(tmp_path, monkeypatch):
    model, batch = tiny(tmp_path / "nets"), draw_batch(4)
    sizes: list[Any] = []
    fit = torch.nn.functional.interpolate

    def seen(images: torch.Tensor, size: tuple[int, int], **more: Any) -> torch.Tensor:
        if len(images) == 1:  # positions
            sizes.append(size)
        return fit(images, size=size, **more)

    monkeypatch.setattr(torch.nn.functional, "interpolate", seen)
    first = run(model, batch)
    assert len(sizes) == 3  # a network each, though judges ran twice
    for conv in model.discriminator.convs():
        conv.is_due = False
    model.begin_step(0)
    assert model(**batch).loss_sum.item() == pytest.approx(first["loss"] * 3)
    assert len(sizes) == 3
    encoder: Any = model.beside[0]
    with torch.no_grad():
        encoder.net.embeddings.position_embeddings.mul_(2.0)
    model.begin_step(0)
    assert model(**batch).loss_sum.item() != pytest.approx(first["loss"] * 3)
    assert len(sizes) == 4


@pytest.mark.parametrize(
    ("size", "channels", "expected"),
    [("XL", 768, 415.2e6), ("L", 768, 303.9e6), ("B", 384, 85.9e6)],
)
def test_published_sizes(size, channels, expected):
    with torch.device("meta"):
        net = make_decoder(RAEModelConfig(decoder=DecoderConfig(size=size)), channels, 256)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(expected, rel=5e-3)


def test_names_and_shapes_are_those_of_the_published_dinov2_b_xl():
    """As diffusers builds nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08."""
    shape = DecoderConfig(size="XL")
    with torch.device("meta"):
        ours = make_decoder(RAEModelConfig(decoder=shape), 768, 256)
        stock = diffusers.AutoencoderRAE(
            decoder_hidden_size=1152,
            decoder_num_hidden_layers=28,
            decoder_num_attention_heads=16,
            decoder_intermediate_size=4096,
        )
        net = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(image_size=518, patch_size=14)
        )
        encoder = Encoder("dinov2", net, 224, [0.5] * 3, [0.5] * 3)
    tensors = {f"decoder.{name}": value for name, value in ours.state_dict().items()}
    tensors |= encoder.tensors() | {f"_latents_{n}": torch.zeros(1) for n in ("mean", "std")}
    assert {n: v.shape for n, v in tensors.items()} == {
        n: v.shape for n, v in stock.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["dinov2", "siglip2", "mae"])
def test_weights_go_out_and_in_by_the_layout_of_diffusers(tmp_path, kind):
    model = tiny(tmp_path / "nets", kind)
    batch = draw_batch(3)
    found = model.eval().reconstruct(batch["pixels"])
    export_rae(model, tmp_path / "export")
    if kind != "siglip2":  # which diffusers 0.42 cannot build with transformers 5.22
        stock = diffusers.AutoencoderRAE.from_pretrained(tmp_path / "export").eval()
        expected = stock(batch["pixels"].float() / 255).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for name, parameter in stock.decoder.named_parameters():
            assert torch.equal(parameter, model.decoder.get_parameter(name)), name
    config, *_ = configs(tmp_path / "nets", kind)
    export = tmp_path / "export"
    again = build_rae(
        config.model_copy(
            update={"init": "pretrained", "path": export, "encoder": FrozenConfig(path=export)}
        ),
        PerceptualConfig(),
        AdversaryConfig(),
        dtype=torch.float32,
    )
    assert torch.equal(again.eval().reconstruct(batch["pixels"]), found)
    held = load_file(export / "diffusion_pytorch_model.safetensors")
    held.pop("decoder.decoder_pred.bias")
    save_file(held, export / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['decoder.decoder_pred.bias'\]"):
        build_rae(
            config.model_copy(update={"init": "pretrained", "path": export}),
            PerceptualConfig(),
            AdversaryConfig(),
            dtype=torch.float32,
        )


def test_parts_freeze(tmp_path):
    config, perceptual, adversary = configs(tmp_path / "nets")
    config = config.model_copy(update={"freeze": ["blocks", "discriminator"]})
    model = build_rae(config, perceptual, adversary, dtype=torch.float32).train()
    model.begin_step(1)
    model(**draw_batch(3)).loss_sum.backward()
    for name, part in parameter_parts(model).items():
        moves = model.get_parameter(name).grad is not None
        assert moves == (part in ("embedders", "head")), name
    assert sum(count_parameters(model).values()) == sum(p.numel() for p in model.parameters())


def test_lpips_is_that_of_a_straight_formula(tmp_path):
    """torchvision's VGG16 under its names, narrow numbers, and LPIPS's linear layers."""
    from torchvision.models import vgg

    torch.manual_seed(0)
    features = vgg.make_layers(vgg.cfgs["D"]).eval()
    lins = [torch.rand(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]
    folder = tmp_path / "lpips"
    folder.mkdir()
    torch.save({f"features.{n}": v for n, v in features.state_dict().items()}, folder / "vgg16.pth")
    images, made = torch.rand(2, 2, 3, 32, 32).unbind(0)

    def straight(weights: list[torch.Tensor]) -> torch.Tensor:
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        a, b, total = (2 * made - 1 - shift) / scale, (2 * images - 1 - shift) / scale, 0.0
        for number, layer in enumerate(features):
            a, b = layer(a), layer(b)
            if number in (3, 8, 15, 22, 29):  # relu1_2 … relu5_3
                squares = (torch.nn.functional.normalize(a) - torch.nn.functional.normalize(b)) ** 2
                total = total + (squares * weights.pop(0)).sum(1).mean((1, 2))
        return total

    with torch.no_grad():
        plain = load_perceptual(PerceptualConfig(path=folder), 0, torch.float32)
        torch.testing.assert_close(plain(made, images), straight([torch.ones(1)] * 5))
        torch.save({f"lin{i}.model.1.weight": w for i, w in enumerate(lins)}, folder / "lin.pth")
        weighed = load_perceptual(PerceptualConfig(path=folder), 0, torch.float32)
        torch.testing.assert_close(weighed(made, images), straight(list(lins)))


def test_a_distance_of_no_features_has_a_gradient():
    """Features that are all zero, as ReLU may leave a token, are no direction."""
    from triptych_models.autoencoder.perceptual import _unit

    features = torch.zeros(2, 3, 4, requires_grad=True)
    (_unit(features) - 0.5).square().sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()


def test_means_of_latents_go_through(tmp_path):
    """Those by which diffusers scales latents for others, of the encoder's folder."""
    model = tiny(tmp_path / "nets")
    export, name = tmp_path / "export", "diffusion_pytorch_model.safetensors"
    export_rae(model, export)
    stock = diffusers.AutoencoderRAE.from_pretrained(export)
    mean, std = torch.randn(64, 2, 2), torch.rand(64, 2, 2) + 0.5
    config = dict(stock.config) | {"latents_mean": mean, "latents_std": std}
    scaled = diffusers.AutoencoderRAE.from_config(config)
    scaled.load_state_dict(stock.state_dict() | {"_latents_mean": mean, "_latents_std": std})
    scaled.save_pretrained(export)
    config, *_ = configs(tmp_path / "nets")
    config = config.model_copy(
        update={"init": "pretrained", "path": export, "encoder": FrozenConfig(path=export)}
    )
    again = build_rae(config, PerceptualConfig(), AdversaryConfig(), dtype=torch.float32)
    export_rae(again, tmp_path / "again")
    found = diffusers.AutoencoderRAE.from_pretrained(tmp_path / "again").eval()
    images = draw_batch(3)["pixels"].float() / 255
    assert torch.equal(found.encode(images).latent, scaled.eval().encode(images).latent)
    with pytest.raises(ValueError, match=r"model.input_size: must be 28, as .* got 42"):
        config = config.model_copy(update={"input_size": 42})
        build_rae(config, PerceptualConfig(), AdversaryConfig(), dtype=torch.float32)
    assert (tmp_path / "again" / name).is_file()


def test_what_does_not_fit_is_refused(tmp_path):
    config, perceptual, adversary = configs(tmp_path / "nets")

    def build(**changed) -> None:
        parts = {"config": config, "perceptual": perceptual, "adversary": adversary} | changed
        build_rae(*parts.values(), dtype=torch.float32)

    with pytest.raises(ValueError, match=r"model.input_size: must be a multiple .* \(14\), got 30"):
        build(config=config.model_copy(update={"input_size": 30}))
    with pytest.raises(ValueError, match=r"adversary.depths: must be below the 2 blocks"):
        build(adversary=adversary.model_copy(update={"depths": [2]}))
    with pytest.raises(
        ValueError, match=r"adversary.image_size: must be a multiple .* \(4\), got 14"
    ):
        build(adversary=adversary.model_copy(update={"image_size": 14}))
    decoder = config.decoder.model_copy(update={"patch_size": 5})
    with pytest.raises(ValueError, match=r"perceptual.path: .* must divide .* side \(10\), got 4"):
        build(config=config.model_copy(update={"decoder": decoder}))
    with pytest.raises(ValueError, match=r"adversary.path: must hold a vit, .* got vit_mae"):
        mae = write_encoder(tmp_path / "mae", "mae")
        build(adversary=adversary.model_copy(update={"path": mae}))
    other = config.encoder.model_copy(update={"path": tmp_path / "nets/like"})
    with pytest.raises(ValueError, match=r"model.encoder.path: must hold .* got vit in"):
        build(config=config.model_copy(update={"encoder": other}))
    weights = load_file(tmp_path / "nets/like/model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "nets/like/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"perceptual.path: must hold all weights"):
        build()
    with pytest.raises(ValueError, match=r"model.encoder.path: must be a folder with the encoder"):
        RAEModelConfig().check_path()
