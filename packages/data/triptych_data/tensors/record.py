"""One sample of tensors: `<key>.json`, for people and labels, and `<key>.safetensors`.

The JSON may hold `label`, an integer, and anything else. The tensors are `latents`, and maybe
`latents_std`, of the same shape: the spread of the autoencoder's posterior.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from triptych_data.faults import BadSample
from triptych_data.sample import dump_json
from triptych_data.strict_json import load_json

NAMES = ["json", "safetensors"]
"""What follows the key in the names of a sample's members."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAMES_OF_TENSORS = ("latents", "latents_std")


class TensorSample(NamedTuple):
    """A sample as a batch takes it, fp32."""

    latents: Tensor
    std: Tensor | None
    label: int


def encode(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[bytes]:
    """The members of a sample, in the order of `NAMES`."""
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return [dump_json(dict(record)), save(held)]


def decode(
    members: list[memoryview], where: str, *, shape: tuple[int, ...] | None, num_classes: int | None
) -> TensorSample:
    """A sample of its members, checked for all that a model could stumble over.

    shape: of latents. num_classes: labels must be below; None for samples without. Raises
    BadSample, which begins with `where`.
    """
    record = load_json(bytes(members[0]), where)
    if not isinstance(record, dict):
        raise BadSample(f"{where}: its JSON must be an object, got {record!r:.60}", "no object")
    tensors = _load(members[1], where)
    if "latents" not in tensors:
        raise BadSample(
            f"{where}: must hold a tensor named latents, got {sorted(tensors)[:4]}", "no latents"
        )
    latents, std = (tensors.get(name) for name in NAMES_OF_TENSORS)
    assert latents is not None
    for name, tensor in (("latents", latents), ("latents_std", std)):
        if tensor is not None:
            _check(tensor, name, shape or tuple(latents.shape), where)
    label = 0 if num_classes is None else _label(record, num_classes, where)
    return TensorSample(latents.float(), None if std is None else std.float(), label)


def _load(data: memoryview, where: str) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load(bytes(data))
    except (SafetensorError, KeyError, ValueError, OverflowError) as error:
        raise BadSample(f"{where}: must be a whole safetensors file, got {error}", "damaged") from (
            error
        )
    return tensors


def _check(tensor: Tensor, name: str, shape: tuple[int, ...], where: str) -> None:
    if tuple(tensor.shape) != shape or tensor.numel() == 0:
        raise BadSample(
            f"{where}: {name} must be of shape {shape}, as of the first sample, got "
            f"{tuple(tensor.shape)}",
            "wrong shape",
        )
    if tensor.dtype not in DTYPES:
        raise BadSample(
            f"{where}: {name} must be float16, bfloat16 or float32, got {tensor.dtype}",
            "wrong dtype",
        )
    if not bool(tensor.isfinite().all()):
        raise BadSample(f"{where}: {name} must be finite, got inf or nan", "not finite")


def _label(record: dict[str, Any], num_classes: int, where: str) -> int:
    label = record.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_classes:
        raise BadSample(
            f"{where}: label must be an integer from 0 to {num_classes - 1}, got {label!r:.40}",
            "no label",
        )
    return label
