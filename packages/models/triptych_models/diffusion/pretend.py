"""A diffusion model and a batch without memory behind them, to plan a run; see `..fake`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..freeze import freeze
from .build import build_shell
from .config import DiffusionModelConfig, ObjectiveConfig
from .model import DiffusionModel
from .sit import KERNELS, Ops

TEXT = "text_features"


def build_pretend_diffusion(
    config: DiffusionModelConfig, objective: ObjectiveConfig, *, dtype: torch.dtype
) -> DiffusionModel:
    """The model of `build_diffusion` on the meta device: weights are not read.

    With compile=layers a SiT keeps what the compiler keeps of it.
    """
    shape = config.model_copy(update={"compile": "none"})
    with torch.device("meta"):
        model = build_shell(shape, objective, dtype=dtype)
    freeze(model, config.freeze)
    if config.compile == "layers":
        for module in model.modules():
            if isinstance(getattr(module, "ops", None), Ops):
                module.ops = COMPILED  # type: ignore[assignment]
    return model.train()


def pretend_samples(
    shapes: Mapping[str, tuple[int, ...]],
    count: int,
    *,
    has_labels: bool,
    given_frames: int = 0,
) -> dict[str, Any]:
    """A batch as the loader makes them, of samples whose tensors have these shapes; call it inside
    `fake.pretend`, or for a real model.
    """
    latents = torch.zeros(count, *shapes["latents"])
    learnt = latents[:, :, given_frames:] if given_frames else latents
    batch: dict[str, Any] = {name: torch.zeros(count, *shape) for name, shape in shapes.items()}
    batch |= {name: torch.zeros(count) for name in ("times", "drops", "weights")}
    batch |= {"noise": torch.zeros_like(latents), "num_targets": learnt.numel()}
    if has_labels:
        batch["labels"] = torch.zeros(count, dtype=torch.int64)
    if TEXT in shapes:
        batch["empty_text"] = torch.zeros(1, *shapes[TEXT])
    return batch | ({"given_frames": given_frames} if given_frames else {})


class _NormModulate(torch.autograd.Function):
    """Of LayerNorm, scaled and shifted, what is kept and moved in a compiled block: its input.

    Products keep what they are given, and the compiler computes norms again. Of fake tensors alone:
    values are not those of a norm.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return torch.addcmul(shift[:, None], x, scale[:, None])  # one launch each way

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, scale = ctx.saved_tensors
        (grad,) = grads
        return torch.add(grad, x), torch.empty_like(scale), torch.empty_like(scale)


def _as_it_is(x: Tensor, eps: float) -> Tensor:
    """What follows it takes the norm."""
    return x


COMPILED = Ops(_as_it_is, _NormModulate.apply, KERNELS.gate_add)
