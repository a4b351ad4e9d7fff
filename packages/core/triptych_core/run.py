"""The run folder: what was asked for, on what, and when it was done."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from triptych_core.checkpoint.saver import Resumed
from triptych_core.code import package_versions
from triptych_core.config import StageConfig, dump_config
from triptych_core.launch import Runtime
from triptych_core.lines import keep_steps_until, write_whole
from triptych_core.report.page import write_report
from triptych_core.secrets import masked_tree, masked_words

_PACKAGES = ("triptych-core", "torch", "deepspeed", "transformers", "flash-attn-4", "triton")


def open_run(
    config: StageConfig, runtime: Runtime, facts: dict[str, Any], resumed: Resumed
) -> None:
    """Make the run folder and write `config.yaml` and `run.json`; only the main rank writes.

    `run.json` keeps, under `resumes`, each time the run has gone on and what had changed.

    Args:
        config: the resolved tree.
        runtime: this job.
        facts: what the stage knows of the run, e.g. parameters by part.
        resumed: where it goes on; later evaluations are forgotten.
    """
    if not runtime.is_main:
        return
    config.run.dir.mkdir(parents=True, exist_ok=True)
    keep_steps_until(config.run.dir / "evaluation.jsonl", resumed.step)
    (config.run.dir / "config.yaml").write_text(dump_config(config))
    path = config.run.dir / "run.json"
    resumes = _resumes(path, resumed)
    _write(
        path,
        {
            "started": _now(),
            "finished": None,
            "command": _command(),
            "world_size": runtime.world_size,
            "device": device_name(),
            "versions": {"python": platform.python_version(), **package_versions(_PACKAGES)},
            **facts,
            **({"resumes": resumes} if resumes else {}),
        },
    )


def describe_run(
    config: StageConfig, runtime: Runtime, facts: dict[str, Any], start_step: int
) -> str:
    """Lines that say what is about to run, and from where it goes on."""
    engine = config.engine
    parts = ", ".join(f"{name} {_short(count)}" for name, count in facts["parameters"].items())
    data = ", ".join(f"{count:,} {name}" for name, count in facts["data"].items())
    chosen = f"\nchosen by the plan: {facts['chosen']}" if facts.get("chosen") else ""
    frozen = f"\nfrozen: {facts['frozen']}" if facts.get("frozen") else ""
    # On a CPU there is nothing to choose from.
    kernels = facts.get("kernels", {}) if get_accelerator().device_name() == "cuda" else {}
    ops = "\nkernels: " + ", ".join(map(" ".join, kernels.items())) if kernels else ""
    goes_on = f"; goes on after step {start_step}" if start_step else ""
    n = config.parallel.ranks_per_row
    packs = runtime.world_size // n * engine.gradient_accumulation_steps
    shared = f", {n} ranks a pack" if n > 1 else ""
    return (
        f"{runtime.world_size} × {device_name()}, ZeRO-{engine.zero.stage}, {engine.precision}, "
        f"{config.run.steps} steps of {packs} packs{shared}{goes_on}\n"
        f"parameters: {parts}; data: {data}{frozen}{ops}{chosen}"
    )


def close_run(config: StageConfig, runtime: Runtime) -> None:
    """Note in `run.json` when the run was complete, and write its report."""
    if runtime.is_main:
        path = config.run.dir / "run.json"
        _write(path, json.loads(path.read_text()) | {"finished": _now()})
        write_report(config.run.dir)


def device_name() -> str:
    """The accelerator's product name, or the processor's architecture on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    return f"{accelerator.device_name()} ({platform.machine()})"


def _resumes(path: Path, resumed: Resumed) -> list[dict[str, Any]]:
    """All of a run; none of one that begins anew in the folder."""
    if resumed.record is None:
        return []
    earlier = json.loads(path.read_text()).get("resumes", []) if path.exists() else []
    return [*earlier, resumed.record]


def _short(count: int) -> str:
    """1,234,567 as 1.23M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def _command() -> str:
    """What was typed, but for what the launcher added and secrets, with paths as seen from here."""
    words = [word for word in sys.argv if not word.startswith("--local_rank")]
    return " ".join(masked_words(words)).replace(f"{Path.cwd()}/", "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, json.dumps(masked_tree(value), indent=2) + "\n")
