"""A check and its outcome, and those that need only an engine and the loop."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from deepspeed.accelerator import get_accelerator

from triptych_core.checkpoint.manifest import read_manifest
from triptych_core.config import StageConfig
from triptych_core.lines import read_lines

Status = Literal["pass", "fail", "skipped"]
REHEARSED, SAVED = 6, 3  # steps of the rehearsal, and after which of them it is cut

# Rounding: of the same sums in another order, in units of what is compared.
ROUNDING = {"fp32": 1e-4, "bf16": 3e-2}

Stage = TypeVar("Stage", bound=StageConfig)


@dataclass
class Check:
    """What was looked at and what was found.

    figures: lines of a table below it, each a name and a value.
    """

    name: str
    status: Status
    found: str
    figures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0


def timed(function: Callable[[], Check]) -> Check:
    """A check with the time it took."""
    began = time.perf_counter()
    check = function()
    check.seconds = time.perf_counter() - began
    return check


def judged(name: str, error: float, limit: float, what: str, **more: Any) -> Check:
    """A check that passes if an error is at most its limit; NaN fails."""
    status: Status = "pass" if error <= limit else "fail"
    return Check(name, status, f"{what} {error:.1e}, at most {limit:.0e}", **more)


def short_run(config: Stage, folder: Path, **engine: Any) -> Stage:
    """The same run for a few steps in a folder of its own, at a constant rate, with nothing else.

    `engine` replaces settings of `config.engine`.
    """
    return config.model_copy(
        deep=True,
        update={
            "run": config.run.model_copy(update={"dir": folder, "steps": REHEARSED}),
            "engine": config.engine.model_copy(update=engine),
            "schedule": config.schedule.model_copy(
                update={"kind": "constant", "warmup_steps": 0, "decay_steps": 0}
            ),
            "checkpoint": config.checkpoint.model_copy(
                update={"save": True, "every": SAVED, "keep": 2, "resume": "auto"}
            ),
            "log": config.log.model_copy(update={"progress": False, "wandb": "off", "every": 1000}),
        },
    )


def compare_rehearsals(whole: Path, cut: Path) -> Check:
    """Steps that were taken after a resume against the same of a run that went through.

    Both are run folders. On a CPU every bit must be equal; elsewhere the kernels' sums may have
    no fixed order, and losses must agree within 1e-3.
    """
    name = f"A run cut after step {SAVED} repeats steps {SAVED + 1} to {REHEARSED}"
    before, after = (steps(folder)[SAVED:] for folder in (whole, cut))
    keys = ("loss", "grad_norm", "num_targets", "lr")
    table = [
        (f"step {a['step']}", f"loss {a['loss']!r} and {b['loss']!r}")
        for a, b in zip(before, after, strict=True)
    ]
    differing = differing_files(whole, cut)
    table.append(("files of the last checkpoint that differ", ", ".join(differing) or "none"))
    lines_equal = [[a[k] for k in keys] for a in before] == [[b[k] for k in keys] for b in after]
    if lines_equal and not differing:
        return Check(name, "pass", "bit-equal: losses, norms, weights, moments, generators", table)
    if get_accelerator().device_name() == "cpu":
        what = "other losses" if not lines_equal else "other weights, moments or generators"
        return Check(name, "fail", f"{what} after the resume", table)
    pairs = ((a[k], b[k]) for a, b in zip(before, after, strict=True) for k in keys)
    error = largest(abs(a - b) / max(abs(a), 1e-30) for a, b in pairs)
    return judged(name, error, 1e-3, "not bit-equal on this device; off by", figures=table)


def compare_layouts(divided: Path, together: Path, precision: str) -> Check:
    """The first step of the ranks against that of ranks that each computed all its rows."""
    ours, theirs = steps(divided)[0], steps(together)[0]
    errors = {
        key: abs(ours[key] - theirs[key]) / max(abs(theirs[key]), 1e-30)
        for key in ("loss", "grad_norm")
    }
    table = [(key, f"{ours[key]:.7g} and {theirs[key]:.7g}") for key in errors]
    return judged(
        "The ranks together take the step of one rank",
        largest(errors.values()),
        ROUNDING[precision],
        "loss and gradient norm off by",
        figures=table,
    )


def steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics that are steps."""
    return [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


def differing_files(whole: Path, cut: Path) -> list[str]:
    """Payloads and generators of the last checkpoints whose SHA-256 differ."""
    name = f"checkpoints/step-{REHEARSED:06d}"
    ours, theirs = (read_manifest(folder / name) for folder in (whole, cut))
    files = [file for file in ours | theirs if file != "state.json"]
    return [file for file in files if ours.get(file) != theirs.get(file)]


def cut_run(whole: Path, cut: Path) -> None:
    """Copy a run's folder as a kill after step SAVED would have left it."""
    cut.mkdir(parents=True)
    shutil.copytree(whole / f"checkpoints/step-{SAVED:06d}", cut / f"checkpoints/step-{SAVED:06d}")
    shutil.copy(whole / "metrics.jsonl", cut)


def largest(errors: Any) -> float:
    """The largest, or NaN if there is one."""
    return float(torch.tensor([0.0, *errors], dtype=torch.float64).max())


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over that of what is wanted."""
    difference = (found.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm().clamp(min=1e-30))


def as_table(checks: Sequence[Check]) -> Iterator[str]:
    """Lines for the console."""
    for check in checks:
        mark = {"pass": "PASS", "fail": "FAIL", "skipped": "skip"}[check.status]
        yield f"{mark}  {check.name}: {check.found}  ({check.seconds:.1f} s)"
        if check.status == "fail":
            yield from (f"        {name}: {value}" for name, value in check.figures)


def say(lines: Sequence[str]) -> None:
    """Print on this rank."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def dump(checks: Sequence[Check]) -> str:
    """As JSON, for other programs."""
    return json.dumps([vars(check) for check in checks], indent=2) + "\n"
