"""Tensors in a file of torch.save: their places, without reading them or running what it says."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych_core.averaging.stored import Place, Stored


def read_torch_file(path: Path) -> dict[str, Stored]:
    """Tensors of a file of torch.save by name; those inside dictionaries by dotted names.

    Raises:
        ValueError: it is no zip archive of torch's, holds anything but tensors and plain values, or
            a tensor whose elements are not in a row.
    """
    # torch.load in this mode makes tensors without data that know where theirs would be.
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: must be a whole zip archive of torch.save, got another format or a file cut "
            "off; save it again by torch 1.6 or newer, or copy it again"
        )
    with zipfile.ZipFile(path) as archive:
        packed = [each for each in archive.infolist() if each.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(
            f"{path}: must be stored as torch.save does it, got {packed[0].filename} compressed; "
            "save it again"
        )
    try:
        with FakeTensorMode():
            content = torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(
            f"{path}: must hold tensors and plain values alone, got {reason}; a file that runs "
            "code when it is loaded is refused, save the state dict alone"
        ) from None
    if isinstance(content, Tensor):
        return {"": _stored(path, "", content)}
    return {name: _stored(path, name, tensor) for name, tensor in _tensors("", content)}


def _tensors(prefix: str, content: Any) -> list[tuple[str, Tensor]]:
    found = []
    for key, value in content.items() if isinstance(content, dict) else ():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Tensor):
            found.append((name, value))
        else:
            found += _tensors(name, value)
    return found


def _stored(path: Path, name: str, tensor: Tensor) -> Stored:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{path}: {name} must have its elements in a row, got strides "
            f"{tensor.stride()} for shape {tuple(tensor.shape)}; save a contiguous copy"
        )
    begin = tensor.untyped_storage()._checkpoint_offset
    assert begin is not None, "torch.load under FakeTensorMode notes where a storage lies"
    offset = begin + int(tensor.storage_offset()) * tensor.dtype.itemsize
    shape = tuple(tensor.shape)
    return Stored(tensor.dtype, shape, (Place(0, tensor.numel(), path, offset),))
