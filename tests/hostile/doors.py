"""The doors through which files of others come in: each takes a path and a folder to write in.

A door returns None if it took the file, what it said if it refused with an exit code, or raises.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# All that a door imports, before a child is forked.
import av  # noqa: F401
import pyarrow.ipc
import pyarrow.parquet  # noqa: F401
import torch
import torch.distributed as dist
import transformers.models.qwen2.tokenization_qwen2
import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: F401
from torch import nn

from tests.tiny import ROOT, sft_stage
from triptych_core.averaging import greedy, job, plan, request, universal, verify  # noqa: F401
from triptych_core.checkpoint.folders import checkpoints
from triptych_core.checkpoint.load import load_checkpoint, newest_whole
from triptych_core.config import StageConfig, parse_args
from triptych_core.engine.build import build_engine
from triptych_core.optim.groups import build_optimizer, parameter_groups
from triptych_core.report.page import write_report
from triptych_data.cli.main import main as triptych_data
from triptych_data.look import preview, survey  # noqa: F401
from triptych_data.media import video  # noqa: F401
from triptych_data.processor import Processor
from triptych_data.sample import RawSample
from triptych_data.shards import intake, mapping, reshard, scan, write  # noqa: F401
from triptych_data.shards.reader import Shards
from triptych_models.config import ModelConfig
from triptych_models.families import build_model

sys.path.insert(0, str(ROOT / "tools"))
import average_checkpoints

MODEL = ROOT / "stages/configs/qwen3_vl_tiny"
CHAT = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
}


def shard(path: Path, folder: Path) -> str | None:
    return _cli("shard", path, folder / "out", "--workers", "1")


def image_shard(path: Path, folder: Path) -> str | None:
    return _shard_of("image", path, folder)


def video_shard(path: Path, folder: Path) -> str | None:
    return _shard_of("video", path, folder)


def audio_shard(path: Path, folder: Path) -> str | None:
    return _shard_of("audio", path, folder)


def index(path: Path, folder: Path) -> str | None:
    """Of a link to the tar, as the index is written beside it."""
    tar = folder / path.name
    tar.symlink_to(path)
    return _cli("index", tar, "--workers", "1")


def verify_shards(path: Path, folder: Path) -> str | None:
    return _cli("verify", path, "--workers", "1")


def read(path: Path, folder: Path) -> None:
    """All samples, as a trainer's workers read them."""
    for sample in Shards.open([path]):
        assert sample.json


def show(path: Path, folder: Path) -> str | None:
    """The page of `triptych-data preview`; nothing of the samples may be markup in it."""
    refusal = _cli("preview", path, "--model", MODEL, "-o", folder / "page.html")
    return refusal or _markup(folder / "page.html")


def processor(path: Path, folder: Path) -> None:
    """A model folder's tokenizer, template and media rules, and a chat through them."""
    Processor.from_directory(path).encode(RawSample("key", "a.tar: sample key", CHAT, []))


def image(path: Path, folder: Path) -> None:
    """A picture as a trainer's worker decodes it, where a shard was made without looking at it."""
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "index": 0}]},
            CHAT["messages"][1],
        ]
    }
    Processor.from_directory(MODEL).encode(
        RawSample("key", f"{path}: sample key", record, [path.read_bytes()])
    )


def model(path: Path, folder: Path) -> None:
    """A model folder's configuration and weights."""
    build_model(ModelConfig(path=path), dtype=torch.float32)


def average(path: Path, folder: Path) -> str | None:
    """`tools/average_checkpoints.py` over an input and a copy of it."""
    words = [str(path), str(path.with_name("other")), "--output", str(folder / "out")]
    sys.argv = ["average_checkpoints.py", *words, "--threads", "1"]
    return _command(average_checkpoints.main)


def config(path: Path, folder: Path) -> str | None:
    """A stage's --config; what it must have beside is given, so that the file alone is at fault."""
    settings = [f"model.path={MODEL}", "data.shards=[shards]", "data.seq_len=128"]
    return _command(lambda: parse_args(sft_stage().SftConfig, ["--config", str(path), *settings]))


def resume(path: Path, folder: Path) -> None:
    """A run's folder, whose newest checkpoint is gone on from."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    settings = StageConfig(run={"dir": path, "steps": 100, "device": "cpu"})
    settings.engine.zero.stage = 0
    engine = _engine(settings)
    load_checkpoint(engine, settings, newest_whole(checkpoints(path)))


def report(path: Path, folder: Path) -> None:
    """The page of a run's folder; nothing of its files may be markup in it."""
    _markup(write_report(shutil.copytree(path, folder / "run")))


DOORS: dict[str, Callable[[Path, Path], str | None]] = {
    "shard": shard,
    "image_shard": image_shard,
    "video_shard": video_shard,
    "audio_shard": audio_shard,
    "index": index,
    "verify": verify_shards,
    "read": read,
    "preview": show,
    "processor": processor,
    "image": image,
    "model": model,
    "average": average,
    "config": config,
    "resume": resume,
    "report": report,
}


class Small(nn.Module):
    """What the checkpoints of the corpus are of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)


def _engine(settings: StageConfig) -> Any:
    module = Small()
    groups = parameter_groups(module.named_parameters(), settings.optim, lambda name: "all", {})
    optimizer = build_optimizer(groups, settings.optim)
    return build_engine(module, optimizer, settings.engine, settings.optim, 1)


def _shard_of(kind: str, path: Path, folder: Path) -> str | None:
    """`triptych-data shard` of a chat with that medium."""
    content = [{"type": kind, kind: str(path)}, {"type": "text", "text": "What is it?"}]
    record = {"messages": [{"role": "user", "content": content}, CHAT["messages"][1]]}
    chats = folder / "chats.jsonl"
    chats.write_text(json.dumps(record))
    return _cli("shard", chats, folder / "out", "--workers", "1", "--media-root", path.parent)


def _cli(*words: Any) -> str | None:
    return _command(lambda: triptych_data([str(word) for word in words]))


def _command(call: Callable[[], Any]) -> str | None:
    """What a command says on standard error if its exit code is that of a refusal."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            call()
        except SystemExit as end:
            if end.code:
                return f"{said.getvalue()}{out.getvalue()}".strip() or f"exit code {end.code}"
    return None


def _markup(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<img src=x" not in text and "<script>TRIPTYCH" not in text, "markup of a sample"
