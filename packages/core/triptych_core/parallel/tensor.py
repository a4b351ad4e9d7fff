"""Tensor parallelism by DeepSpeed's AutoTP, told by name what it cuts.

Left to itself AutoTP 0.19.8 goes by the plan of `model.config`, which a model that is wrapped, or
made of several, does not have: it then guesses, or cuts nothing without a word. It also compares
the first batch of all ranks by pickling it, with tensors of another rank's device.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


@dataclass(frozen=True)
class TensorCuts:
    """What `size` consecutive ranks divide between them.

    cuts: name of a parameter -> "outputs" (a linear's weight by rows), "inputs" (by columns) or
    "none" (whole, but its gradients are parts of a sum).
    """

    size: int = 1
    cuts: Mapping[str, str] | None = None

    @property
    def names(self) -> set[str]:
        """The parameters that are cut."""
        return {name for name, cut in (self.cuts or {}).items() if cut != "none"}


WHOLE = TensorCuts()


def autotp_section(tensor: TensorCuts) -> dict[str, Any]:
    """What DeepSpeed's configuration says of it; nothing where nothing is cut."""
    if tensor.size == 1:
        return {}
    kinds = {"outputs": "column", "inputs": "row", "none": "skip"}
    specs = [
        {
            "patterns": [_pattern(name)],
            "partition_type": kinds[cut],
            "grad_allreduce": cut == "none",
        }
        for name, cut in {_pattern(n): (n, c) for n, c in (tensor.cuts or {}).items()}.values()
    ]
    plan = {"use_default_specs": False, "layer_specs": specs}
    return {"tensor_parallel": {"autotp_size": tensor.size, "partition_config": plan}}


def check_cut(engine: Any, tensor: TensorCuts) -> None:
    """Raise ValueError unless exactly what was to be cut was, and leave the first batch alone."""
    if tensor.size == 1:
        return
    found = {name for name, parameter in engine.module.named_parameters() if is_cut(parameter)}
    if found != tensor.names or not found:
        raise ValueError(
            f"parallel.tensor: must cut {len(tensor.names)} weights, got {len(found)} cut by "
            f"DeepSpeed, e.g. {min(found ^ tensor.names, default='none')}; set it to 1"
        )
    engine.first_dataloader_check.remove()


def is_cut(parameter: Any) -> bool:
    """Whether this rank holds a part of a parameter that others have the rest of."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def tensor_place(engine: Any) -> tuple[int, int]:
    """(rank, size) of this rank among those that divide weights between them."""
    if getattr(engine, "mpu", None) is None:
        return 0, 1
    mpu = engine.mpu
    return mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()


def read_cut(gather: Gather) -> Gather:
    """`gather`, and then what is cut over ranks is put together; for reading only."""

    @contextmanager
    def whole(parameters: list[nn.Parameter]) -> Iterator[None]:
        with gather(parameters):
            parts: list[tuple[Any, Any]] = [(p, p.data) for p in parameters if is_cut(p)]
            try:
                for parameter, _ in parts:
                    parameter.gather_params([parameter])
                yield
            finally:
                for parameter, part in parts:
                    parameter.data = part

    return whole


def _pattern(name: str) -> str:
    """One for all layers."""
    return re.sub(r"\d+", r"\\d+", re.escape(name)) + "$"
