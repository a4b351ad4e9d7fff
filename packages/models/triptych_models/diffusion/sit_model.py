"""SiT as a family: its parts, its labels, its first weights and its FLOPs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..freeze import Holder
from ..weights import Gather, constant, own_parameters, whole
from .config import DiffusionModelConfig, ObjectiveConfig, SiTConfig
from .model import Condition, DiffusionModel, default_dtype
from .sit import KERNELS, PLAIN, Ops, SiT, sit_flops
from .sit_weights import export_sit, load_sit


class SiTModel(DiffusionModel):
    """A SiT, conditioned by `labels` (N,) int64."""

    net: SiT

    def __init__(self, config: SiTConfig, objective: ObjectiveConfig, ops: Ops = KERNELS) -> None:
        super().__init__(SiT(config, ops), objective)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        config = self.net.config
        return (config.channels, config.image_size, config.image_size)

    @classmethod
    def from_config(
        cls, config: DiffusionModelConfig, objective: ObjectiveConfig, *, dtype: torch.dtype
    ) -> Self:
        """The model with its parameters not filled in."""
        ops = PLAIN if config.compile == "layers" else KERNELS
        with default_dtype(dtype):
            return cls(config.sit, objective, ops)

    def initialize(self, seed: int, gather: Gather = whole) -> None:
        initialize_sit(self.net, seed, gather)

    def load(self, path: Path, gather: Gather = whole) -> None:
        load_sit(self.net, path, gather)

    def export(
        self,
        out_dir: Path,
        *,
        dtype: torch.dtype = torch.float32,
        gather: Gather = whole,
        is_main: bool = True,
    ) -> None:
        export_sit(self.net, out_dir, self.objective, dtype=dtype, gather=gather, is_main=is_main)

    def sample_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"latents": self.latent_shape}

    def check_data(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if shapes["latents"] != self.latent_shape:
            raise ValueError(
                "model.sit: channels and image_size must be those of the latents "
                f"{shapes['latents']}, got {self.latent_shape}; change them, or read other shards"
            )

    def drawn_condition(self, batch: Mapping[str, Any], count: int) -> Condition:
        return {"labels": torch.arange(count) % self.net.config.num_classes}

    def predict(
        self, x: Tensor, times: Tensor, condition: Condition, given_frames: int = 0
    ) -> Tensor:
        assert not given_frames, "images have none"
        out: Tensor = self.net(x, times, condition["labels"], self.run_layer)
        return out

    def dropped(self, condition: Condition, drop: Tensor) -> Condition:
        labels = condition["labels"]
        return {"labels": labels.masked_fill(drop, self.net.config.num_classes)}

    def parts(self) -> dict[str, list[Holder]]:
        net = self.net
        return {
            "embedders": [net.x_embedder, net.t_embedder, net.y_embedder],
            "blocks": [net.blocks],
            "head": [net.final_layer],
        }

    def layers(self) -> list[nn.Module]:
        return list(self.net.blocks)

    def flops(self, batch: Mapping[str, Any]) -> float:
        """With all parts training: two backward products for one forward, one for the first."""
        products, first, attention = sit_flops(self.net.config)
        return len(batch["latents"]) * (3 * products - first + 3 * attention)

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"sit": self.net.config.model_dump(exclude={"size"})}


@torch.no_grad()
def initialize_sit(net: SiT, seed: int, gather: Gather = whole) -> None:
    """DiT's rule: Xavier for products, normal(0.02) for embedders, zeros for modulations and head.

    Drawn in fp32 on the host from one generator: the same on any device and number of ranks.
    """
    generator = torch.Generator().manual_seed(seed)
    for module, own in own_parameters(net):
        with gather(list(own.values())):
            for name, parameter in own.items():
                parameter.copy_(_first_value(module, name, parameter, generator))


def _first_value(
    module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator
) -> Tensor:
    starts_at_zero = "adaLN_modulation" in name or ".final_layer.linear" in f".{name}"
    if name.endswith("bias") or starts_at_zero:
        return constant(0.0, parameter)
    if isinstance(module, nn.Embedding) or "t_embedder" in name:
        return torch.normal(0.0, 0.02, parameter.shape, generator=generator, device="cpu")
    return xavier(parameter, generator)


def xavier(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Xavier's uniform distribution of a matrix, or of a convolution seen as one."""
    rows, columns = len(parameter), parameter[0].numel()
    # By way of a normal, since zero.Init redirects torch.rand to its own device and dtype.
    normal = torch.normal(0.0, 1.0, parameter.shape, generator=generator, device="cpu")
    return math.sqrt(6 / (rows + columns)) * torch.erf(normal / math.sqrt(2))
