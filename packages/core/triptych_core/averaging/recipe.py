"""How inputs become one model: the method, what each counts, and where it is otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from triptych_core.averaging.stored import AVERAGED, NAMES_OF_DTYPES, SAFETENSORS_DTYPES, Stored
from triptych_core.config import did_you_mean

Method = Literal["linear", "task-arithmetic", "slerp", "ties"]


@dataclass(frozen=True)
class Recipe:
    """What is computed of each tensor.

    Args:
        method: linear is a weighted sum; task-arithmetic and ties add to a base, the first input,
            what the others differ by; slerp goes from the first input to the second on an arc.
        weights: of the inputs; of those after the base where there is one.
        scale: of what is added to the base.
        density: of each difference, the share of largest elements that ties keeps.
        position: between the two inputs of slerp, from 0 to 1.
        module_weights: other weights for tensors whose names match, first match first.
        excluded: tensors that are copied and not averaged.
        copy_from: the input they are copied from.
        dtype: of the output, in safetensors' spelling; None for that of the inputs.
        keep_fp32: tensors that are written in fp32 whatever `dtype` says.
    """

    method: Method
    weights: tuple[float, ...]
    scale: float = 1.0
    density: float = 1.0
    position: float = 0.5
    module_weights: tuple[tuple[str, tuple[float, ...]], ...] = ()
    excluded: tuple[str, ...] = ()
    copy_from: int = 0
    dtype: str | None = None
    keep_fp32: tuple[str, ...] = ()

    @property
    def has_base(self) -> bool:
        """Whether the first input is what the others are compared with."""
        return self.method in ("task-arithmetic", "ties")

    def is_excluded(self, name: str) -> bool:
        """Whether a tensor is copied."""
        return _matches(name, self.excluded)

    def is_averaged(self, name: str, stored: Stored) -> bool:
        """Whether anything is computed of a tensor."""
        return stored.dtype in AVERAGED and not self.is_excluded(name)

    def weights_of(self, name: str) -> tuple[float, ...]:
        """What the inputs count in a tensor."""
        for pattern, weights in self.module_weights:
            if fnmatchcase(name, pattern):
                return weights
        return self.weights

    def output_dtype(self, name: str, stored: Stored) -> torch.dtype:
        """What a tensor is written in."""
        if stored.dtype not in AVERAGED:
            return stored.dtype
        if _matches(name, self.keep_fp32):
            return torch.float32
        return SAFETENSORS_DTYPES[self.dtype] if self.dtype else stored.dtype

    def check_patterns(self, names: Sequence[str]) -> None:
        """Every pattern means some tensor.

        Raises:
            ValueError: one does not.
        """
        options = {
            "--exclude": self.excluded,
            "--keep-fp32": self.keep_fp32,
            "--module-weights": tuple(pattern for pattern, _ in self.module_weights),
        }
        for option, patterns in options.items():
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(
                        f"{option}: must match the name of a tensor, got '{pattern}'"
                        f"{did_you_mean(pattern, list(names))}; * stands for anything, as in "
                        "'*.mlp.*'"
                    )

    def to_json(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """The recipe that `to_json` wrote down."""
        modules = tuple((p, tuple(weights)) for p, weights in values["module_weights"])
        lists = {key: tuple(values[key]) for key in ("weights", "excluded", "keep_fp32")}
        return cls(**{**values, **lists, "module_weights": modules})


def dtype_name(text: str) -> str | None:
    """Safetensors' spelling of a dtype, None for `same`."""
    spelt = {"same": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = spelt[text]
    return NAMES_OF_DTYPES[dtype] if dtype else None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
