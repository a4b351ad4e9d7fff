"""What a layer keeps for its backward, and what it computes again there."""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .experts import Experts
from .offload import InputStore, KeptInput

Checkpointing = Literal["none", "selective", "full", "offload"]

_GROUPED = "aten::_grouped_mm"
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", _GROUPED}
_ATTENTION = {
    "torch_attn::_varlen_attn",
    "triptych::flash4",
    "aten::_flash_attention_forward",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
}
# Each one node of a compiled layer.
_NODES = {
    "triptych::attention",
    "triptych::gated_delta_rule",
    "triptych::gated_delta_rule_fla",
    "triptych::moe_mlp",
    "triptych::native_sparse_attention",
    "triptych_models::gather_rows",
    "triptych_models::sum_rows",
}


class Checkpointed(nn.Module):
    """A module whose layers keep for their backward what was said."""

    checkpointing: Checkpointing = "none"
    is_compiled = False
    input_store: InputStore

    def set_checkpointing(self, checkpointing: Checkpointing) -> None:
        """Say what every layer keeps; see `run_layer`. Layers compile before, if they do."""
        self.checkpointing = checkpointing
        for module in self.modules():
            forward = vars(module).get("forward")
            if isinstance(forward, CompiledForward):
                forward.compile(selective=checkpointing == "selective")

    def run_layer(self, layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """`run_layer` by what was said."""
        way = self.checkpointing if self.training else "none"
        if self.is_compiled:
            if way == "selective":
                way = "none"  # the compiler sees to it
            if hidden_states._is_view():
                # The graph of a view is another one: the first layer's would be compiled apart.
                hidden_states = hidden_states.clone()
        return run_layer(way, self.input_store, layer, hidden_states, **kwargs)


class CompiledForward:
    """A layer's forward as one graph; of it, what `selective` checkpointing would, is kept.

    Args:
        forward: the layer's.
        dynamic: whether sizes may vary, from the first call on.
    """

    def __init__(self, forward: Callable[..., Any], dynamic: bool | None) -> None:
        self._forward, self._dynamic = forward, dynamic
        self.compile(selective=False)

    def compile(self, *, selective: bool) -> None:
        """Compile at the next call, to keep all that the backward reads or what is dear of it."""
        from torch._dynamo import config  # here: importing it takes a second
        from torch._inductor.config import triton

        # Sums over rows and columns in one kernel, on since torch 2.10 and as wrong in 2.14.1: of
        # chunks of one table, by which a block shifts and scales its norms, gradients are memory as
        # it was found (pytorch issue 193061; Wan's), and rows beyond a tile's last multiple are
        # summed along (195845).
        triton.mix_order_reduction = False
        # What torch 2.12 has as its default: before, guards were read after they had been freed,
        # and a run could end in a segmentation fault (its pull request 181873).
        config.use_recursive_dict_tags_for_guards = False
        # It warns of layers that write in place, which what gradients are compared with would show.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        forward = partial(_keeping, self._forward) if selective else self._forward
        self._compiled = torch.compile(forward, fullgraph=True, dynamic=self._dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)


def compile_forward(layer: nn.Module, dynamic: bool | None = None) -> None:
    """Compile what a layer computes as one graph, without the hooks around it.

    `layer.compile()` would take those in, and with them ZeRO-3's gathering. Inside a layer there
    are none: it is a leaf to ZeRO-3, whose weights are whole while its forward runs.
    """
    layer.forward = CompiledForward(layer.forward, dynamic)


def run_layer(
    checkpointing: Checkpointing,
    store: InputStore,
    layer: Callable[..., Tensor],
    hidden_states: Tensor,
    **kwargs: Any,
) -> Tensor:
    """Call a layer so that it keeps what `checkpointing` says.

    none: all that its backward reads. full: its input. offload: that, in host memory, by way of
    `store`. selective: also what matrix products and attention gave, so that only norms, gates and
    rotary are computed again (Korthikanti et al., arXiv 2205.05198, taken from the other side: the
    dear is kept). An attention kernel that is no op of torch's dispatcher (flash-attn 4 outside
    torch.compile) is computed again too.
    """
    if not hidden_states.requires_grad and any(p.requires_grad for p in _parameters(layer)):
        # The first thing that trains. DeepSpeed 0.19.8's ZeRO-3 reduces a leaf's gradients in a
        # full backward hook (stage3.py), which comes before them if no input needs one.
        hidden_states = hidden_states.detach().requires_grad_(torch.is_grad_enabled())
    has_graph = torch.is_grad_enabled() and hidden_states.requires_grad
    if checkpointing == "none" or not has_graph:
        return layer(hidden_states, **kwargs)
    settings: dict[str, Any] = {}
    if checkpointing == "selective":
        policy = partial(_policy, _last_weight(layer))
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    # No dropout inside, so no RNG state (a sync on CUDA) to keep.
    settings |= {"use_reentrant": False, "preserve_rng_state": False}
    if checkpointing == "offload":
        kept = store.keep(hidden_states)
        return checkpoint(_run_kept, layer, kept, **settings, **kwargs)
    return checkpoint(layer, hidden_states, **settings, **kwargs)


def _parameters(layer: Any) -> Iterable[nn.Parameter]:
    found: Iterable[nn.Parameter] = layer.parameters()
    return found


def _run_kept(layer: Callable[..., Tensor], kept: KeptInput, **kwargs: Any) -> Tensor:
    return layer(kept.take(), **kwargs)


def _last_weight(layer: Any) -> Tensor | None:
    """The weight of a layer's last product, by the order in which linears, and experts, were
    registered.

    What it gives goes to the residual stream and is read by no backward within the layer:
    recomputation ends before it, and keeping it would be for nothing.
    """
    weights = [
        module.down_proj if isinstance(module, Experts) else module.weight
        for module in layer.modules()
        if isinstance(module, nn.Linear | Experts)
    ]
    return weights[-1] if weights else None


def _policy(
    last: Tensor | None, context: Any, op: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    name = op._schema.name
    if name in _ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if name in _PRODUCTS and not _reads(args[1 if name == _GROUPED else -1], last):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _keeping(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward` within a compiled graph, of which products, attention and the like are kept."""

    def run() -> Any:
        return forward(*args, **kwargs)

    return checkpoint(run, use_reentrant=False, preserve_rng_state=False, context_fn=_kept)


def _kept() -> Any:
    return create_selective_checkpoint_contexts(_policy_of_graph)


def _policy_of_graph(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # What no backward reads, such as a last product's result, the compiler does not keep anyway.
    dear = op._schema.name in _PRODUCTS | _ATTENTION | _NODES
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def _reads(matrix: Tensor, weight: Tensor | None) -> bool:
    # Asked anew each time, since ZeRO-3 gives a weight other storage whenever it is gathered. The
    # place in it, too: the engine has many weights in one.
    if weight is None or matrix.storage_offset() != weight.storage_offset():
        return False
    return bool(matrix.untyped_storage()._cdata == weight.untyped_storage()._cdata)
