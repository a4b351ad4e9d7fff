"""The frozen encoder, of transformers, and the decoder, of diffusers; together an AutoencoderRAE.

diffusers 0.42 builds its SigLIP as transformers 5.22 no longer has it, so encoders are built here.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ..foreign_config import read_foreign
from .config import RAEModelConfig
from .features import compile_frozen, keep_positions, load_frozen, pixel_statistics

NAME = "diffusion_pytorch_model.safetensors"
KIND = "AutoencoderRAE"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
LATENTS = ("_latents_mean", "_latents_std")  # in diffusers' layout


class EncoderKind(NamedTuple):
    """What there is to know of a kind of encoders."""

    model_types: tuple[str, ...]
    """in config.json"""
    model: str
    """transformers' class"""
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    """mean and spread of its pixels, where no preprocessor says them"""
    norm: str
    """the last one, which loses its weight and bias"""
    prefix: str
    """of its tensors in diffusers' layout"""
    image_size: int
    """of the positions, in diffusers' layout"""


ENCODERS = {
    "dinov2": EncoderKind(
        ("dinov2_with_registers",), "Dinov2WithRegistersModel", IMAGENET, "layernorm", "", 518
    ),
    "siglip2": EncoderKind(
        ("siglip", "siglip_vision_model"),
        "SiglipVisionModel",
        HALF,
        "post_layernorm",
        "vision_model.",
        256,
    ),
    "mae": EncoderKind(("vit_mae",), "ViTMAEModel", IMAGENET, "layernorm", "", 224),
}


