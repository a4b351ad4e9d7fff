"""A tiny real Qwen3-VL folder and real samples for tests that run the whole engine."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "stages/configs/qwen3_vl_tiny"


def make_model_dir(path: Path, *, tied: bool = True) -> Path:
    """The shipped tiny folder with its widths cut down until a step takes milliseconds."""
    shutil.copytree(SHIPPED, path)
    config = json.loads((path / "config.json").read_text())
    config["tie_word_embeddings"] = tied
    config["text_config"] |= {
        "tie_word_embeddings": tied,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config["vision_config"] |= {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 48,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def make_chats(path: Path, count: int, seed: int = 0) -> Path:
    """A JSONL of ragged chats: no image, one or two of several sizes, short and long answers."""
    path.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        content: list[dict] = [{"type": "text", "text": "What is it? " * (1 + number % 4)}]
        for picture in range(number % 3):
            name = f"{number}-{picture}.png"
            width, height = (int(x) for x in generator.integers(30, 90, size=2))
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / name)
            content.insert(picture, {"type": "image", "image": name})
        answer = " ".join(str(n) for n in range(1 + number % 5))
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": messages, "question": f"kind {number % 2}"}))
    (path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return path / "chats.jsonl"


def make_shards(path: Path, count: int, seed: int = 0) -> Path:
    """Shards of `make_chats`."""
    from triptych_data.shards.write import write_shards

    write_shards(make_chats(path / "raw", count, seed), path / "shards", samples_per_shard=7)
    return path / "shards"


def sft_stage() -> ModuleType:
    """`stages/sft.py`, imported as a script of that folder sees its neighbours."""
    sys.path.insert(0, str(ROOT / "stages"))
    import sft

    return sft


def whole_gradients(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter's gradient over all ranks, whole, whatever the engine has cut up."""
    from deepspeed.utils import safe_get_full_grad

    light = engine.gradients() if is_light(engine) else None
    whole = safe_get_full_grad if light is None else light.get
    return {name: of_all_holders(p, whole(p).clone()) for name, p in trained(engine)}


def whole_masters(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter's fp32 master, whole but for tensor parallelism."""
    from deepspeed.utils import safe_get_full_fp32_param

    light = engine.masters() if is_light(engine) else None
    whole = safe_get_full_fp32_param if light is None else light.get
    return {name: of_all_holders(p, whole(p).detach().clone()) for name, p in trained(engine)}


def whole_states(engine: Any, key: str) -> dict[str, torch.Tensor]:
    """A state of the optimizer by the parameters that have it, whole."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if is_light(engine):
        light = engine.states(key)
        return {name: light[p].clone() for name, p in trained(engine) if p in light}
    found = {}
    for name, p in trained(engine):
        with suppress(KeyError):  # on every rank, before anything crosses them
            found[name] = safe_get_full_optimizer_state(p, key).clone()
    return found


def is_light(engine: Any) -> bool:
    """Whether the engine is our own, not DeepSpeed's."""
    from triptych_core.engine.light import LightEngine

    return isinstance(engine, LightEngine)


def trained(engine: Any) -> list[tuple[str, Any]]:
    """Parameters that train, by name."""
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def of_all_holders(parameter: Any, gradient: torch.Tensor) -> torch.Tensor:
    """Of stacked experts that ranks have divided, the whole stack, of values as of gradients."""
    if not hasattr(parameter, "expert_groups"):
        return gradient
    holders = parameter.expert_groups[1]
    parts = [torch.empty_like(gradient) for _ in range(torch.distributed.get_world_size(holders))]
    torch.distributed.all_gather(parts, gradient, group=holders)
    return torch.cat(parts)


def storages(tensors: Any, but: dict[int, int] | None = None) -> dict[int, int]:
    """Bytes of all storages that tensors lie in, each once, by where it is."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {s.data_ptr(): s.nbytes() for s in found if s.data_ptr() not in (but or {})}
