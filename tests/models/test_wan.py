"""Wan: diffusers' own transformer as a family, told times, texts and first frames as it should."""

import json
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from triptych_kernels import use_backend
from triptych_models.diffusion.build import build_diffusion
from triptych_models.diffusion.config import DiffusionModelConfig, ObjectiveConfig, SamplerConfig
from triptych_models.diffusion.sampling import sample

diffusers = pytest.importorskip("diffusers")

from triptych_models.diffusion.wan_flops import wan_flops  # noqa: E402
from triptych_models.diffusion.wan_model import WanModel, make_net  # noqa: E402

TINY = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 6,
    "freq_dim": 8,
    "ffn_dim": 20,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
IMAGES = {"in_channels": 12, "image_dim": 10, "added_kv_proj_dim": 24}
VIDEO = {"in_channels": 8}  # a source beside the latents
CONTROL = {"in_channels": 12}  # and room for a first frame, as Wan2.1-Fun-Control
# The config.json of the published models.
PUBLISHED = {
    "2.1 T2V 1.3B": ({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1.42e9),
    "2.1 T2V 14B": ({"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}, 14.3e9),
    "2.2 TI2V 5B": (
        {
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "num_layers": 30,
            "in_channels": 48,
            "out_channels": 48,
        },
        5.0e9,
    ),
}


def folder(path: Path, **fields) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(TINY | fields))
    return path


def tiny(path: Path, *, objective: ObjectiveConfig | None = None, **fields) -> WanModel:
    """A model of which nothing is zero."""
    config = DiffusionModelConfig(family="wan", path=folder(path, **fields))
    model = build_diffusion(config, objective or ObjectiveConfig(shift=5.0), dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(model: WanModel, *, given_frames: int = 0) -> dict:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    length = 512 if model.shape.image_dim is not None else 5
    made = {
        "latents": draw(3, 4, 3, 4, 4),
        "noise": draw(3, 4, 3, 4, 4),
        "times": torch.tensor([0.9, 0.2, 0.6]),
        "drops": torch.tensor([0.5, 0.01, 0.7]),
        "weights": torch.tensor([1.0, 1.0, 0.0]),
        "text_features": draw(3, length, 6),
        "empty_text": draw(1, length, 6),
        "num_targets": 2 * 4 * (3 - given_frames) * 16,
    }
    if model.shape.image_dim is not None:
        made |= {"image_latents": draw(3, 4, 3, 4, 4), "image_features": draw(3, 7, 10)}
    elif model.shape.in_channels > 4:
        made |= {"source_latents": draw(3, 4, 3, 4, 4)}
    return made | ({"given_frames": given_frames} if given_frames else {})


def straight(model: WanModel, b: dict) -> Tensor:
    """The loss by stock calls, one video at a time: flow matching as DiffSynth and Wan write it."""
    net, total = model.net, torch.zeros(())
    given = b.get("given_frames", 0)
    for i, weight in enumerate(b["weights"]):
        level = 1 - b["times"][i]
        level = 5 * level / (1 + 4 * level)
        x0, noise = b["latents"][i : i + 1], b["noise"][i : i + 1]
        x = (1 - level) * x0 + level * noise
        timestep = (1000 * level).view(1)
        if given:
            x = torch.cat([x0[:, :, :given], x[:, :, given:]], 2)
            timestep = torch.cat([torch.zeros(4 * given), timestep.expand(4 * (3 - given))])[None]
        text = b["empty_text"] if b["drops"][i] < 0.1 else b["text_features"][i : i + 1]
        more = {}
        if "source_latents" in b:
            beside = [b[n][i : i + 1] for n in ("source_latents", "image_latents") if n in b]
            x = torch.cat([x, *beside], 1)
            x = torch.nn.functional.pad(x, (0,) * 7 + (model.shape.in_channels - x.shape[1],))
        elif "image_latents" in b:
            mask = torch.zeros(1, 4, 3, 4, 4)
            mask[:, :, 0] = 1
            x = torch.cat([x, mask, b["image_latents"][i : i + 1]], 1)
            more = {"encoder_hidden_states_image": b["image_features"][i : i + 1]}
        out = net(x, timestep, text, **more).sample
        error = (out - (noise - x0))[:, :, given:]
        total = total + weight * (error**2).sum()
    return total


@pytest.mark.parametrize(
    ("fields", "given", "framed"),
    [({}, 0, 0), ({}, 1, 0), (IMAGES, 0, 0), (VIDEO, 0, 0), (CONTROL, 0, 0), (CONTROL, 0, 1)],
    ids=["t2v", "ti2v", "i2v", "v2v", "control", "control-framed"],
)
def test_loss_and_gradients_are_those_of_stock_calls(tmp_path, fields, given, framed):
    model = tiny(tmp_path / "wan", **fields).train()
    b = batch(model, given_frames=given)
    if framed:
        b["image_latents"] = 2 * b["source_latents"].flip(0)
    model.check_data({k: tuple(v.shape[1:]) for k, v in b.items() if isinstance(v, Tensor)})
    output = model(**b)
    output.loss_sum.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = straight(model, b)
    expected.backward()
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            found[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale, msg=name
        )
        assert scale > 0, name


@pytest.mark.parametrize("way", ["full", "selective"])
def test_what_is_computed_again_changes_no_gradient(tmp_path, way):
    model = tiny(tmp_path / "wan").train()
    b, found = batch(model), []
    for checkpointing in ("none", way):
        model.set_checkpointing(checkpointing)
        model.zero_grad()
        model(**b).loss_sum.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_compiled_blocks_may_keep_less(tmp_path):
    """By the compiler's own doing: what it calls may not be seen one by one from outside."""
    model = tiny(tmp_path / "wan", num_layers=1).train()
    b, found = batch(model), []
    for is_compiled in (False, True):
        if is_compiled:
            model.compile_layers()
        model.set_checkpointing("selective")
        model.zero_grad()
        model(**b).loss_sum.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def test_attention_over_packed_rows_is_stocks(tmp_path):
    """The way of flash-attn 4, which has no kernel here."""
    model = tiny(tmp_path / "wan").train()
    b, found = batch(model), []
    for way in (nullcontext(), use_backend(attention="reference")):
        model.zero_grad()
        with way:
            model(**b).loss_sum.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("fields", [{}, IMAGES, VIDEO], ids=["t2v", "i2v", "v2v"])
def test_flops_are_those_a_profiler_counts(tmp_path, fields):
    model = tiny(tmp_path / "wan", **fields).train()
    b = batch(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**b).loss_sum.backward()
    assert model.flops(b) == counter.get_total_flops()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    fields, expected = PUBLISHED[name]
    with torch.device("meta"):
        net = diffusers.WanTransformer3DModel(**fields)
    assert abs(sum(p.numel() for p in net.parameters()) / expected - 1) < 0.01


def test_a_480p_video_costs_what_its_products_say():
    # 81 frames of 832×480: 21 × 30 × 52 tokens; self-attention is more than half of all.
    shape = diffusers.WanTransformer3DModel
    with torch.device("meta"):
        config = shape(**PUBLISHED["2.1 T2V 1.3B"][0]).config
    tokens = 21 * 30 * 52
    attention = 2 * 3 * 30 * 2 * tokens**2 * 1536
    assert 0.5 < attention / wan_flops(config, tokens, 512) < 0.8


def test_weights_go_out_and_in_by_the_layout_of_diffusers(tmp_path):
    model = tiny(tmp_path / "wan")
    model.export(tmp_path / "export")
    stock = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "export")
    assert stock.config.text_dim == 6
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter, model.net.get_parameter(name)), name
    stock.save_pretrained(tmp_path / "stock", max_shard_size="10KB")
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) > 1
    for path in (tmp_path / "export", tmp_path / "stock"):
        config = DiffusionModelConfig(family="wan", path=path, init="pretrained")
        again = build_diffusion(config, ObjectiveConfig(), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, again.get_parameter(name)), name
    folder(tmp_path / "stock", num_layers=3)
    with pytest.raises(ValueError, match=r"missing .*blocks\.2"):
        model = WanModel(make_net(tmp_path / "stock", torch.float32), ObjectiveConfig())
        model.load(tmp_path / "stock")


