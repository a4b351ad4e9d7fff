"""One sample of tensors: `<key>.json`, for people and labels, and `<key>.safetensors`.

The JSON may hold `label`, an integer, and anything else. Of the tensors `latents` must be there;
`latents_std`, of the same shape, is the spread of the autoencoder's posterior; `text_features`
(length, width) may have another length in each sample. All others have one shape in all samples.
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
from triptych_data.text.marks import RESERVED, RESERVED_TEXT

NAMES = ["json", "safetensors"]
"""What follows the key in the names of a sample's members."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LATENTS, STD, TEXT = "latents", "latents_std", "text_features"
SCALED = (LATENTS, "image_latents", "source_latents")
"""What one autoencoder gave, and a model takes by the same mean and spread."""

Shape = tuple[int, ...]


class Wanted(NamedTuple):
    """What a sample must be like."""

    shapes: Mapping[str, Shape]
    """of its tensors by name; of text (most rows, width); a sample may be without latents_std"""
    num_classes: int | None = None
    """labels are below; None: there need be none"""
    text_field: str | None = None
    """of the JSON; None: no text is wanted"""


class TensorSample(NamedTuple):
    """A sample as a batch takes it: the tensors that are wanted, fp32."""

    tensors: dict[str, Tensor]
    label: int
    text: str = ""


def encode(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[bytes]:
    """The members of a sample, in the order of `NAMES`."""
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return [dump_json(dict(record)), save(held)]


def decode(members: list[memoryview], where: str, wanted: Wanted) -> TensorSample:
    """A sample of its members, checked for all that a model could stumble over.

    Raises BadSample, which begins with `where`.
    """
    record = load_json(bytes(members[0]), where)
    if not isinstance(record, dict):
        raise BadSample(f"{where}: its JSON must be an object, got {record!r:.60}", "no object")
    found = load_tensors(members[1], where)
    tensors = {}
    for name, shape in wanted.shapes.items():
        if name in found:
            tensors[name] = _checked(found[name], name, shape, where).float()
        elif name != STD:
            raise BadSample(
                f"{where}: must hold a tensor named {name}, got {sorted(found)[:4]}", f"no {name}"
            )
    label = 0 if wanted.num_classes is None else _label(record, wanted.num_classes, where)
    text = "" if wanted.text_field is None else _text(record, wanted.text_field, where)
    return TensorSample(tensors, label, text)


def load_tensors(data: memoryview, where: str) -> dict[str, Tensor]:
    """The tensors of a member, which is not trusted. Raises BadSample."""
    try:
        tensors: dict[str, Tensor] = load(bytes(data))
    except (SafetensorError, KeyError, ValueError, OverflowError) as error:
        raise BadSample(f"{where}: must be a whole safetensors file, got {error}", "damaged") from (
            error
        )
    return tensors


def _checked(tensor: Tensor, name: str, shape: Shape, where: str) -> Tensor:
    found = tuple(tensor.shape)
    fits = found == shape
    if name == TEXT:
        fits = len(found) == 2 and found[0] <= shape[0] and found[1] == shape[1]
    if not fits or tensor.numel() == 0:
        most = "at most " if name == TEXT else ""
        raise BadSample(
            f"{where}: {name} must be {most}{shape}, as of the first sample, got {found}",
            "wrong shape",
        )
    if tensor.dtype not in DTYPES:
        raise BadSample(
            f"{where}: {name} must be float16, bfloat16 or float32, got {tensor.dtype}",
            "wrong dtype",
        )
    if not bool(tensor.isfinite().all()):
        raise BadSample(f"{where}: {name} must be finite, got inf or nan", "not finite")
    return tensor


def _text(record: dict[str, Any], field: str, where: str) -> str:
    text = record.get(field)
    if not isinstance(text, str) or not text.strip():
        raise BadSample(f"{where}: {field} must be words, got {text!r:.40}", "no text")
    if RESERVED.search(text):  # of which no tokenizer of ours makes ids
        raise BadSample(f"{where}: {field} {RESERVED_TEXT}", "reserved characters")
    return text


def _label(record: dict[str, Any], num_classes: int, where: str) -> int:
    label = record.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_classes:
        raise BadSample(
            f"{where}: label must be an integer from 0 to {num_classes - 1}, got {label!r:.40}",
            "no label",
        )
    return label
