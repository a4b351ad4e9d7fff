"""Writing samples of tensors as shards."""

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from triptych_data.faults import BadSample
from triptych_data.shards.staging import staging
from triptych_data.shards.tar import END
from triptych_data.shards.tarwriter import TarWriter, span_bytes
from triptych_data.sources.kinds import identity
from triptych_data.tensors.record import LATENTS, NAMES, STD, TEXT, Wanted, decode, encode

SHARD_SIZE = 256_000_000
MOST_TEXT = 1 << 16
"""Rows of a sample's text_features."""

Sample = tuple[Mapping[str, Any], Mapping[str, Tensor]]


def write_tensor_shards(
    samples: Iterable[Sample],
    output: Path,
    *,
    run: Mapping[str, Any] | None = None,
    shard_size: int = SHARD_SIZE,
    samples_per_shard: int | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write (record, tensors) pairs as shards into `output`; returns their paths.

    Every sample is checked as when it is read: latents of one shape, finite. Keys number the
    samples. Nothing appears in `output` before all is written. Raises ValueError at the first bad
    sample, and where there is none.
    """
    with staging(output, dict(run or {}), overwrite=overwrite) as place:
        if not place.publishing:
            _write(samples, place.shards, shard_size, samples_per_shard)
        return place.publish()


def _write(
    samples: Iterable[Sample], folder: Path, shard_size: int, samples_per_shard: int | None
) -> None:
    for old in folder.iterdir():
        old.unlink()
    wanted: Wanted | None = None
    tar: TarWriter | None = None
    count = number = 0
    with ExitStack() as stack:
        for number, (record, tensors) in enumerate(samples, 1):
            key = f"{number - 1:09d}"
            members = encode(record, tensors)
            wanted = wanted or like(tensors, f"sample {key}")
            decode([memoryview(member) for member in members], f"sample {key}", wanted)
            size = span_bytes([len(member) for member in members])
            if tar is not None and (
                tar.end + size + len(END) > shard_size or count == samples_per_shard
            ):
                tar.finish("members")
                tar, count = None, 0
            if tar is None:
                name = f"shard-{len(list(folder.glob('*.tar'))):06d}.tar"
                tar = stack.enter_context(TarWriter(folder / name))
            tar.add_members(key, NAMES, NAMES, members, [], 0)
            count += 1
        if tar is None:
            raise ValueError("input: must hold a sample, got none; name files with latents")
        tar.finish("members")


def like(tensors: Mapping[str, Tensor], where: str) -> Wanted:
    """What all samples must be like by the first; only the length of text may be another."""
    if LATENTS not in tensors:
        raise ValueError(
            f"{where}: must hold a tensor named {LATENTS}, got {sorted(tensors)[:4]}; name it so"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes[STD] = shapes[LATENTS]
    if TEXT in shapes:
        shapes[TEXT] = (MOST_TEXT, *shapes[TEXT][1:])
    return Wanted(shapes)


def read_arrays(paths: Iterable[Path]) -> Iterator[Sample]:
    """Samples out of .npz and .safetensors files: `latents` (n, C, ...), `labels` (n,), …

    All arrays have n rows. One of numbers or words, (n,), becomes a field of the JSON, others
    tensors; of `text_features` the first `text_lens` (n,) rows, if that is there. Nothing is
    unpickled. Raises ValueError with the file.
    """
    for path in paths:
        arrays = _read(path)
        if "latents" not in arrays:
            raise ValueError(
                f"{path}: must hold an array named latents, got {sorted(arrays)[:6]}; name it so"
            )
        rows = len(arrays["latents"])
        for name, array in arrays.items():
            if array.ndim == 0 or len(array) != rows:
                raise ValueError(
                    f"{path}: {name} must have a row for each of the {rows} latents, got shape "
                    f"{tuple(array.shape)}; make them alike"
                )
        for row in range(rows):
            values = {name: array[row] for name, array in arrays.items()}
            record = {n: v.item() for n, v in values.items() if v.ndim == 0}
            if "labels" in record:
                record["label"] = record.pop("labels")
            held = {n: v for n, v in values.items() if v.ndim}
            if TEXT in held and "text_lens" in record:
                held[TEXT] = held[TEXT][: record.pop("text_lens")]
            yield record, held


def shard_arrays(paths: list[Path], output: Path, **options: Any) -> list[Path]:
    """`write_tensor_shards` of `read_arrays`."""
    found = [(path, path.suffix) for path in paths]
    run = {"inputs": identity(found)} | {k: v for k, v in options.items() if k != "overwrite"}
    try:
        return write_tensor_shards(read_arrays(paths), output, run=run, **options)
    except BadSample as error:
        raise ValueError(str(error)) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
            return {n: x if x.dtype.kind == "U" else torch.from_numpy(x) for n, x in found.items()}
    except (SafetensorError, zipfile.BadZipFile, ValueError, TypeError, EOFError) as error:
        raise ValueError(
            f"{path}: must be .npz or .safetensors of plain numbers, got {error}; save it anew"
        ) from error
    except AttributeError as error:  # np.load gave one array, not a file of names
        raise ValueError(
            f"{path}: must be .npz or .safetensors, got one array without a name; np.savez it"
        ) from error
