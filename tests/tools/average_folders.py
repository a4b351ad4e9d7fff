"""Tiny model folders to average, and averages of them without a process of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from triptych_core.averaging.direct import Landing
from triptych_core.averaging.job import prepare, run
from triptych_core.averaging.request import Request, make_job
from triptych_core.averaging.stored import Reader, Source

CONFIG = {"model_type": "qwen3", "hidden_size": 8, "dtype": "bfloat16"}
VOCABULARY = {"a": 0, "b": 1, "c": 2}
# Odd sizes, a scalar, nothing, and more than one block; a dtype each where a test does not say.
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed.weight": (301, 513),
    "model.layers.0.mlp.weight": (17, 9),
    "model.layers.0.norm.weight": (33,),
    "model.scale": (),
    "model.none": (0, 4),
}


def weights(seed: int, dtype: torch.dtype, near: Mapping[str, Tensor] | None = None) -> Any:
    """Random tensors of SHAPES; small steps from others if there are."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if near is not None:
        drawn = {name: near[name].float() + 0.1 * value for name, value in drawn.items()}
    return {name: value.to(dtype) for name, value in drawn.items()}


def write_folder(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] = CONFIG,
    vocabulary: Mapping[str, int] = VOCABULARY,
) -> Path:
    """A Hugging Face directory with a tokenizer of three words."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": []}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "c"}))
    save_file(dict(tensors), path / "model.safetensors", {"format": "pt"})
    return path


def average(output: Path, *inputs: Path, **options: Any) -> dict[str, Tensor]:
    """The tensors of an average; options are those of a Request.

    The bound on memory is for a process with nothing else in it, which one of tests is not.
    """
    job = make_job(Request(tuple(inputs), output, **{"max_memory": 8 << 30, **options}))
    plan, notes = prepare(job)
    run(job, plan, notes)
    return read_weights(output)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the library's own reader."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def read(source: Source) -> dict[str, Tensor]:
    """All of an input, as it would be averaged."""
    with Reader() as reader:
        reader.open([source])
        return {
            name: reader.read(stored, 0, stored.size, Landing(stored.num_bytes))
            .clone()
            .reshape(stored.shape)
            for name, stored in source.tensors.items()
        }


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
