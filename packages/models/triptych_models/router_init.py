"""Routers that begin with what data looks like: an expert gets the tokens of a cluster.

Of a layer's router inputs x_t, what its MLP reads, spherical k-means finds E unit vectors c_e that
make sum_t max_e <x_t / |x_t|, c_e> large. The router's rows are

    w_e = g (c_e - mean_e' c_e'),    g = std rms_t |x_t| / rms_te <x_t, c_e - mean_e' c_e'>

so a token's first choice is the expert of its cluster (the mean is the same for all experts), and
logits are as far apart as those of rows drawn from normal(0, std). The dense model runs over one
packed row with the weights of one module in memory at a time.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .config import ModelConfig
from .families import build_shell
from .layout import decoder, tower
from .packed import PackedModel
from .rotary import restore_rotary
from .weights import own_parameters, weight_files


@torch.no_grad()
def routers_from_data(
    dense: Path,
    batch: Mapping[str, Any],
    num_tokens: int,
    layers: list[int],
    *,
    num_experts: int,
    std: float,
    seed: int,
) -> dict[int, Tensor]:
    """Rows (E, H) fp32 of the routers of these layers, from the first num_tokens of a packed row.

    batch is what the dense model's `hidden_states` takes. Runs in fp32 on the CPU. Raises
    ValueError for fewer tokens than experts.
    """
    if num_tokens < num_experts:
        raise ValueError(
            f"--router-from: must hold at least a token for each of {num_experts} experts, got "
            f"{num_tokens}; name more shards"
        )
    model = _without_weights(dense)
    found: dict[int, Tensor] = {}

    def look(layer: int, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs = given[0].flatten(0, -2)[:num_tokens]
        generator = torch.Generator().manual_seed(seed + layer)
        found[layer] = router_rows(inputs, find_clusters(inputs, num_experts, generator), std)

    with streamed_weights(model, dense):
        for layer in layers:
            decoder(model.hf).layers[layer].mlp.register_forward_pre_hook(partial(look, layer))
        model.hidden_states(**batch)
    return found


def find_clusters(x: Tensor, count: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Unit centroids (count, H) of x (n, H) by spherical k-means; the first ones by k-means++.

    A cluster that loses all its tokens begins anew at the token that fits its own worst.
    """
    x = nn.functional.normalize(x.float(), dim=-1)
    centroids = _spread_out(x, count, generator)
    for _ in range(rounds):
        fit, cluster = (x @ centroids.T).max(-1)
        sums = torch.zeros_like(centroids).index_add_(0, cluster, x)
        empty = (cluster.bincount(minlength=count) == 0).nonzero().flatten()
        sums[empty] = x[fit.argsort()[: len(empty)]]
        moved = nn.functional.normalize(sums, dim=-1)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def router_rows(x: Tensor, centroids: Tensor, std: float) -> Tensor:
    """Weight (E, H) of a router by whose logits the tokens x (n, H) choose their centroid."""
    rows = centroids - centroids.mean(0)
    spread = (x @ rows.T).square().mean().sqrt()
    wanted = std * x.square().sum(-1).mean().sqrt()
    return rows * (wanted / spread.clamp_min(1e-20))


def _spread_out(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Tokens to begin with, each drawn by how far it is from those before (k-means++)."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    far = torch.ones(len(x))
    for _ in range(count - 1):
        far = torch.minimum(far, (1 - x @ x[chosen[-1]]).clamp_min(0))
        weights = far if float(far.sum()) > 0 else torch.ones(len(x))
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return x[chosen].clone()


def _without_weights(path: Path) -> PackedModel:
    """The model on the meta device but for rotary frequencies, whose modules call each other.

    Unfused: an op for several modules would not pass through all of them.
    """
    with torch.device("meta"):
        config = ModelConfig(path=path, fuse=False, compile="none")
        model = build_shell(config, dtype=torch.float32).eval()
    decoder(model.hf).rotary_emb.to_empty(device="cpu")
    if (visual := tower(model.hf)) is not None:
        visual.rotary_pos_emb.to_empty(device="cpu")
    restore_rotary(model.hf)
    return model


@contextmanager
def streamed_weights(model: PackedModel, directory: Path) -> Iterator[None]:
    """Inside, every module of a model on the meta device has its weights while it runs.

    Raises ValueError for weights that the directory lacks.
    """
    files = weight_files(directory)
    modules = list(own_parameters(model.hf))
    if missing := {name for _, own in modules for name in own} - files.keys():
        raise ValueError(
            f"{directory}: must hold the model's tensors, got no {', '.join(sorted(missing))}; "
            "check that config.json belongs to these weights"
        )
    with ExitStack() as stack:
        readers = {f: stack.enter_context(safe_open(f, "pt")) for f in sorted(set(files.values()))}
        for module, own in modules:
            stored = {name.rpartition(".")[2]: (readers[files[name]], name) for name in own}
            stack.callback(module.register_forward_pre_hook(partial(_fill, stored)).remove)
            stack.callback(module.register_forward_hook(_empty).remove)
        yield


def _fill(stored: dict[str, tuple[Any, str]], module: nn.Module, given: Any) -> None:
    for attribute, (reader, name) in stored.items():
        weight = reader.get_tensor(name).float()
        setattr(module, attribute, nn.Parameter(weight, requires_grad=False))


def _empty(module: nn.Module, given: Any, result: Any) -> None:
    for attribute, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, attribute, nn.Parameter(parameter.to("meta"), requires_grad=False))
