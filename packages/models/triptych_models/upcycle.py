"""Sparse upcycling: a dense model's MLPs become experts, copies of them (arXiv 2212.05055).

Every expert begins as its layer's MLP, so that whatever the router chooses, weights that sum up to
1 give back what the MLP gave: logits are the dense model's. With noise they are so nearly, and the
experts differ from the start. Routers are drawn at random, or made of data (router_init.py).

Qwen3 becomes Qwen3-MoE, Qwen3-VL becomes Qwen3-VL-MoE, each with its dense layers under
`mlp_only_layers` and `decoder_sparse_step` 1. With a shared expert a Qwen3 becomes a Dots1: the
shared expert and each of the others get the MLP with its last matrix halved, so that their sum
gives it back, and the biases by which experts are chosen are 0.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import Dots1Config, Qwen3MoeConfig

from .expert_weights import has_squares
from .layout import text_config
from .read_config import read_config

Layers = Literal["all", "every-second", "first-half", "last-half"]

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
    shared_expert: bool = False

    def sparse_layers(self, num_layers: int) -> list[int]:
        """The layers that get experts; every second one begins with the second."""
        every = range(num_layers)
        chosen = {
            "all": every,
            "every-second": every[1::2],
            "first-half": every[: num_layers // 2],
            "last-half": every[num_layers // 2 :],
        }
        return list(chosen[self.layers])


class Dense(NamedTuple):
    """A model to make a mixture of."""

    path: Path
    model_type: str
    text: Any  # its configuration's section on language

    @property
    def layers(self) -> str:
        """How names of the layers' tensors begin."""
        return {"qwen3": "model.layers", "qwen3_vl": "model.language_model.layers"}[self.model_type]


