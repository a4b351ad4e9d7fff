"""Greedy soup: an input joins the average if an evaluation says that it does no harm.

Best first, each is tried with those that stay (Wortsman et al., arXiv 2203.05482). What has been
scored is kept beside the output, so that a run that was cut off evaluates nothing twice.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from triptych_core.averaging.coefficients import uniform
from triptych_core.averaging.hf_folder import is_hf_folder, read_json
from triptych_core.averaging.job import Job, prepare, run
from triptych_core.averaging.stored import Source
from triptych_core.averaging.unfinished import check_output
from triptych_core.checkpoint.manifest import write_synced
from triptych_core.secrets import masked, masked_words

Say = Callable[[str], None]


class Kitchen:
    """Averages some of the inputs into a folder beside the output, and has it scored.

    Args:
        job: of all inputs.
        command: prints a score last; {} in it stands for the folder, else the folder is added.
        say: told each score.
    """

    def __init__(self, job: Job, command: str, say: Say) -> None:
        self.folder = job.output.with_name(f".{job.output.name}.greedy")
        self.trials: list[dict[str, Any]] = []
        self._job, self._command, self._say = job, command, say
        self.folder.mkdir(exist_ok=True)
        scores = self.folder / "scores.json"
        self._scores: dict[str, Any] = read_json(scores) if scores.is_file() else {}

    def score(self, sources: list[Source]) -> float:
        """What the evaluation says of the uniform average.

        Raises:
            ValueError: the command fails or prints no number.
        """
        job = _of(self._job, sources, self.folder / "candidate")
        plan, notes = prepare(job)
        asked = shlex.join(masked_words(shlex.split(self._command)))
        key = f"{plan.fingerprint()} {asked}"
        if key not in self._scores:
            if len(sources) == 1 and is_hf_folder(sources[0].path):
                self._scores[key] = score_of(self._command, sources[0].path)
            else:
                run(job, plan, notes)
                self._scores[key] = score_of(self._command, job.output)
                shutil.rmtree(job.output)
            write_synced(self.folder / "scores.json", json.dumps(self._scores).encode())
        value = float(self._scores[key])
        names = [str(source.path) for source in sources]
        self.trials.append({"inputs": names, "score": value})
        self._say(f"{value:>10.6g}  {' + '.join(names)}")
        return value


def choose(job: Job, command: str, lower_is_better: bool, say: Say = lambda _: None) -> Job:
    """The job that is left once inputs that do harm are out.

    Raises:
        ValueError: inputs do not belong together, or the evaluation fails.
    """
    check_output(job.output)
    prepare(job)  # refuses before anything is evaluated
    kitchen = Kitchen(job, command, say)
    sign = -1 if lower_is_better else 1
    shutil.rmtree(kitchen.folder / "candidate", ignore_errors=True)  # of a run that was cut off
    alone = [sign * kitchen.score([source]) for source in job.sources]
    order = sorted(range(len(alone)), key=lambda number: -alone[number])
    chosen, best = [job.sources[order[0]]], alone[order[0]]
    for number in order[1:]:
        value = sign * kitchen.score([*chosen, job.sources[number]])
        if value >= best:
            chosen, best = [*chosen, job.sources[number]], value
    return replace(_of(job, chosen, job.output), trials=tuple(kitchen.trials))


def clean_up(job: Job) -> None:
    """Forget the scores of a soup that is in place."""
    shutil.rmtree(job.output.with_name(f".{job.output.name}.greedy"), ignore_errors=True)


def score_of(command: str, folder: Path) -> float:
    """The number an evaluation prints last, or `score` of an object in JSON there.

    Raises:
        ValueError: it fails or prints no such number.
    """
    words = [word.replace("{}", str(folder)) for word in shlex.split(command)]
    if "{}" not in command:
        words.append(str(folder))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(
            f"--evaluate: must succeed, got exit status {done.returncode} of "
            f"`{shlex.join(masked_words(words))}`: {masked(done.stderr.strip())[-500:]}; run it by "
            "hand"
        )
    lines = done.stdout.strip().splitlines()
    try:
        found = json.loads(lines[-1])
        score = float(found["score"] if isinstance(found, dict) else found)
    except (IndexError, ValueError, TypeError, KeyError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(
            "--evaluate: must print a finite number, or an object with a score, on its last line, "
            f"got '{lines[-1] if lines else ''}'; print it last"
        )
    return score


def _of(job: Job, sources: list[Source], output: Path) -> Job:
    recipe = replace(job.recipe, weights=tuple(uniform(len(sources))))
    return replace(job, sources=sources, recipe=recipe, output=output)
