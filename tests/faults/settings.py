"""Every key of a stage's configuration, misspelt, of a wrong type, out of its range."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.outcome import Outcome
from tests.tiny import ROOT, sft_stage

SECONDS = 2.0  # of one core, within which a mistake is refused
NONSENSE = "{no: [such, thing]}"  # of no key's type
GOOD = ("model.path=somewhere", "data.shards=[somewhere]", "data.seq_len=256")
DRAWS = tuple(
    f"generation.data.{word}" for word in ("shards=[somewhere]", "text_field=txt", "batch_size=1")
)
"""What a section asks for that stands in few configurations."""


def mistakes(cls: type) -> Iterator[tuple[str, str]]:
    """Overrides that must be refused, each with the key that must be named."""
    from triptych_core.config import _walk_fields

    for key, field in _walk_fields(cls, ""):
        if "NAME" in key:
            continue
        head, _, last = key.rpartition(".")
        for wrong in (last + "x", last[1:] or "_", last[::-1] + "_"):
            dotted = f"{head}.{wrong}" if head else wrong
            yield f"{dotted}=1", dotted
        if not str(field.annotation).startswith("dict"):
            yield f"{key}={NONSENSE}", key
        for limit in field.metadata:
            low = getattr(limit, "ge", getattr(limit, "gt", None))
            high = getattr(limit, "le", getattr(limit, "lt", None))
            if low is not None:
                yield f"{key}={low - 1}", key
            if high is not None:
                yield f"{key}={high + 1}", key


def wrong_settings(folder: Path, short: bool) -> Outcome:
    """All in this process; every hundredth also as a user's command."""
    from triptych_core.config import load_config

    outcome, cls = Outcome(), sft_stage().SftConfig
    load_config(cls, None, (*GOOD, *DRAWS))
    for number, (word, key) in enumerate(mistakes(cls)):
        began = time.process_time()
        try:
            load_config(cls, None, (*_good(key), word))
            said = ""
        except ValueError as error:
            said = str(error)
        seconds = time.process_time() - began
        named = key in said or key.rpartition(".")[0] in said.split(":")[0]
        is_refused = bool(said) and "\n" not in said and named
        outcome.add(f"{word}: {said!r}", detected=is_refused, recovered=is_refused)
        outcome.named_after(seconds, SECONDS)
        if number % 100 == 0 and not (short and number):
            _as_a_command(outcome, word, key)
    return outcome


def _good(key: str) -> tuple[str, ...]:
    return (*GOOD, *DRAWS) if key.startswith("generation.") else GOOD


def _as_a_command(outcome: Outcome, word: str, key: str) -> None:
    command = [sys.executable, "-X", "importtime", "stages/sft.py", *_good(key), word]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done: Any = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    outcome.named_after(seconds, SECONDS)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    is_refused = done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    no_torch = "| torch\n" not in done.stderr
    outcome.add(f"{word}: {lines}", detected=is_refused, recovered=no_torch)