class Made(NamedTuple):
    """A tensor of the mixture, of stored ones of the dense model, whose dtype it has.

    make gives it in pieces, of the whole stored ones; None is for a plain copy of one.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[..., Iterator[Tensor]] | None = None


def read_dense(path: Path) -> Dense:
    """The dense model of a directory; ValueError if it is none that a mixture can be made of."""
    file = path / "config.json"
    found = json.loads(file.read_text()).get("model_type") if file.is_file() else "no config.json"
    if found not in ("qwen3", "qwen3_vl"):
        raise ValueError(
            f"{file}: model_type must be qwen3 or qwen3_vl, got {found}; take a dense model"
        )
    return Dense(path, found, text_config(read_config(path, found)))


def moe_config(dense: Dense, recipe: Recipe) -> dict[str, Any]:
    """config.json of the mixture.

    Raises ValueError for numbers of experts that cannot be, and layers that there are none of.
    """
    if not 1 <= recipe.top_k <= recipe.num_experts:
        raise ValueError(
            f"--top-k: must lie in 1..{recipe.num_experts}, the number of experts, got "
            f"{recipe.top_k}"
        )
    num_layers = dense.text.num_hidden_layers
    sparse = recipe.sparse_layers(num_layers)
    if not sparse:
        raise ValueError(
            f"--layers: must leave a layer with experts, got {recipe.layers} of {num_layers} layers"
        )
    if recipe.shared_expert:
        return _dots1(dense, recipe, sparse)
    experts = {
        "num_experts": recipe.num_experts,
        "num_experts_per_tok": recipe.top_k,
        "moe_intermediate_size": dense.text.intermediate_size,
        "mlp_only_layers": [layer for layer in range(num_layers) if layer not in sparse],
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,  # or copies would not add up to the MLP; Qwen3-VL-MoE always does
    }
    return _with_experts[dense.model_type](dense, experts)


def _qwen3_moe(dense: Dense, experts: dict[str, Any]) -> dict[str, Any]:
    known = {key: value for key, value in dense.text.to_dict().items() if key not in _DENSE_ONLY}
    config = Qwen3MoeConfig(**known, **experts, architectures=["Qwen3MoeForCausalLM"])
    tree = dict(config.to_diff_dict())
    # Under the name that published folders have, and everything reads; it changes by release.
    return tree | {"num_experts": tree.pop("num_local_experts", experts["num_experts"])}


def _dots1(dense: Dense, recipe: Recipe, sparse: list[int]) -> dict[str, Any]:
    num_layers = dense.text.num_hidden_layers
    if dense.model_type != "qwen3":
        raise ValueError(
            f"--shared-expert: must be left out for a {dense.model_type}, got it for {dense.path}; "
            "only a qwen3 has a mixture with a shared expert"
        )
    if sparse != list(range(sparse[0], num_layers)):
        raise ValueError(
            f"--layers: must be all or last-half with --shared-expert, got {recipe.layers}; a "
            "dots1 has its dense layers first"
        )
    known = {key: value for key, value in dense.text.to_dict().items() if key not in _DENSE_ONLY}
    config = Dots1Config(
        **known,
        architectures=["Dots1ForCausalLM"],
        sliding_window=None,
        n_routed_experts=recipe.num_experts,
        n_shared_experts=1,
        num_experts_per_tok=recipe.top_k,
        moe_intermediate_size=dense.text.intermediate_size,
        first_k_dense_replace=sparse[0],
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    return dict(config.to_diff_dict())


def _qwen3_vl_moe(dense: Dense, experts: dict[str, Any]) -> dict[str, Any]:
    tree = json.loads((dense.path / "config.json").read_text())
    tree |= {
        "model_type": "qwen3_vl_moe",
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    }
    del experts["norm_topk_prob"]
    tree["text_config"] |= {"model_type": "qwen3_vl_moe_text", **experts}
    tree["vision_config"] |= {"model_type": "qwen3_vl_moe_vision"}
    return dict(tree)


_with_experts = {"qwen3": _qwen3_moe, "qwen3_vl": _qwen3_vl_moe}


def tensors(
    shapes: dict[str, Sequence[int]],
    dense: Dense,
    recipe: Recipe,
    routers: Mapping[int, Tensor] | None = None,
) -> Iterator[Made]:
    """All tensors of the mixture, in the order of the dense model's `shapes`, experts in place.

    routers: layer -> its router's weight (E, H); drawn where None. Raises ValueError where an MLP
    that becomes experts is not there.
    """
    mlps = {
        f"{dense.layers}.{layer}{end}": layer
        for layer in recipe.sparse_layers(dense.text.num_hidden_layers)
        for end in _MLP
    }
    if missing := mlps.keys() - shapes.keys():
        raise ValueError(
            f"{dense.path}: must hold an MLP in every layer that gets experts, got no "
            f"{', '.join(sorted(missing))}; take a dense model of two products and a gate"
        )
    experts = _stacked if dense.model_type == "qwen3_vl" else _one_by_one
    for name, shape in shapes.items():
        if name not in mlps:
            yield Made(name, tuple(shape), (name,))
        elif name.endswith(_MLP[0]):  # once a layer, in the place of its gate
            prefix = f"{dense.layers}.{mlps[name]}.mlp"
            router = f"{prefix}.gate.weight"
            rows = None if routers is None else routers[mlps[name]]
            draw = partial(_draw_router, router, recipe, rows)
            yield Made(router, (recipe.num_experts, shape[1]), (name,), draw)
            yield from experts(prefix, tuple(shape), recipe)
            if recipe.shared_expert:
                yield from _shared(prefix, tuple(shape), recipe)


def _one_by_one(prefix: str, shape: tuple[int, ...], recipe: Recipe) -> Iterator[Made]:
    """Tensors of experts whose gate has this shape (F, H), three an expert."""
    for end in _MLP:
        source = f"{prefix.removesuffix('.mlp')}{end}"
        each = shape[::-1] if end == _MLP[2] else shape
        is_halved = recipe.shared_expert and end == _MLP[2]
        for expert in range(recipe.num_experts):
            copy = f"{prefix}.experts.{expert}.{end.removeprefix('.mlp.')}"
            make = partial(_noisy, copy, recipe, 0.5 if is_halved else 1.0)
            yield Made(copy, each, (source,), make if recipe.noise or is_halved else None)


def _shared(prefix: str, shape: tuple[int, ...], recipe: Recipe) -> Iterator[Made]:
    """What a layer has beside experts whose gate has this shape (F, H): biases, a shared one."""
    source = f"{prefix.removesuffix('.mlp')}{_MLP[0]}"
    zeros = partial(_zeros, recipe.num_experts)
    yield Made(f"{prefix}.gate.e_score_correction_bias", (recipe.num_experts,), (source,), zeros)
    for end in _MLP:
        source = f"{prefix.removesuffix('.mlp')}{end}"
        each = shape[::-1] if end == _MLP[2] else shape
        name = f"{prefix}.shared_experts.{end.removeprefix('.mlp.')}"
        yield Made(name, each, (source,), _halve if end == _MLP[2] else None)


def _zeros(count: int, gate: Tensor) -> Iterator[Tensor]:
    yield torch.zeros(count)


def _halve(matrix: Tensor) -> Iterator[Tensor]:
    yield matrix * 0.5


def _stacked(prefix: str, shape: tuple[int, ...], recipe: Recipe) -> Iterator[Made]:
    """Two tensors with all experts, of transposed matrices (see expert_weights)."""
    width, hidden_size = shape
    stacks = {"gate_up_proj": _MLP[:2], "down_proj": _MLP[2:]}
    for stack, ends in stacks.items():
        rows, columns = (2 * width, hidden_size) if len(ends) == 2 else (hidden_size, width)
        keep = has_squares(hidden_size, width)
        whole = (rows, columns) if keep else (columns, rows)
        sources = tuple(f"{prefix.removesuffix('.mlp')}{end}" for end in ends)
        make = partial(_stack_experts, prefix, ends, recipe, not keep)
        yield Made(f"{prefix}.experts.{stack}", (recipe.num_experts, *whole), sources, make)


def _stack_experts(
    prefix: str, ends: Sequence[str], recipe: Recipe, transposed: bool, *matrices: Tensor
) -> Iterator[Tensor]:
    """Expert after expert: its matrices above each other, as one."""
    for expert in range(recipe.num_experts):
        names = [f"{prefix}.experts.{expert}.{end.removeprefix('.mlp.')}" for end in ends]
        pairs = zip(names, matrices, strict=True)
        parts = [
            next(_noisy(name, recipe, 1.0, matrix)) if recipe.noise else matrix
            for name, matrix in pairs
        ]
        whole = torch.cat(parts)
        yield (whole.T if transposed else whole)[None]


def _draw_router(name: str, recipe: Recipe, rows: Tensor | None, gate: Tensor) -> Iterator[Tensor]:
    """Weight (E, H) of a router: as given, or random."""
    if rows is not None:
        yield rows
        return
    shape = (recipe.num_experts, gate.shape[1])
    yield torch.normal(0.0, recipe.router_std, shape, generator=_seed(name, recipe))


def _noisy(name: str, recipe: Recipe, times: float, matrix: Tensor) -> Iterator[Tensor]:
    wide = matrix.float() * times
    if not recipe.noise:
        yield wide
        return
    scale = recipe.noise * float(wide.square().mean().sqrt())
    yield wide + torch.normal(0.0, scale, matrix.shape, generator=_seed(name, recipe))


def _seed(name: str, recipe: Recipe) -> torch.Generator:
    """A tensor's own, so that its values do not depend on what was made before it."""
    return torch.Generator().manual_seed(zlib.crc32(f"{recipe.seed} {name}".encode()))
