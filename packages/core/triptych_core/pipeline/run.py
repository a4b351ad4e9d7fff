"""Run a recipe's steps one after the other: skip what is finished, go on with what was cut."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from triptych_core.config import did_you_mean
from triptych_core.pipeline.check import check_stages
from triptych_core.pipeline.contents import is_complete
from triptych_core.pipeline.plan import Plan, Step
from triptych_core.pipeline.process import interruptible, run_group
from triptych_core.pipeline.report import write_pipeline_report
from triptych_core.pipeline.state import (
    State,
    aside,
    changes,
    fingerprints,
    input_fingerprints,
    is_done,
    locked,
    missing_outputs,
)
from triptych_core.secrets import masked_tree, masked_words

Say = Callable[[str], None]


class StepFailed(Exception):
    """A step ended with another exit code than 0, or without what it should make."""


def run_recipe(
    plan: Plan, words: Sequence[str], say: Say, *, only: str | None, again_from: str | None
) -> None:
    """Run what is not finished, in order; `state.json` and `report.html` are written after each.

    Args:
        plan: the recipe, settled.
        words: arguments and overrides that it was settled with, kept for `triptych status`.
        say: is told, line by line, what is skipped, begun and done.
        only: the one step to run.
        again_from: a step that is done again, with all that start from it (with `only`, alone);
            their folders are set aside.

    Raises:
        ValueError: a mistake of the user's, among them a finished step that has changed since.
        StepFailed: a step did not succeed.
        Interrupted: a signal; the step has ended.
    """
    for name in (only, again_from):
        if name is not None and name not in plan.steps:
            raise ValueError(f"{name}: must be a step{did_you_mean(name, list(plan.steps))}")
    with interruptible():
        check_stages(plan)
        with locked(plan) as lock:
            state = State(plan)
            state.begin(words)
            if again_from is not None:
                _set_aside(plan, state, again_from, say, with_rest=only is None)
            for step in plan.steps.values():
                if only in (None, step.name):
                    _run_step(plan, step, state, say, lock)
                    write_pipeline_report(plan, state)


def standing(plan: Plan, step: Step, state: State) -> tuple[str, list[str]]:
    """done, changed (with how), cut, or waiting."""
    record = state.records.get(step.name)
    if record is None:
        return "waiting", []
    finished = is_done(plan, step, record)
    if found := changes(step, record, is_finished=finished):
        return "changed", found
    return ("done" if finished else "cut"), []


def _set_aside(plan: Plan, state: State, name: str, say: Say, with_rest: bool) -> None:
    for each in plan.after(name) if with_rest else [name]:
        place = aside(plan, each)
        state.forget(each)
        if place is not None:
            say(f"{each}: set aside in {place}")


def _run_step(plan: Plan, step: Step, state: State, say: Say, lock: int) -> None:
    what, lines = standing(plan, step, state)
    if what == "changed":
        told = "\n".join(f"{step.name}: {line}" for line in lines)
        raise ValueError(
            f"{told}\nundo the change, or do {step.name} and what starts from it again with "
            f"--from {step.name}"
        )
    if what == "done":
        say(f"{step.name}: done, {_seconds(state, step):,.0f} s")
        return
    _check_inputs(step)
    if not step.is_stage:
        step.folder.mkdir(parents=True, exist_ok=True)
        _clear_outputs(step)
    command = command_of(plan, step)
    say(f"{step.name}: {'goes on' if what == 'cut' else 'begins'}\n$ {told_command(plan, command)}")
    record = state.records.get(step.name, {})
    if what == "waiting":
        state.note(step.name, began=_now(), inputs=input_fingerprints(step), seconds=0.0)
    state.note(
        step.name,
        status="running",
        given=masked_tree(step.given),
        command=masked_words(command),
        attempts=record.get("attempts", 0) + 1,
    )
    began, busy, code = time.monotonic(), _processor_seconds(), None
    try:
        code = run_group(
            command,
            cwd=plan.root,
            log=plan.dir / "logs" / f"{step.name}.log",
            environment=_environment(step, plan),
            inherited=[lock],
        )
    finally:
        seconds = _seconds(state, step) + time.monotonic() - began
        processor = record.get("processor_seconds", 0.0) + _processor_seconds() - busy
        status = {0: "ran", None: "stopped"}.get(code, "failed")
        took = {"seconds": round(seconds, 1), "processor_seconds": round(processor, 1)}
        state.note(step.name, status=status, exit_code=code, **took)
    _close_step(plan, step, state, code)
    say(f"{step.name}: done, {_seconds(state, step):,.0f} s")


def _close_step(plan: Plan, step: Step, state: State, code: int) -> None:
    """Note that it is done, if it is."""
    log = plan.dir / "logs" / f"{step.name}.log"
    if code != 0:
        raise StepFailed(f"{step.name}: must end with exit code 0, got {code}; see {log}")
    if lacking := missing_outputs(plan, step):
        paths = ", ".join(str(step.outputs[name].path) for name in lacking)
        state.note(step.name, status="failed")
        raise StepFailed(f"{step.name}: must leave {paths} whole, got none; see {log}")
    state.note(step.name, status="done", ended=_now(), outputs=fingerprints(plan, step))


def _check_inputs(step: Step) -> None:
    for name, path in step.inputs.items():
        if not path.exists():
            raise ValueError(
                f"{step.name}: {name} must be there, got no {path}; run the steps before it"
            )


def _clear_outputs(step: Step) -> None:
    """Tools refuse an output that is there: one that is whole was made by a run that was killed
    before it could say so. What is half there is left to the tool, which may go on.
    """
    for output in step.outputs.values():
        if not is_complete(output.kind, output.path):
            continue
        if output.path.is_dir():
            shutil.rmtree(output.path)
        else:
            output.path.unlink()


def command_of(plan: Plan, step: Step) -> list[str]:
    """The words to run: a launcher before a stage, torchrun or python before a script."""
    first, *rest = step.words
    if step.is_stage:
        ranks = str(step.ranks or _count_gpus() or 1)
        launcher = [word.replace("{ranks}", ranks) for word in plan.launcher]
        launcher = launcher or ["deepspeed", f"--num_gpus={ranks}", f"--master_port={_free_port()}"]
        return [*launcher, first, *rest]
    if not first.endswith(".py"):
        return step.words
    if step.ranks and step.ranks > 1:
        ours = [f"--nproc-per-node={step.ranks}", f"--master-port={_free_port()}"]
        return [sys.executable, "-m", "torch.distributed.run", *ours, *step.words]
    return [sys.executable, *step.words]


def told_command(plan: Plan, command: list[str]) -> str:
    """As a user would type it, but for secrets."""
    words = command[1:] if command[0] == sys.executable else command
    head = "python " if command[0] == sys.executable else ""
    return head + shlex.join(masked_words(words)).replace(f"{Path.cwd()}{os.sep}", "")


def _environment(step: Step, plan: Plan) -> dict[str, str]:
    """Ours, with the programs beside this Python, and threads that ranks do not fight about."""
    beside = str(Path(sys.executable).parent)
    threads = max(1, (os.cpu_count() or 1) // (step.ranks or 1))
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
    }


def _count_gpus() -> int:
    """How many GPUs torch sees, asked in another process so that this one stays light."""
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.check_output([sys.executable, "-c", code], text=True))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _seconds(state: State, step: Step) -> float:
    return float(state.records.get(step.name, {}).get("seconds", 0.0))


def _processor_seconds() -> float:
    """Of all that have ended: what a step takes where other things run beside it, too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
