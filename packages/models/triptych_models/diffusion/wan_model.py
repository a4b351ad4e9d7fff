"""Wan's video transformer, of diffusers, as a family: conditioned by texts, images, videos.

Wan 2.1 and 2.2 (arXiv 2503.20314). The net is told 1000 times the noise level u = 1 - t and gives
noise - data: the velocity towards noise, so its negative is what our paths call velocity.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..checkpointing import Checkpointing
from ..foreign_config import read_foreign
from ..freeze import Holder, OwnParameters
from ..weights import Gather, constant, own_parameters, whole
from .config import DiffusionModelConfig, ObjectiveConfig
from .model import Condition, DiffusionModel, default_dtype
from .sit_model import xavier
from .wan_attention import set_self_attention
from .wan_flops import wan_flops
from .wan_weights import export_wan, load_wan

MASK = 4  # channels that say which frames of image_latents are there; a latent frame has 4 pictures
# Of a condition, whatever is dropped.
KEPT = ("image_latents", "image_features", "source_latents")
TEXT_ROWS = 512  # diffusers' blocks tell texts from images by it
IGNORED = {"_class_name", "_diffusers_version", "_name_or_path"}


class WanModel(DiffusionModel):
    """Wan, conditioned by `text_features` (N, L, D) and `empty_text` (1, L, D).

    Of a model for images also by `image_latents` (N, C, F, H, W), the first frame before zeros,
    and, where it has an image embedder, `image_features` (N, 257, D). Of a model from video to
    video by `source_latents` (N, C, F, H, W): its input has C channels more for them, or 2 C as
    Wan2.1-Fun-Control, then of image_latents, or zeros. A model without such channels learns as if
    there were no source, from which samples may begin (`sampler.strength`).
    """

    def __init__(self, net: nn.Module, objective: ObjectiveConfig) -> None:
        if objective.path != "linear" or objective.prediction != "velocity":
            raise ValueError(
                "objective.path: must be linear, and objective.prediction velocity, for Wan, got "
                f"{objective.path} and {objective.prediction}; leave them out"
            )
        super().__init__(net, objective)
        set_self_attention(net)
        self.shape: Any = net.config

    @classmethod
    def from_config(
        cls, config: DiffusionModelConfig, objective: ObjectiveConfig, *, dtype: torch.dtype
    ) -> Self:
        """The model with its parameters not filled in. Raises ValueError without diffusers."""
        assert config.path is not None
        return cls(make_net(config.path, dtype), objective)

    def predict(
        self, x: Tensor, times: Tensor, condition: Condition, given_frames: int = 0
    ) -> Tensor:
        dtype = next(self.net.parameters()).dtype
        images = condition.get("image_features")
        out: Tensor = self.net(
            self._seen(x, condition).to(dtype),
            self._noise_levels(x, times, given_frames),
            condition["text_features"].to(dtype),
            encoder_hidden_states_image=None if images is None else images.to(dtype),
            return_dict=False,
        )[0]
        return -out

    def _seen(self, x: Tensor, condition: Condition) -> Tensor:
        """x, with a source or what is known of its frames beside it, where channels are for it."""
        more = self.shape.in_channels - x.shape[1]
        if not more:
            return x
        if "source_latents" in condition:
            source = condition["source_latents"].to(x.dtype)
            if more == x.shape[1]:
                return torch.cat([x, source], dim=1)
            beside = condition.get("image_latents", torch.zeros_like(x))
            return torch.cat([x, source, beside.to(x.dtype)], dim=1)
        mask = torch.zeros_like(x[:, :1]).expand(-1, MASK, -1, -1, -1).clone()
        mask[:, :, 0] = 1
        return torch.cat([x, mask, condition["image_latents"].to(x.dtype)], dim=1)

    def _noise_levels(self, x: Tensor, times: Tensor, given_frames: int) -> Tensor:
        """(N,), or with given frames one for each token (N, T): those have no noise."""
        levels = 1000 * (1 - times)
        if not given_frames:
            return levels
        frames, rows, columns = self._grid(x)
        table = levels.view(-1, 1, 1).repeat(1, frames, rows * columns)
        table[:, : given_frames // self.shape.patch_size[0]] = 0
        return table.flatten(1)

    def _grid(self, x: Tensor) -> tuple[int, ...]:
        return tuple(n // p for n, p in zip(x.shape[2:], self.shape.patch_size, strict=True))

    def dropped(self, condition: Condition, drop: Tensor) -> Condition:
        text, empty = condition["text_features"], condition["empty_text"]
        chosen = torch.where(drop.view(-1, 1, 1), empty, text)
        return {k: condition[k] for k in KEPT if k in condition} | {"text_features": chosen}

    def drawn_condition(self, batch: Mapping[str, Any], count: int) -> Condition:
        """Of the batch's samples, in turn."""
        rows = torch.arange(count) % max(1, int(batch["num_tokens"]))
        found = {name: batch[name][rows] for name in ("text_features", *KEPT) if name in batch}
        return found | {"empty_text": batch["empty_text"]}

    def check_data(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        config, latents = self.shape, shapes["latents"]
        patch = tuple(config.patch_size)
        fits = len(latents) == 4 and latents[0] == config.out_channels
        if not fits or any(n % p for n, p in zip(latents[1:], patch, strict=True)):
            raise ValueError(
                f"data.shards: latents must be ({config.out_channels}, F, H, W), sides multiples "
                f"of {patch}, got {latents}; encode videos for this model"
            )
        wanted = {"text_features": config.text_dim}
        more = config.in_channels - config.out_channels
        if "source_latents" in shapes:
            if more not in (0, config.out_channels, 2 * config.out_channels):
                raise ValueError(
                    f"model.path: must have {config.out_channels} or twice so many channels more "
                    f"for source_latents, or none, got {more}; widen in_channels in its config.json"
                )
            wanted["source_latents"] = latents[-1]
        if "image_latents" in shapes and more in (0, config.out_channels):
            raise ValueError(
                f"data.features: must leave out image_latents for a model of {config.in_channels} "
                f"channels and latents of {config.out_channels}, which has no place for them, got "
                "them; take another model, or leave them out"
            )
        if "image_latents" in shapes or (more and "source_latents" not in shapes):
            wanted["image_latents"] = latents[-1]
        if config.image_dim is not None:
            wanted["image_features"] = config.image_dim
            if shapes.get("text_features", (0,))[0] != TEXT_ROWS:
                raise ValueError(
                    f"data.text_len: must be {TEXT_ROWS} for a Wan of images, got "
                    f"{shapes.get('text_features')}; its blocks take the last rows for text"
                )
        for name, width in wanted.items():
            if shapes.get(name, (0,))[-1] != width:
                raise ValueError(
                    f"data: {name} must be read, of width {width}, got {shapes.get(name)}; name it "
                    "in data.features, or set data.text_len for texts"
                )

    def parts(self) -> dict[str, list[Holder]]:
        net: Any = self.net
        # The root's own table shifts and scales before the head.
        return {
            "embedders": [net.patch_embedding, net.condition_embedder],
            "blocks": [net.blocks],
            "head": [net.proj_out, OwnParameters(net)],
        }

    def layers(self) -> list[nn.Module]:
        net: Any = self.net
        return list(net.blocks)

    def flops(self, batch: Mapping[str, Any]) -> float:
        """With all parts training."""
        text, images = batch["text_features"].shape[1], batch.get("image_features")
        frames, rows, columns = self._grid(batch["latents"])
        seen = 0 if images is None else images.shape[1]
        each = wan_flops(self.shape, frames * rows * columns, text, seen)
        return len(batch["latents"]) * each

    def set_checkpointing(self, checkpointing: Checkpointing) -> None:
        super().set_checkpointing(checkpointing)
        net: Any = self.net
        net.gradient_checkpointing = checkpointing != "none"
        net._gradient_checkpointing_func = self._run_block

    def _run_block(self, block: nn.Module, x: Tensor, *others: Any) -> Tensor:
        return self.run_layer(_Bound(block, others), x)

    def fingerprint(self) -> dict[str, Any]:
        config = {k: v for k, v in dict(self.shape).items() if k not in IGNORED}
        return super().fingerprint() | {"wan": config}

    @torch.no_grad()
    def initialize(self, seed: int, gather: Gather = whole) -> None:
        """Wan's rule: Xavier for products, normal(0.02) for embedders of text and time, head 0."""
        generator = torch.Generator().manual_seed(seed)
        for module, own in own_parameters(self.net):
            with gather(list(own.values())):
                for name, parameter in own.items():
                    parameter.copy_(_first_value(module, name, parameter, generator))

    def load(self, path: Path, gather: Gather = whole) -> None:
        load_wan(self.net, path, gather)

    def export(
        self,
        out_dir: Path,
        *,
        dtype: torch.dtype = torch.float32,
        gather: Gather = whole,
        is_main: bool = True,
    ) -> None:
        export_wan(self.net, out_dir, dtype=dtype, gather=gather, is_main=is_main)


class _Bound:
    """A block with all it is given beside the hidden states; `run_layer` looks at its weights."""

    def __init__(self, block: nn.Module, others: tuple[Any, ...]) -> None:
        self._block, self._others = block, others
        self.parameters: Callable[[], Any] = block.parameters
        self.modules: Callable[[], Any] = block.modules

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._block(x, *self._others)
        return out


def make_net(folder: Path, dtype: torch.dtype) -> nn.Module:
    """diffusers' module for a folder's config.json; its weights are not filled in."""
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise ValueError(
            f"model.family: wan must have the package diffusers, got none ({error}); run: pip "
            "install 'triptych-models[diffusers]'"
        ) from error
    config = read_foreign(folder / "config.json")
    if config.get("_class_name") != "WanTransformer3DModel":
        raise ValueError(
            f"{folder}/config.json: must be of WanTransformer3DModel, got "
            f"{config.get('_class_name')}; name the folder `transformer` of a Wan model"
        )
    with default_dtype(dtype):
        net: nn.Module = WanTransformer3DModel.from_config(config)
    return net


def _first_value(
    module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator
) -> Tensor:
    if name.endswith(".bias") or name.startswith("proj_out"):
        return constant(0.0, parameter)
    if "norm" in name:
        return constant(1.0, parameter)
    if "scale_shift_table" in name or "pos_embed" in name:
        std = parameter.shape[-1] ** -0.5
        return torch.normal(0.0, std, parameter.shape, generator=generator, device="cpu")
    if "text_embedder" in name or "time_embedder" in name:
        return torch.normal(0.0, 0.02, parameter.shape, generator=generator, device="cpu")
    return xavier(parameter, generator)
