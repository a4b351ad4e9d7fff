"""What a run's folder knows of a step: why it was left out, its loss, and its packs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from triptych_core.faults.loss_guard import SKIPPED
from triptych_core.lines import read_lines


class Recorded(NamedTuple):
    """A step on record.

    rows: ranks that took packs of their own. packs: of the step over all of them. position: in the
    data, None where only the plan can tell. keys: of all samples, None where none are on record.
    """

    step: int
    why: str | None
    loss: float | None
    grad_norm: float | None
    rows: int
    packs: int
    position: int | None
    keys: list[str] | None


def read_step(run_dir: Path, step: int | str) -> Recorded:
    """What the run's folder has of a step, or of the `last` that was left out.

    Raises:
        ValueError: there was no run, or it left out no step.
    """
    skipped = {line["step"]: line for line in read_lines(run_dir / SKIPPED)}
    if step == "last" and not skipped:
        raise ValueError(
            f"replay.step: must be named where no step was left out, got last with none in "
            f"{run_dir / SKIPPED}; e.g. --replay 12"
        )
    wanted = max(skipped) if step == "last" else int(step)
    line = skipped.get(wanted, {})
    steps = {one["step"]: one for one in read_lines(run_dir / "metrics.jsonl")}
    figures = steps.get(wanted, {})
    rows, packs = _layout(run_dir, line.get("packs"))
    places = [pack["position"] for pack in line.get("packs", ())]
    return Recorded(
        wanted,
        line.get("why"),
        figures.get("loss"),
        figures.get("grad_norm"),
        rows,
        packs,
        min((p for p in places if p is not None), default=None),
        sorted({k for pack in line["packs"] for k in pack["keys"]}) if line else None,
    )


def _layout(run_dir: Path, noted: list[dict[str, Any]] | None) -> tuple[int, int]:
    """Ranks with packs of their own, packs of a step: as noted, or as the run was last begun."""
    facts, settings = run_dir / "run.json", run_dir / "config.yaml"
    if not facts.is_file() or not settings.is_file():
        raise ValueError(
            f"run.dir: must be the folder of a run, got {run_dir} without run.json; name the run "
            "whose step is meant"
        )
    tree = yaml.safe_load(settings.read_text())
    ranks = int(json.loads(facts.read_text())["world_size"])
    packs = ranks * int(tree["engine"]["gradient_accumulation_steps"])
    if noted:  # every rank notes the packs it was given, also those it shares with others
        ranks, packs = len({pack["rank"] for pack in noted}), len(noted)
    shared = int(tree["parallel"]["sequence"]) * int(tree["parallel"]["tensor"])
    return ranks // shared, packs // shared
