"""LoRA and DoRA through peft: small matrices train beside linear layers that stay as they are.

Peft's layers take the place of the chosen linears in `model.hf`, so that a linear's own weight is
then `….base_layer.weight`. They are added to a model whose weights are filled already; its base is
frozen. LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353. With `quantize` the linears themselves are
kept in four bits (QLoRA, triptych_models.nf4).
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .audio_model import AudioModel
from .config import LoraConfig
from .head import LossHead
from .image_model import ImageModel
from .nf4 import NF4Linear, quantized, stored_weight
from .packed import PackedModel
from .weights import Gather, whole

NAME = "default"  # of the adapter, as peft calls the first
# Linears of a mixture beside its experts. Peft 0.21.2 takes their names for those of experts, where
# it loads an adapter (transformers_weight_conversion.py), so none stands beside them.
MLP = ("gate_proj", "up_proj", "down_proj")


def add_adapters(model: PackedModel, config: LoraConfig, seed: int, gather: Gather = whole) -> None:
    """Freeze the model and put adapters beside its `targets`; every rank calls it.

    Call it outside `deepspeed.zero.Init`, which takes over what is drawn here later. The down
    matrices are drawn from seed as peft does (kaiming uniform), the up matrices are 0: the outputs
    are the base's. Raises ValueError for targets that there are not, and without peft.
    """
    try:
        import peft
        from peft.tuners.lora import dora
    except ImportError:
        raise ValueError(
            "model.lora: must have peft beside it, got none; pip install 'triptych-models[lora]'"
        ) from None
    targets = find_targets(model, config)
    settings = peft.LoraConfig(**_settings(config), target_modules=targets, init_lora_weights=False)
    if config.quantize:
        settings._register_custom_module({NF4Linear: peft.tuners.lora.Linear})
        quantize(model, targets, gather)
    # Peft 0.21.2 gathers a weight for its norm only where transformers' Trainer set ZeRO-3 up.
    with (
        patch.object(dora, "gather_params_ctx", lambda parameters: gather(list(parameters))),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Unsupported layer type .*NF4Linear")
        peft.inject_adapter_in_model(settings, model.hf)
    model.lora = config
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapted_layers(model.hf):
        _begin(layer, generator, gather)


def quantize(model: PackedModel, names: list[str], gather: Gather) -> None:
    """Put the named linears of `model.hf` into four bits, one after the other."""
    for name in names:
        linear = model.hf.get_submodule(name)
        with gather([linear.weight]):
            model.hf.set_submodule(name, quantized(linear))


def find_targets(model: PackedModel, config: LoraConfig) -> list[str]:
    """Names in `model.hf` of the linears that `targets` mean: a part's, or by their last words. Of
    a mixture's language model they are those of attention.

    Raises ValueError if one means none, and for DoRA outside of layers: it reads a linear's weight
    beside its forward, and ZeRO-3 has weights whole only in the module that runs, or in a layer.
    """
    names = {id(module): name for name, module in model.hf.named_modules()}
    in_layers = {id(module) for layer in model.layers() for module in layer.modules()}
    linears: dict[str, str] = {}  # name -> part
    is_mixture = "experts" in model.parts()
    for part, modules in model.parts().items():
        for module in (inner for each in modules for inner in each.modules()):
            is_left = is_mixture and names[id(module)].endswith(MLP)
            if isinstance(module, nn.Linear) and not isinstance(module, LossHead) and not is_left:
                linears[names[id(module)]] = part
    found: set[str] = set()
    for target in config.targets:
        meant = {
            name
            for name, part in linears.items()
            if target == part or f".{name}".endswith(f".{target}")
        }
        if not meant:
            raise ValueError(
                "model.lora.targets: must name parts or linear layers of the model "
                f"({', '.join(sorted({*linears.values()}))}; "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in linears}))}), got "
                f"{target!r}; correct the name"
            )
        found |= meant
    outside = sorted(
        name
        for name, module in model.hf.named_modules()
        if name in found and id(module) not in in_layers
    )
    if config.dora and outside:
        raise ValueError(
            f"model.lora.dora: must be false for linears outside of layers, got {outside[0]}; "
            "leave the projector out of model.lora.targets"
        )
    return sorted(found)


def adapted_layers(hf: nn.Module) -> Iterator[tuple[str, Any]]:
    """Peft's layers, with the names that their linears have without them."""
    for name, module in hf.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            yield name, module


