"""A step of RAE in straight autograd, fp64: one process, one batch, image by image where it counts.

From the paper's formulas, diffusers' decoder, transformers' ViTs and torch's own spectral
normalization; of the model under test only the weights are taken.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import AutoModel

from triptych_models.autoencoder.encoder import make_decoder

IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double().view(2, 1, 3, 1, 1)


class Straight(NamedTuple):
    """Means over the images that are there, the adaptive weight, and gradients by our names.

    The margin is the least distance to a jump of gradients: a leaky ReLU's 0, a pixel's half level.
    """

    figures: dict[str, float]
    gradients: dict[str, Tensor]
    margin: float


def straight_step(model: Any, configs: Any, batch: dict[str, Any]) -> Straight:
    """A first step of the model's weights."""
    config, perceptual, adversary = configs
    decoder = make_decoder(config, 64, 4).double()
    decoder.load_state_dict(model.decoder.state_dict())
    images = batch["pixels"].double() / 255
    there = batch["weights"] > 0
    latents, mean, std = encode(config.encoder.path, images, config.input_size)
    noise = batch["noise"].double()
    latents = latents + config.noise * batch["levels"].double().view(-1, 1, 1) * noise
    made = decoder.unpatchify(decoder(latents).logits) * std + mean

    like = AutoModel.from_pretrained(perceptual.path).double().eval()
    critic = AutoModel.from_pretrained(adversary.path).double().eval()
    heads = _heads(model, critic.config.hidden_size, adversary.kernel_size)
    margins: list[float] = []
    for module in (m for head in heads for m in head.modules() if isinstance(m, nn.LeakyReLU)):
        module.register_forward_pre_hook(lambda _, x: margins.append(x[0].abs().min().item()))

    l1 = (made - images).abs().mean((1, 2, 3))[there].mean()
    distance = _distance(like, made, images, perceptual.depths)[there].mean()
    rec = l1 + perceptual.weight * distance

    def score(shown: Tensor, use: int) -> Tensor:
        numbers = batch["draws"][:, use].double()
        shown = torch.stack([_augment(x, n) for x, n in zip(shown, numbers, strict=True)])
        side = adversary.image_size
        if side != shown.shape[-1]:
            mode = "area" if side < shown.shape[-1] else "bicubic"
            shown = F.interpolate(shown, size=(side, side), mode=mode)
        tokens = _tokens(critic, shown, [*adversary.depths])
        layers = [tokens[-1], *tokens[:-1]]
        return torch.cat(
            [head(t.transpose(1, 2)).flatten(1) for head, t in zip(heads, layers, strict=True)], 1
        )

    gan = F.softplus(-score(made, 0)).mean(1)[there].mean()
    last = decoder.decoder_pred.weight
    (of_rec,) = torch.autograd.grad(rec, last, retain_graph=True)
    (of_gan,) = torch.autograd.grad(gan, last, retain_graph=True)
    weight = (of_rec.norm() / (of_gan.norm() + 1e-6)).clamp(0, 1e4)
    total = rec + adversary.weight * weight * gan
    names, parameters = zip(*decoder.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters)
    gradients = {f"decoder.{n}": g for n, g in zip(names, found, strict=True)}

    levels = made.detach().clamp(0, 1) * 255
    margins.append((levels % 1 - 0.5).abs().min().item())
    fake = score(levels.round() / 255, 1)
    real = score(images, 2)
    hinge = 0.5 * (F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1))[there].mean()
    hinge.backward()
    for number, head in enumerate(heads):
        gradients |= {
            f"discriminator.heads.{number}.{n}": g for n, g in _by_our_names(head).items()
        }
    figures = {
        "loss": rec,
        "l1": l1,
        "perceptual": distance,
        "deceit": gan,
        "adaptive_weight": weight,
        "discriminator": hinge,
        "score_made": fake.mean(1)[there].mean(),
        "score_real": real.mean(1)[there].mean(),
    }
    return Straight({k: v.item() for k, v in figures.items()}, gradients, min(margins))


