"""The loss of causal language models: `model(labels=...)` without ever holding the logits.

The head of the model gets a forward that, in a call with labels, gives DeferredLogits; the model's
own code then computes its loss from them, and F.cross_entropy becomes `linear_cross_entropy`. So
any loss function that ends in F.cross_entropy is served, and none has to be replaced.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear_cross_entropy import linear_cross_entropy
from .deferred_logits import DeferredLogits
from .logits_on_demand import readable
from .probe import Forward, Match, is_fused, is_replaced, marked

_FLAG = "_triptych_defers"


def is_candidate(module: nn.Module) -> bool:
    """A module that takes labels and owns an output layer."""
    return "labels" in _parameters_of(type(module).forward) and _head_of(module) is not None


def recognise(module: nn.Module) -> Match | str:
    found = _head_of(module)
    assert found is not None
    name, head = found
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"its {name} must be a plain nn.Linear, got {type(head).__name__}"
    if is_replaced(head) and not is_fused(head):
        return f"something else has replaced the forward of its {name}"
    return Match(
        "linear_cross_entropy",
        _model_forward(type(module).forward, name),
        {name: _head_forward()},
        shown=name,
    )


def _parameters_of(forward: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        return []


def _head_of(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The output layer and its name: what transformers says it is, or the child lm_head."""
    head = None
    if hasattr(module, "get_output_embeddings"):
        head = module.get_output_embeddings()  # type: ignore[operator]
    head = head if isinstance(head, nn.Module) else module._modules.get("lm_head")
    names = [name for name, child in module.named_modules() if child is head]
    return (names[0], head) if head is not None and names else None


def _model_forward(stock: Callable[..., Any], head_name: str) -> Forward:
    place = _parameters_of(stock).index("labels") - 1  # without self
    path = head_name.split(".")

    @wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[place] if len(args) > place else kwargs.get("labels")
        if labels is None:
            return stock(self, *args, **kwargs)
        head = self
        for name in path:
            head = getattr(head, name)
        setattr(head, _FLAG, True)
        try:
            outputs = stock(self, *args, **kwargs)
        finally:
            setattr(head, _FLAG, False)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return outputs
        return readable(outputs)

    return marked(forward, "")


def _head_forward() -> Forward:
    def forward(self: Any, input: Tensor, *, deferred: dict[str, Any] | None = None) -> Any:
        if deferred:
            return _loss(input, self.weight, self.bias, **deferred)
        if deferred is None and getattr(self, _FLAG, False):
            return DeferredLogits(self, input)
        return F.linear(input, self.weight, self.bias)

    return marked(forward, "linear_cross_entropy")


def _loss(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, *, scale: float, **options: Any
) -> Tensor:
    """The summed loss of the logits times `scale`, which goes over to what they are made of."""
    if scale != 1.0:
        hidden_states = hidden_states * scale
        bias = None if bias is None else bias * scale
    return linear_cross_entropy(hidden_states, weight, bias=bias, **options)