def test_what_does_not_fit_is_refused(tmp_path):
    model = tiny(tmp_path / "wan", **IMAGES)
    good = {"latents": (4, 3, 4, 4), "text_features": (512, 6)}
    good |= {"image_latents": (4, 3, 4, 4), "image_features": (7, 10)}
    model.check_data(good)
    for name, shape in (
        ("latents", (4, 3, 4, 5)),
        ("latents", (4, 4, 4)),
        ("latents", (5, 3, 4, 4)),
        ("text_features", (512, 7)),
        ("text_features", (100, 6)),
        ("image_features", (7, 9)),
    ):
        with pytest.raises(ValueError, match=", got "):
            model.check_data(good | {name: shape})
    with pytest.raises(ValueError, match="data: image_latents must be read"):
        model.check_data({k: v for k, v in good.items() if k != "image_latents"})
    source = {k: v for k, v in good.items() if k != "image_latents"} | {"source_latents": (4, 3, 4)}
    odd = tiny(tmp_path / "odd", in_channels=10)
    with pytest.raises(ValueError, match=r"must have 4 or twice so many channels more .* got 6"):
        odd.check_data(source)
    with pytest.raises(ValueError, match="data: source_latents must be read, of width 4, got"):
        tiny(tmp_path / "v2v", **VIDEO).check_data(source | {"source_latents": (4, 3, 4, 5)})
    with pytest.raises(ValueError, match=r"data.features: must leave out image_latents .* of 8 ch"):
        tiny(tmp_path / "v2v", **VIDEO).check_data(source | {"image_latents": (4, 3, 4, 4)})
    with pytest.raises(ValueError, match=r"objective.path: must be linear"):
        tiny(tmp_path / "wan", objective=ObjectiveConfig(path="gvp"))
    with pytest.raises(ValueError, match="must be of WanTransformer3DModel, got Flux"):
        tiny(tmp_path / "wan", _class_name="Flux")


