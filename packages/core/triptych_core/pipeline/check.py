"""Every stage's configuration is checked before the first step runs."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from triptych_core.pipeline.plan import Plan, Step


def check_stages(plan: Plan) -> None:
    """Ask every stage to print its resolved configuration, which it checks before.

    What earlier steps will make need not be there: a stage looks for files when it runs.

    Raises:
        ValueError: one line per mistake of any stage, with the step's name before the key.
    """
    stages = [step for step in plan.steps.values() if step.is_stage]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        mistakes = [
            line for lines in pool.map(lambda s: _mistakes(plan, s), stages) for line in lines
        ]
    if mistakes:
        raise ValueError("\n".join(mistakes))


def _mistakes(plan: Plan, step: Step) -> list[str]:
    result = subprocess.run(
        [sys.executable, *step.words, "--print-config"],
        capture_output=True,
        text=True,
        cwd=plan.root,
        check=False,
    )
    if result.returncode == 0:
        return []
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return [f"{step.name}.{line}" for line in said or lines[-1:]]
