"""Sparse upcycling: a dense model's MLPs become experts, copies of them (arXiv 2212.05055).

Every expert begins as its layer's MLP, so that whatever the router chooses, weights that sum up to
1 give back what the MLP gave: logits are the dense model's. With noise they are so nearly, and the
experts differ from the start. Routers are drawn at random.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3MoeConfig

Layers = Literal["all", "every-second", "first-half"]

_MLP = (".mlp.gate_proj.weight", ".mlp.up_proj.weight", ".mlp.down_proj.weight")
# Of a dense configuration alone, or said anew.
_DENSE_ONLY = ("model_type", "architectures", "layer_types", "max_window_layers", "sliding_window")


@dataclass(frozen=True)
class Recipe:
    """What becomes of the MLPs.

    noise is the standard deviation of what is added to each copy, as a share of the matrix's root
    mean square; router_std that of the routers' weights.
    """

    num_experts: int
    top_k: int
    layers: Layers = "all"
    noise: float = 0.0
    router_std: float = 0.02
    seed: int = 0

    def sparse_layers(self, num_layers: int) -> list[int]:
        """The layers that get experts; every second one begins with the second."""
        every = range(num_layers)
        chosen = {
            "all": every,
            "every-second": every[1::2],
            "first-half": every[: num_layers // 2],
        }
        return list(chosen[self.layers])


class Made(NamedTuple):
    """A tensor of the mixture: a stored one (of the dense model), or a router for `like`'s width.

    change is None for a plain copy.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    change: Callable[[Tensor], Tensor] | None


def moe_config(dense: Qwen3Config, recipe: Recipe) -> dict[str, Any]:
    """config.json of the mixture.

    Raises ValueError for numbers of experts that cannot be, and layers that there are none of.
    """
    if not 1 <= recipe.top_k <= recipe.num_experts:
        raise ValueError(
            f"--top-k: must lie in 1..{recipe.num_experts}, the number of experts, got "
            f"{recipe.top_k}"
        )
    num_layers = dense.num_hidden_layers
    sparse = recipe.sparse_layers(num_layers)
    if not sparse:
        raise ValueError(
            f"--layers: must leave a layer with experts, got {recipe.layers} of {num_layers} layers"
        )
    known = {key: value for key, value in dense.to_dict().items() if key not in _DENSE_ONLY}
    config = Qwen3MoeConfig(
        **known,
        architectures=["Qwen3MoeForCausalLM"],
        num_experts=recipe.num_experts,
        num_experts_per_tok=recipe.top_k,
        moe_intermediate_size=dense.intermediate_size,
        mlp_only_layers=[layer for layer in range(num_layers) if layer not in sparse],
        decoder_sparse_step=1,
        norm_topk_prob=True,  # or copies would not add up to the MLP
    )
    tree = dict(config.to_diff_dict())
    # Under the name that published folders have, and everything reads; it changes by release.
    return tree | {"num_experts": tree.pop("num_local_experts", recipe.num_experts)}


def tensors(
    shapes: dict[str, Sequence[int]], num_layers: int, recipe: Recipe, where: Path
) -> Iterator[Made]:
    """All tensors of the mixture, in the order of the dense model's `shapes`, experts in place.

    Raises ValueError where an MLP that becomes experts is not there.
    """
    sources = {
        f"model.layers.{layer}{end}": (layer, end)
        for layer in recipe.sparse_layers(num_layers)
        for end in _MLP
    }
    if missing := sources.keys() - shapes.keys():
        raise ValueError(
            f"{where}: must hold an MLP in every layer that gets experts, got no "
            f"{', '.join(sorted(missing))}; take a dense Qwen3"
        )
    for name, shape in shapes.items():
        if name not in sources:
            yield Made(name, tuple(shape), name, None)
            continue
        layer, end = sources[name]
        prefix, part = f"model.layers.{layer}.mlp", end.removeprefix(".mlp.")
        if end == _MLP[0]:
            router = f"{prefix}.gate.weight"
            yield Made(router, (recipe.num_experts, shape[1]), name, _router(router, recipe))
        for expert in range(recipe.num_experts):
            copy = f"{prefix}.experts.{expert}.{part}"
            yield Made(copy, tuple(shape), name, _noisy(copy, recipe) if recipe.noise else None)


def _router(name: str, recipe: Recipe) -> Callable[[Tensor], Tensor]:
    def draw(gate: Tensor) -> Tensor:
        shape = (recipe.num_experts, gate.shape[1])
        return torch.normal(0.0, recipe.router_std, shape, generator=_seed(name, recipe))

    return draw


def _noisy(name: str, recipe: Recipe) -> Callable[[Tensor], Tensor]:
    def add(matrix: Tensor) -> Tensor:
        wide = matrix.float()
        scale = recipe.noise * float(wide.square().mean().sqrt())
        return wide + torch.normal(0.0, scale, matrix.shape, generator=_seed(name, recipe))

    return add


def _seed(name: str, recipe: Recipe) -> torch.Generator:
    """A tensor's own, so that its values do not depend on what was made before it."""
    return torch.Generator().manual_seed(zlib.crc32(f"{recipe.seed} {name}".encode()))
