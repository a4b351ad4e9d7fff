"""An average from its inputs to a whole folder with its averaging.json."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from triptych_core.averaging.agree import check_agreement
from triptych_core.averaging.average import Progress, write_shards
from triptych_core.averaging.carried import compare_small_files, small_files
from triptych_core.averaging.layout import index_of
from triptych_core.averaging.plan import Plan, describe_inputs, make_plan, plan_memory
from triptych_core.averaging.recipe import Recipe
from triptych_core.averaging.stored import Source
from triptych_core.averaging.unfinished import Unfinished, check_disk, check_output
from triptych_core.code import package_versions

FACTS = "averaging.json"


@dataclass(frozen=True)
class Job:
    """What a user asks for.

    Args:
        sources: the inputs, the base first where the recipe has one.
        recipe: what is computed.
        output: a folder that does not exist.
        like: whose config, tokenizer and processor are taken; the first input's if None.
        max_memory: bytes of this process at most, Python and torch among them.
        max_shard_bytes: of tensors in a file of the output.
        threads: at most.
        whole_digests: SHA-256 of the whole inputs in averaging.json.
        words: how it was asked for, for averaging.json.
        trials: those of a greedy soup, for averaging.json.
    """

    sources: list[Source]
    recipe: Recipe
    output: Path
    like: Path | None = None
    max_memory: int = 1 << 30
    max_shard_bytes: int = 5 * 10**9
    threads: int = 4
    whole_digests: bool = False
    words: str = ""
    trials: tuple[dict[str, Any], ...] = ()


def prepare(job: Job) -> tuple[Plan, list[str]]:
    """Check that the inputs belong together; returns the plan and what differs without harm.

    Raises:
        ValueError: they do not, a pattern means nothing, or the output exists.
    """
    check_output(job.output)
    job.recipe.check_patterns(list(job.sources[0].tensors))
    check_agreement(job.sources, job.recipe)
    notes = compare_small_files(job.sources)
    return make_plan(job.sources, job.recipe, job.max_shard_bytes), notes


def run(
    job: Job,
    plan: Plan,
    notes: list[str],
    say: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Write the output, or what is left of it; returns what averaging.json says.

    Raises:
        ValueError: memory or disk do not suffice, or an input changes or is not finite.
        OSError: the disk fails.
    """
    began, started = time.monotonic(), datetime.now(UTC)
    print_of_plan = plan.fingerprint()
    memory = plan_memory(plan, job.max_memory, job.threads)
    with Unfinished(job.output, print_of_plan) as folder:
        left = sum(s.num_bytes for s in plan.shards if s.file not in folder.done)
        check_disk(job.output, left)
        if folder.done:
            say(f"goes on with {folder.path}: {len(folder.done)} of {len(plan.shards)} files there")
        write_shards(plan, memory, folder, progress)
        if plan.fingerprint() != print_of_plan:
            raise ValueError(
                f"{job.sources[0].path}: inputs must not change while they are averaged, got other "
                "sizes or times of files; average again when nothing writes them"
            )
        for name, data in small_files(job.sources[0], plan.shards, job.like).items():
            folder.write(name, data)
        if len(plan.shards) > 1:
            folder.write("model.safetensors.index.json", index_of(plan.shards))
        seconds = time.monotonic() - began
        facts = {
            "recipe": job.recipe.to_json(),
            "asked": job.words,
            "like": str(job.like.resolve()) if job.like else None,
            "inputs": describe_inputs(plan, job.whole_digests),
            "notes": notes,
            **({"trials": job.trials} if job.trials else {}),
            "output": {shard.file: {"bytes": shard.num_bytes} for shard in plan.shards},
            "max_shard_bytes": job.max_shard_bytes,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "bytes_read": plan.bytes_to_read,
            "bytes_written": plan.bytes_to_write,
            "threads": memory.threads,
            "peak_memory_bytes": peak_bytes(),
            "versions": package_versions(("triptych-core", "torch")),
            "revision": revision(),
        }
        folder.write(FACTS, (json.dumps(facts, indent=2) + "\n").encode())
        folder.put_in_place()
    return facts


def peak_bytes() -> int:
    """The most memory this process has had so far."""
    # Not getrusage, whose number a large parent hands down.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def revision() -> str | None:
    """The git commit of this code, if it lies in a repository."""
    git = shutil.which("git")
    if git is None:
        return None
    found = subprocess.run(
        [git, "-C", os.fspath(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None
