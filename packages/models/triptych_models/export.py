"""Write a model as a Hugging Face directory that stock transformers loads."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .catalogue import THINKER_OF
from .expert_weights import router_biases, tensors_to_store
from .layout import stored_name, stored_prefixes
from .lora import adapted_layers, adapter_parameters, merged_weight
from .weights import Gather, own_parameters, whole

VIDEO_FILE = "video_preprocessor_config.json"
COPIED = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    VIDEO_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def export(
    hf: nn.Module,
    out_dir: Path,
    source_dir: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    gather: Gather = whole,
    is_main: bool = True,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write config, tokenizer and processor files of source_dir with hf's weights.

    Every rank must call it, since gather is collective; only is_main writes. Written beside
    out_dir and renamed, so out_dir is complete or absent. At most one shard is in memory. notes are
    further text files by name. Raises ValueError if out_dir exists, unless overwrite says to
    replace it.
    """
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    if is_main:
        if out_dir.exists() and not overwrite:
            raise ValueError(f"export: directory must not exist, got {out_dir}; name a new one")
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was cut off
        partial.mkdir(parents=True)
        copy_configs(source_dir, partial, dtype)
        for name, text in (notes or {}).items():
            (partial / name).write_text(text)
    writer = ShardWriter(partial, max_shard_bytes) if is_main else None
    for name, tensor in stored_tensors(hf, gather):
        if writer is not None:
            writer.add(name, tensor.to("cpu", dtype, copy=True))
    if writer is not None:
        for name, bias in router_biases(hf).items():  # in fp32, as stock keeps them
            writer.add(name, bias.to("cpu", copy=True))
        writer.finish()
        if out_dir.exists():
            shutil.rmtree(out_dir)
        partial.rename(out_dir)


def stored_tensors(hf: Any, gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """All tensors under the names of a directory, whole until the next is asked for.

    Adapters are merged into the weights they are beside, in fp32; into those that four bits stand
    for, where they are kept so.
    """
    adapted = {id(layer.base_layer): layer for _, layer in adapted_layers(hf)}
    prefixes = stored_prefixes(hf.config, ())
    adapters = {id(p) for layer in adapted.values() for p in adapter_parameters(layer).values()}
    for module, own in own_parameters(hf):
        if any(id(parameter) in adapters for parameter in own.values()):
            continue
        layer = adapted.get(id(module))
        beside = [] if layer is None else list(adapter_parameters(layer).values())
        with gather([*own.values(), *beside]):
            for name, tensor in tensors_to_store(module, own):
                if layer is not None and name.endswith((".weight", ".packed")):
                    name, tensor = name.replace(".packed", ".weight"), merged_weight(layer)
                yield stored_name(name.replace(".base_layer.", "."), prefixes), tensor


def copy_configs(source_dir: Path, out_dir: Path, dtype: torch.dtype) -> None:
    """Copy the small files, with dtype noted in config.json so that loading keeps it."""
    config = json.loads((source_dir / "config.json").read_text())
    thinker = THINKER_OF.get(config.get("model_type"))
    if thinker is not None:  # of the whole, only this part is written
        config = config["thinker_config"] | {"model_type": thinker}
    name = str(dtype).removeprefix("torch.")
    towers = [config[name] for name in ("vision_config", "audio_config") if name in config]
    for section in (config, config.get("text_config", {}), *towers):
        section.pop("torch_dtype", None)  # the name before transformers 5
        section["dtype"] = name
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if thinker is not None:  # the whole's model_type names its processor for videos, this one none
        images = json.loads((source_dir / "preprocessor_config.json").read_text())
        videos = images | {"video_processor_type": "Qwen2VLVideoProcessor"}
        (out_dir / VIDEO_FILE).write_text(json.dumps(videos, indent=2) + "\n")
    for file in COPIED:
        if (source_dir / file).is_file():
            shutil.copyfile(source_dir / file, out_dir / file)


class ShardWriter:
    """Collects tensors and writes a safetensors file whenever one is full."""

    def __init__(self, directory: Path, max_bytes: int, name: str = "model") -> None:
        self.name = name  # of the files, before their numbers
        self.directory = directory
        self.max_bytes = max_bytes
        self.pending: dict[str, Tensor] = {}
        self.written: list[dict[str, int]] = []  # bytes of each tensor, per file

    def add(self, name: str, tensor: Tensor) -> None:
        held = sum(x.nbytes for x in self.pending.values())
        if self.pending and held + tensor.nbytes > self.max_bytes:
            self._write()
        self.pending[name] = tensor.contiguous()

    def finish(self) -> None:
        """Write the rest, then give the files the names of a Hugging Face checkpoint."""
        self._write()
        count = len(self.written)
        if count == 1:
            self._file(0).rename(self.directory / f"{self.name}.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, sizes in enumerate(self.written):
            name = f"{self.name}-{number + 1:05d}-of-{count:05d}.safetensors"
            self._file(number).rename(self.directory / name)
            weight_map |= dict.fromkeys(sizes, name)
        total = sum(size for sizes in self.written for size in sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (self.directory / f"{self.name}.safetensors.index.json").write_text(text)

    def _write(self) -> None:
        # transformers refuses files without this metadata
        save_file(self.pending, self._file(len(self.written)), metadata={"format": "pt"})
        self.written.append({name: x.nbytes for name, x in self.pending.items()})
        self.pending = {}

    def _file(self, number: int) -> Path:
        return self.directory / f"shard-{number}.safetensors"