def test_given_frames_stay_and_steps_are_shifted(tmp_path):
    model = tiny(tmp_path / "wan").eval()
    b = batch(model)
    condition = model.drawn_condition(b | {"num_tokens": 3}, 2)
    noise, given = torch.randn(2, 4, 3, 4, 4), b["latents"][:2, :, :1]
    config = SamplerConfig(method="euler", steps=3, shift=5.0, guidance=2.0)
    found = sample(model, noise, condition, config, given=given)
    assert torch.equal(found[:, :, :1], given)
    # By stock calls: sigmas of three steps, shifted; noise levels of 1000 sigma; guided.
    sigmas = [1.0, 5 * (2 / 3) / (1 + 4 * 2 / 3), 5 / 3 / (1 + 4 / 3), 0.0]
    x = torch.cat([given, noise[:, :, 1:]], 2)
    with torch.no_grad():
        for now, after in pairwise(sigmas):
            time = torch.tensor([0.0] * 4 + [1000 * now] * 8).expand(2, -1)
            cond = model.net(x, time, condition["text_features"]).sample
            free = model.net(x, time, b["empty_text"].expand(2, -1, -1)).sample
            moved = x + (after - now) * (free + 2.0 * (cond - free))
            x = torch.cat([given, moved[:, :, 1:]], 2)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [VIDEO, CONTROL], ids=["v2v", "control"])
def test_room_for_a_source_changes_nothing_at_first(tmp_path, fields):
    """Weights of T2V are read; the channels that are new begin at 0."""
    narrow = tiny(tmp_path / "t2v")
    narrow.export(tmp_path / "export")
    folder(tmp_path / "export", **fields)
    config = DiffusionModelConfig(family="wan", path=tmp_path / "export", init="pretrained")
    wide = build_diffusion(config, ObjectiveConfig(shift=5.0), dtype=torch.float32)
    b = batch(wide)
    found = wide.eval()(**b).loss_sum
    expected = narrow.eval()(**{k: v for k, v in b.items() if k != "source_latents"}).loss_sum
    torch.testing.assert_close(found, expected)
    wide.export(tmp_path / "again")
    stock = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "again")
    assert stock.config.in_channels == fields["in_channels"]
    folder(tmp_path / "export", in_channels=10)
    with pytest.raises(ValueError, match=r"patch_embedding.weight must be \[24, 10"):
        build_diffusion(config, ObjectiveConfig(), dtype=torch.float32)


@pytest.mark.parametrize("fields", [{}, VIDEO], ids=["t2v", "v2v"])
def test_samples_begin_with_a_source_as_in_the_pipeline_of_diffusers(tmp_path, fields):
    """Half of six steps, from noise and source mixed by the scheduler that Wan's pipelines take."""
    model = tiny(tmp_path / "wan", **fields).eval()
    b = batch(model) | {"num_tokens": 3}
    condition = model.drawn_condition(b, 2)
    noise, source = torch.randn(2, 4, 3, 4, 4), b["latents"][:2]
    config = SamplerConfig(method="euler", steps=6, shift=5.0, strength=0.5)
    found = sample(model, noise, condition, config, source=source)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 6, 6).tolist())
    timesteps = scheduler.timesteps[3:]
    scheduler.set_begin_index(3)
    x = scheduler.scale_noise(source, timesteps[:1], noise)
    with torch.no_grad():
        for time in timesteps:
            seen = torch.cat([x, *(condition[n] for n in ("source_latents",) if n in condition)], 1)
            out = model.net(seen, time.expand(2), condition["text_features"]).sample
            x = scheduler.step(out, time, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