def adapter_parameters(layer: Any) -> dict[str, nn.Parameter]:
    """What trains of a peft layer, by the names that peft stores."""
    found = {f"lora_{x}.weight": getattr(layer, f"lora_{x}")[NAME].weight for x in "AB"}
    if NAME in layer.lora_magnitude_vector:
        found["lora_magnitude_vector"] = layer.lora_magnitude_vector[NAME].weight
    return found


def first_values(shapes: Mapping[str, torch.Size], generator: torch.Generator) -> dict[str, Tensor]:
    """The down matrix (rank, in), uniform within 1/sqrt(in), and the up matrix, 0; in fp32."""
    down = torch.empty(shapes["lora_A.weight"], device="cpu", dtype=torch.float32)
    bound = 1 / math.sqrt(down.shape[1])  # of kaiming_uniform_ with a = sqrt(5)
    return {
        "lora_A.weight": down.uniform_(-bound, bound, generator=generator),
        "lora_B.weight": torch.zeros(shapes["lora_B.weight"], device="cpu", dtype=torch.float32),
    }


@torch.no_grad()
def _begin(layer: Any, generator: torch.Generator, gather: Gather) -> None:
    parameters = adapter_parameters(layer)
    weight = stored_weight(layer.base_layer)
    values = first_values({name: p.shape for name, p in parameters.items()}, generator)
    for name, value in values.items():
        parameters[name].copy_(value)
        parameters[name].data = parameters[name].data.to(weight.dtype)
    if (magnitude := parameters.get("lora_magnitude_vector")) is not None:
        with gather([weight]):
            magnitude.copy_(_adapted(layer).norm(dim=1))


def _adapted(layer: Any) -> Tensor:
    """The linear's weight and what the two matrices add to it, fp32 (out, in)."""
    down, up = (getattr(layer, f"lora_{x}")[NAME].weight.detach().float() for x in "AB")
    weight = layer.base_layer.weight.detach().float()
    return weight + layer.scaling[NAME] * (up @ down).to(weight.device)


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """What linear does the same as a peft layer whose parameters are whole: its weight, fp32."""
    weight = _adapted(layer)
    magnitude = adapter_parameters(layer).get("lora_magnitude_vector")
    if magnitude is not None:
        weight = weight * (magnitude.detach().float() / weight.norm(dim=1))[:, None]
    return weight


def adapter_flops(model: PackedModel, batch: Mapping[str, Any]) -> float:
    """Forward + backward FLOPs of the adapters' own matrices on one packed row.

    Three products each; DoRA's norms of weights are not counted, as no norms are.
    """
    if model.lora is None:
        return 0.0
    grid = batch.get("image_grid_thw")
    patches = 0 if grid is None else sum(int(t) * int(h) * int(w) for t, h, w in grid)
    drawn = sum(int(h) * int(w) for h, w in batch.get("latent_grids", ()))
    text = int(batch["cu_seqlens"][-1]) - drawn
    tokens = {"language": text, "generation": drawn, "vision": patches}
    if isinstance(model, ImageModel):
        tokens["projector"] = model.projector_tokens(patches)
    rows = {
        id(inner): tokens.get(part, 0)
        for part, modules in model.parts().items()
        for module in modules
        for inner in module.modules()
    }
    if isinstance(model, AudioModel):
        heard = model.heard_rows(batch.get("audio_lengths", torch.zeros(0, dtype=torch.int64)))
        rows |= {id(inner): count for module, count in heard for inner in module.modules()}
    return sum(
        6.0 * layer.r[NAME] * (layer.in_features + layer.out_features) * rows[id(layer)]
        for _, layer in adapted_layers(model.hf)
    )


def export_adapter(
    hf: nn.Module,
    config: LoraConfig,
    out_dir: Path,
    base: Path,
    *,
    gather: Gather = whole,
    is_main: bool = True,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which stock peft loads on `base`.

    Every rank must call it. In fp32 or the weights' dtype; complete or absent, in the place of what
    the run wrote there before.
    """
    tensors: dict[str, Tensor] = {}
    targets = []
    for name, layer in adapted_layers(hf):
        targets.append(name)
        own = adapter_parameters(layer)
        with gather(list(own.values())):
            if is_main:
                tensors |= {
                    f"base_model.model.{name}.{key}": p.detach().to("cpu", copy=True).contiguous()
                    for key, p in own.items()
                }
    if not is_main:
        return
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was cut off
    partial.mkdir(parents=True)
    save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base.resolve()),
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": targets,
        **_settings(config),
    }
    (partial / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    shutil.rmtree(out_dir, ignore_errors=True)
    partial.rename(out_dir)


def _settings(config: LoraConfig) -> dict[str, Any]:
    """Peft's names of what the configuration says."""
    return {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_dora": config.dora,
        "bias": "none",
    }
