"""Logits that are not computed until somebody looks at them.

A causal language model computes its logits, (B, T, V), to hand them to a loss. Between the two
stand few operations: a cast, a scale, a soft cap, a choice or a new shape of the rows. Those are
noted here, so that a cross entropy can be computed from the hidden states. Anything else, and
anyone who reads the logits afterwards, gets the tensor that the model would have made.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DeferredLogits:
    """head(hidden_states) and what was done to it since; (..., V) in all that a tensor can do.

    `head` is a linear layer whose forward takes `deferred=`: {} for the logits, otherwise the
    keyword arguments of `linear_cross_entropy` and the `scale` of the logits. It is called as a
    module, so its hooks run, and a weight that ZeRO-3 has partitioned is whole when it is read.
    """

    def __init__(
        self, head: nn.Module, hidden_states: Tensor, steps: tuple[tuple[str, Any], ...] = ()
    ) -> None:
        self.head = head
        self.num_classes: int = head.out_features  # type: ignore[assignment]
        self.hidden_states = hidden_states  # (..., H)
        self.steps = steps  # ("cast", dtype), ("times", float), ("over", float), ("tanh", None)
        kind = hidden_states.device.type
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    # What is known without the values

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden_states.shape[:-1], self.num_classes))

    @property
    def dtype(self) -> torch.dtype:
        casts = [value for name, value in self.steps if name == "cast"]
        return casts[-1] if casts else self.autocast or self.hidden_states.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden_states.device

    @property
    def ndim(self) -> int:
        return self.hidden_states.ndim

    @property
    def requires_grad(self) -> bool:
        return self.hidden_states.requires_grad

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    # What is noted

    def float(self) -> "DeferredLogits":
        return self._with("cast", torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            if isinstance(args[0], torch.dtype):
                return self._with("cast", args[0])
            if args[0] == self.device:
                return self
        return self.tensor().to(*args, **kwargs)

    def contiguous(self) -> "DeferredLogits":
        return self

    def tanh(self) -> "DeferredLogits":
        return self._with("tanh", None)

    def __mul__(self, factor: Any) -> Any:
        if isinstance(factor, (int, float)):
            return self._with("times", float(factor))
        return self.tensor() * _values(factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        if isinstance(divisor, (int, float)):
            return self._with("over", float(divisor))
        return self.tensor() / _values(divisor)

    def view(self, *shape: Any) -> Any:
        return self._reshape(*shape)

    def reshape(self, *shape: Any) -> Any:
        return self._reshape(*shape)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        last = end_dim if end_dim >= 0 else end_dim + self.ndim
        if last < self.ndim - 1:
            return self._of_rows(self.hidden_states.flatten(start_dim, last))
        return self.tensor().flatten(start_dim, end_dim)

    def __getitem__(self, index: Any) -> Any:
        rows = _row_index(index, self.ndim)
        if rows is None:
            return self.tensor()[index]
        return self._of_rows(self.hidden_states[rows])

    # The values

    def tensor(self) -> Tensor:
        """The logits as a tensor."""
        with self._as_then():
            logits = self.head(self.hidden_states, deferred={})
            for name, value in self.steps:
                logits = _REPLAY[name](logits, value)
        return logits

    def cross_entropy(self, target: Any, **options: Any) -> Any:
        """F.cross_entropy of these logits, (N, V), without them where its options allow that."""
        is_fused = self.ndim == 2 and _are_indices(target) and _is_plain(**options)
        scale_and_cap = _scale_and_cap(self.steps) if is_fused else None
        if scale_and_cap is None:
            return F.cross_entropy(self.tensor(), target, **options)
        scale, softcap = scale_and_cap
        ignore_index = options.get("ignore_index", -100)
        settings = {
            "labels": target,
            "scale": scale,
            "ignore_index": ignore_index,
            "softcap": softcap,
            "label_smoothing": options.get("label_smoothing", 0.0),
        }
        with self._as_then():
            loss = self.head(self.hidden_states, deferred=settings)
        if options.get("reduction", "mean") == "mean":
            loss = loss / (target != ignore_index).sum()
        return loss.to(self.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            options = {**dict(zip(_CROSS_ENTROPY, args, strict=False)), **kwargs}
            logits, target = options.pop("input"), options.pop("target")
            if isinstance(logits, cls):
                return logits.cross_entropy(target, **options)
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        values = {name: _values(value) for name, value in kwargs.items()}
        return func(*map(_values, args), **values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.tensor(), name)

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __len__(self) -> int:
        return self.shape[0]

    def _with(self, name: str, value: Any) -> "DeferredLogits":
        return self._keeping(self.hidden_states, (*self.steps, (name, value)))

    def _of_rows(self, hidden_states: Tensor) -> "DeferredLogits":
        return self._keeping(hidden_states, self.steps)

    def _keeping(
        self, hidden_states: Tensor, steps: tuple[tuple[str, Any], ...]
    ) -> "DeferredLogits":
        other = DeferredLogits(self.head, hidden_states, steps)
        other.autocast = self.autocast
        return other

    def _as_then(self) -> torch.autocast:
        """Autocast as it was when the model called its head."""
        kind = self.device.type
        return torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None)

    def _reshape(self, *shape: Any) -> Any:
        new = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if len(new) < 2 or new[-1] != self.shape[-1]:
            return self.tensor().reshape(new)
        return self._of_rows(self.hidden_states.reshape(*new[:-1], self.hidden_states.shape[-1]))


_CROSS_ENTROPY = (
    "input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction",
    "label_smoothing",
)  # fmt: skip
_REPLAY: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "cast": lambda x, dtype: x.to(dtype),
    "times": lambda x, factor: x * factor,
    "over": lambda x, divisor: x / divisor,
    "tanh": lambda x, _: torch.tanh(x),
}


def _are_indices(target: Any) -> bool:
    return isinstance(target, Tensor) and target.dtype == torch.int64 and target.ndim == 1


def _is_plain(
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> bool:
    """Whether `linear_cross_entropy` has what these options of F.cross_entropy ask for."""
    old = size_average is not None or reduce is not None
    return weight is None and not old and reduction in ("mean", "sum")


def _scale_and_cap(steps: tuple[tuple[str, Any], ...]) -> tuple[float, float | None] | None:
    """What the steps come to: a factor on the logits and then a soft cap; None if neither."""
    scale, cap = 1.0, None
    for name, value in steps:
        if name == "tanh":
            if cap is not None:
                return None
            cap = 1.0
        elif name != "cast":
            factor = value if name == "times" else 1 / value
            scale, cap = (scale * factor, None) if cap is None else (scale, cap * factor)
    if cap is None:
        return scale, None
    if cap <= 0:
        return None
    # m tanh(s z) is the soft cap m of s m z
    return 1.0 if math.isclose(scale * cap, 1.0, rel_tol=1e-12) else scale * cap, cap


def _values(x: Any) -> Any:
    if isinstance(x, DeferredLogits):
        return x.tensor()
    if isinstance(x, (list, tuple)):
        return type(x)(map(_values, x))
    return x


def _row_index(index: Any, ndim: int) -> Any:
    """The index for the hidden states when it leaves the last dimension whole; otherwise None."""
    items = list(index) if isinstance(index, tuple) else [index]
    taken = [x.ndim if isinstance(x, Tensor) and x.dtype == torch.bool else 1 for x in items]
    taken = [0 if x is None or x is Ellipsis else n for x, n in zip(items, taken, strict=True)]
    if any(isinstance(x, (list, DeferredLogits)) for x in items):
        return None
    ends_whole = isinstance(items[-1], slice) and items[-1] == slice(None)
    reaches_end = any(x is Ellipsis for x in items[:-1]) or sum(taken) == ndim
    if items[-1] is Ellipsis:
        reaches_end = sum(taken) == ndim
    return None if reaches_end and not ends_whole else index


def _reader(name: str) -> Callable[..., Any]:
    def read(self: DeferredLogits, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*map(_values, args))

    return read


# Python looks these up on the class, past __getattr__.
for _name in (
    "add", "radd", "sub", "rsub", "neg", "pow", "rpow", "rtruediv", "matmul", "abs", "lt", "le",
    "gt", "ge", "eq", "ne", "iter", "array", "float", "int", "bool",
):  # fmt: skip
    setattr(DeferredLogits, f"__{_name}__", _reader(f"__{_name}__"))
DeferredLogits.__hash__ = object.__hash__  # type: ignore[method-assign]