def encode(folder: Path, images: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents by stock transformers, mean and spread of pixels; the last norm of weight 1."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    name, norm, skipped = {
        "dinov2_with_registers": ("Dinov2WithRegistersModel", "layernorm", 5),
        "siglip_vision_model": ("SiglipVisionModel", "post_layernorm", 0),
        "vit_mae": ("ViTMAEModel", "layernorm", 1),
    }[kind]
    mean, std = (0.5 + 0 * IMAGENET) if kind.startswith("siglip") else IMAGENET
    net = getattr(transformers, name).from_pretrained(folder).double().eval()
    (last,) = (m for n, m in net.named_modules() if n.endswith(norm))
    with torch.no_grad():
        last.weight.fill_(1.0)
        last.bias.fill_(0.0)
        x = F.interpolate(images, size=(side, side), mode="bicubic")
        more: dict[str, Any] = {}
        if kind != "dinov2_with_registers":
            more = {"interpolate_pos_encoding": True}
        if kind == "vit_mae":
            net.embeddings.config.mask_ratio = 0.0
            patches = (side // net.config.patch_size) ** 2
            more["noise"] = torch.arange(patches).expand(len(x), -1)
        found = net((x - mean) / std, **more).last_hidden_state
    return found[:, skipped:], mean, std


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inner(x)) / 2**0.5


def _heads(model: Any, channels: int, kernel: int) -> list[nn.Sequential]:
    """Heads of torch's modules, after the power iteration that begins a step."""
    found = []
    for ours in model.discriminator.heads:

        def conv(mine: Any, width: int, size: int) -> nn.Module:
            made = nn.Conv1d(
                channels,
                width,
                size,
                padding=size // 2,
                padding_mode="circular",
                dtype=torch.float64,
            )
            made = spectral_norm(made, eps=1e-12)
            with torch.no_grad():
                made.parametrizations.weight.original.copy_(mine.weight)
                made.bias.zero_() if mine.bias is None else made.bias.copy_(mine.bias)
                made.parametrizations.weight[0]._u.copy_(mine.left)
                made.parametrizations.weight[0]._v.copy_(mine.right)
                made.weight  # noqa: B018  in training: one step of power iteration
            return made.eval()

        def block(mine: Any, size: int) -> nn.Sequential:
            norm = nn.InstanceNorm1d(channels, eps=1e-6, affine=True, dtype=torch.float64)
            with torch.no_grad():
                norm.weight.copy_(mine.norm.weight)
                norm.bias.copy_(mine.norm.bias)
            return nn.Sequential(conv(mine.conv, channels, size), norm, nn.LeakyReLU(0.2))

        found.append(
            nn.Sequential(
                block(ours.first, 1), _Residual(block(ours.second, kernel)), conv(ours.score, 1, 1)
            )
        )
    return found


def _by_our_names(head: nn.Sequential) -> dict[str, Tensor]:
    first, residual, score = head
    assert isinstance(residual, _Residual)
    places = {"first.conv": first[0], "first.norm": first[1], "score": score}
    places |= {"second.conv": residual.inner[0], "second.norm": residual.inner[1]}
    found = {}
    for name, module in places.items():
        for key, parameter in module.named_parameters():
            end = "weight" if key.endswith("original") else key
            if not (name.endswith("conv") and end == "bias"):  # which a norm undoes
                found[f"{name}.{end}"] = parameter.grad
    return found


def _tokens(vit: Any, images: Tensor, depths: list[int]) -> list[Tensor]:
    """Patch tokens after blocks, and after the last."""
    x = (images - IMAGENET[0]) / IMAGENET[1]
    states = vit(x, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    return [states[depth + 1][:, 1:] for depth in [*depths, len(states) - 2]]


def _distance(vit: Any, made: Tensor, images: Tensor, depths: list[int]) -> Tensor:
    total = torch.zeros(len(made), dtype=torch.float64)
    for a, b in zip(
        _tokens(vit, made, depths)[:-1], _tokens(vit, images, depths)[:-1], strict=True
    ):
        difference = F.normalize(a, dim=-1) - F.normalize(b, dim=-1)
        total = total + (difference**2).sum(-1).mean(-1)
    return total


def _augment(image: Tensor, n: Tensor) -> Tensor:
    """DiffAugment's color, translation and cutout of one image (3, S, S), by seven numbers."""
    x = 2 * image - 1
    side = x.shape[-1]
    x = x + (n[0] - 0.5)
    x = (x - x.mean(0)) * (2 * n[1]) + x.mean(0)
    x = (x - x.mean()) * (n[2] + 0.5) + x.mean()
    most = round(side / 8)
    down, right = (int(v * (2 * most + 1)) - most for v in (n[3], n[4]))
    wide = F.pad(x, (side, side, side, side))
    x = wide[:, side - down : 2 * side - down, side - right : 2 * side - right]
    hole = round(side / 2)
    top, left = (int(v * (side + 1 - hole % 2)) - hole // 2 for v in (n[5], n[6]))
    mask = torch.ones(side, side, dtype=x.dtype)
    mask[max(top, 0) : max(top + hole, 0), max(left, 0) : max(left + hole, 0)] = 0
    return (x * mask + 1) / 2