class Encoder(nn.Module):
    """Images (N, 3, S, S) from 0 to 1 -> latents (N, L, C), normalized at the end, unscaled.

    Args:
        kind: of `ENCODERS`.
        net: of transformers; its last norm loses its weight and bias.
        side: to which images are resized.
        mean, std: of the pixels that it was trained on.
        latents: mean and spread of latents, (1,) or (C, h, w), by which diffusers scales what
            others learn from; a decoder is given them unscaled, and an export keeps them.
    """

    def __init__(
        self,
        kind: str,
        net: Any,
        side: int,
        mean: list[float],
        std: list[float],
        latents: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.net, self.side = kind, keep_positions(net), side
        self.latents = (torch.zeros(1), torch.ones(1)) if latents is None else latents
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        norm = _last_norm(net, kind)
        norm.weight = norm.bias = None
        net.requires_grad_(False).eval()
        self._registers = int(getattr(net.config, "num_register_tokens", 0))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] != self.side:
            size = (self.side, self.side)
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        x = (images - self.get_buffer("mean")) / self.get_buffer("std")
        x = x.to(next(self.net.parameters()).dtype)
        if self.kind == "dinov2":
            tokens: Tensor = self.net(x).last_hidden_state[:, 1 + self._registers :]
        elif self.kind == "siglip2":
            tokens = self.net(x, interpolate_pos_encoding=True).last_hidden_state
        else:
            # An order by which none is masked, or moved; in bf16 numbers over 256 would be alike.
            patches = (self.side // self.net.config.patch_size) ** 2
            order = torch.arange(patches, device=x.device).expand(len(x), -1)
            tokens = self.net(x, order, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        return tokens

    def compile_layers(self) -> None:
        """Compile every layer in place."""
        compile_frozen(self.net)

    def config(self) -> dict[str, Any]:
        """Its part of the configuration of diffusers' AutoencoderRAE."""
        shape = self.net.config
        mean, std = (None if x.numel() == 1 else x.tolist() for x in self.latents)
        return {
            "encoder_type": self.kind,
            "encoder_hidden_size": shape.hidden_size,
            "encoder_patch_size": shape.patch_size,
            "encoder_num_hidden_layers": shape.num_hidden_layers,
            "encoder_input_size": self.side,
            "encoder_norm_mean": self.get_buffer("mean").float().flatten().tolist(),
            "encoder_norm_std": self.get_buffer("std").float().flatten().tolist(),
            "latents_mean": mean,
            "latents_std": std,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by diffusers' names."""
        prefix = ENCODERS[self.kind].prefix
        found = {
            f"encoder.{prefix}{name.removeprefix(prefix)}": value
            for name, value in self.net.state_dict().items()
        }
        found |= dict(zip(LATENTS, self.latents, strict=True))
        return found | {f"encoder_{name}": self.get_buffer(name) for name in ("mean", "std")}


def load_encoder(config: RAEModelConfig, dtype: torch.dtype) -> Encoder:
    """The encoder in a folder, of transformers' layout or diffusers'. Raises ValueError for others.

    What it is and lacks is said, and a side that is no multiple of its patches.
    """
    folder = config.encoder.path
    assert folder is not None
    held = read_foreign(folder / "config.json")
    kinds = {each: kind for kind, known in ENCODERS.items() for each in known.model_types}
    latents = None
    if held.get("_class_name") == KIND:
        kind, net, statistics, latents = _from_diffusers(folder, held)
    elif held.get("model_type") in kinds:
        kind = kinds[held["model_type"]]
        cls = getattr(transformers, ENCODERS[kind].model)
        net = load_frozen(config.encoder, "model.encoder", config.seed, cls)
        statistics = pixel_statistics(folder, *ENCODERS[kind].statistics)
    else:
        raise ValueError(
            f"model.encoder.path: must hold a {', '.join(kinds)} or an {KIND}, got "
            f"{held.get('model_type')} in {folder}; name the folder of another encoder"
        )
    patch, side = int(net.config.patch_size), config.input_size
    if side % patch:
        raise ValueError(
            f"model.input_size: must be a multiple of the encoder's patches ({patch}), got {side}; "
            f"take {side - side % patch or patch}"
        )
    for each in latents or ():
        if each.shape[1:] not in ((), (side // patch, side // patch)):
            raise ValueError(
                f"model.input_size: must be {each.shape[-1] * patch}, as {folder} has means of "
                f"latents {list(each.shape)}, got {side}; correct it, or name an encoder alone"
            )
    if kind == "mae":
        net.config.mask_ratio = 0.0
    return Encoder(kind, net.to(dtype), side, *statistics, latents)


def make_decoder(config: RAEModelConfig, channels: int, latents: int) -> Any:
    """diffusers' decoder of latents (L, C), its weights not filled in."""
    try:
        from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder
    except ImportError as error:
        raise ValueError(
            f"model: rae must have the package diffusers, got none ({error}); run: pip install "
            "'triptych-models[diffusers]'"
        ) from error
    shape = config.decoder
    return RAEDecoder(
        hidden_size=channels,
        decoder_hidden_size=shape.hidden_size,
        decoder_num_hidden_layers=shape.num_layers,
        decoder_num_attention_heads=shape.num_heads,
        decoder_intermediate_size=shape.intermediate_size,
        num_patches=latents,
        patch_size=shape.patch_size,
        image_size=shape.patch_size * int(latents**0.5),
    )


def _last_norm(net: nn.Module, kind: str) -> Any:
    """It lies deeper in some releases of transformers."""
    wanted = ENCODERS[kind].norm
    (found,) = (m for n, m in net.named_modules() if n.rpartition(".")[2] == wanted)
    return found


def _from_diffusers(
    folder: Path, held: dict[str, Any]
) -> tuple[str, Any, tuple[list[float], list[float]], tuple[Tensor, Tensor] | None]:
    """The encoder of an AutoencoderRAE, as its config.json describes it; means and spreads of
    pixels, and of latents where there are any."""
    kind = held.get("encoder_type", "dinov2")
    if kind not in ENCODERS:
        raise ValueError(
            f"{folder}/config.json: encoder_type must be {', '.join(ENCODERS)}, got {kind}; name "
            "another folder"
        )
    known, file = ENCODERS[kind], folder / NAME
    width, cls = held.get("encoder_hidden_size", 768), getattr(transformers, known.model)
    shape = cls.config_class(
        hidden_size=width,
        patch_size=held.get("encoder_patch_size", 14),
        num_hidden_layers=held.get("encoder_num_hidden_layers", 12),
        num_attention_heads=max(1, width // 64),
        image_size=known.image_size,
    )
    net = cls(shape)
    norm = _last_norm(net, kind)
    norm.weight = norm.bias = None
    if not file.is_file():
        raise ValueError(f"model.encoder.path: must hold {NAME}, got {folder}; download it again")
    wanted = net.state_dict()
    with safe_open(file, "pt") as reader:
        names = {
            f"{known.prefix}{name.removeprefix(known.prefix)}": name for name in wanted
        }  # ours by diffusers'
        stored = {n.removeprefix("encoder.") for n in reader.keys() if n.startswith("encoder.")}  # noqa: SIM118
        if stored != set(names):
            raise ValueError(
                f"{file}: the encoder's tensors must be those of its config.json, got missing "
                f"{sorted(set(names) - stored)[:4]} and unexpected "
                f"{sorted(stored - set(names))[:4]}; download it again"
            )
        found = {ours: reader.get_tensor(f"encoder.{name}") for name, ours in names.items()}
        latents = None
        if set(LATENTS) <= set(reader.keys()):
            latents = reader.get_tensor(LATENTS[0]), reader.get_tensor(LATENTS[1])
    odd = [name for name, value in found.items() if value.shape != wanted[name].shape]
    if odd:
        raise ValueError(
            f"{file}: {odd[0]} must be {list(wanted[odd[0]].shape)}, got "
            f"{list(found[odd[0]].shape)}; download it again"
        )
    net.load_state_dict(found)
    mean, std = known.statistics
    statistics = (
        list(held.get("encoder_norm_mean") or mean),
        list(held.get("encoder_norm_std") or std),
    )
    return kind, net, statistics, latents
