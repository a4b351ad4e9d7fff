"""Evaluation while or after training: held-out loss, and greedy answers with their scores."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from triptych_core.config import EvaluationConfig, StageConfig, is_due
from triptych_core.engine.averaged import averaged_weights
from triptych_core.evaluation.answers import METRICS, check_question, exact_match
from triptych_core.lines import read_lines, write_lines
from triptych_core.loop import Batch, Part, to_device, whole_row
from triptych_core.metrics import Metrics
from triptych_core.report.pictures import png_uri


class Question(Protocol):
    """One held-out question; whoever encodes and shows it knows it by its index."""

    @property
    def index(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def expected(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def references(self) -> Sequence[str]: ...
    @property
    def choices(self) -> Sequence[str]: ...
    @property
    def source(self) -> str: ...
    @property
    def where(self) -> str: ...


@dataclass
class Answer:
    """A question's answer as given, for scores and for the report.

    `metric` is the question's own, computed on `references`: what is expected, if there are none.
    """

    index: int
    kind: str
    expected: str
    answer: str
    metric: str = "exact_match"
    references: Sequence[str] = ()
    choices: Sequence[str] = ()
    source: str = ""

    @property
    def is_right(self) -> bool:
        """Exact match, up to white space at the ends."""
        return bool(exact_match(self.answer, self.references or [self.expected]))

    @property
    def score(self) -> float:
        """From 0 to 1 by the question's own metric."""
        return METRICS[self.metric](self.answer, self.references or [self.expected], self.choices)


@dataclass
class Score:
    """The mean of a metric over the questions that name it, of one source or of all (None)."""

    metric: str
    source: str | None
    score: float
    count: int


@dataclass
class Evaluation:
    """One evaluation, as a line of `evaluation.jsonl`.

    `exact_match`, `majority` and `counts` are by kind of question and over all of them, whatever
    their metric; `scores` by the questions' own metric, and `score` the mean over all of those.
    """

    step: int
    heldout_loss: float | None
    exact_match: dict[str, float]
    majority: dict[str, float]
    counts: dict[str, int]
    examples: list[dict[str, Any]] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    score: float | None = None
    picture: str | None = None
    """what the model draws, as a data URI"""


class HeldoutSet(Protocol):
    """Held-out samples, as a stage's data package gives them."""

    @property
    def questions(self) -> Sequence[Question]:
        """All questions, the same on every rank."""

    def batches(self) -> Iterable[Batch]:
        """This rank's packs; equally many on every rank."""

    def describe(self, index: int) -> dict[str, Any]:
        """What the report shows of a question: key, prompt, images."""


def evaluate_if_due(
    engine: Any,
    config: StageConfig,
    heldout: HeldoutSet | None,
    answer: Callable[[list[int]], list[str]],
    metrics: Metrics,
    step: int,
    *,
    part: Part = whole_row,
    draw: Callable[[], np.ndarray] | None = None,
) -> None:
    """Evaluate before the first step, every `evaluation.every` steps and after the last.

    `answer` turns numbers of questions into the model's answers; a rank computes `part` of its
    rows, as in training; `draw` makes a picture (H, W, 3) uint8, the same on every rank. Weights
    are their averages under `optim.ema_decay`. Every rank takes part; the main one adds a line to
    `evaluation.jsonl`.
    """
    if heldout is None or not (
        step == 0 or is_due(step, config.evaluation.every, config.run.steps)
    ):
        return
    metrics.note(f"step {step}  evaluating")
    tensor = config.parallel.tensor
    with averaged_weights(engine):
        evaluation = evaluate(
            engine, config.evaluation, heldout, answer, step, part=part, tensor=tensor
        )
        if draw is not None:
            evaluation.picture = png_uri(draw())
    if dist.get_rank() == 0:
        append_evaluation(config.run.dir, evaluation)
    metrics.record_evaluation(step, figures(evaluation), evaluation.examples)
    metrics.note(f"step {step}  held-out loss {evaluation.heldout_loss:.4f}  {told(evaluation)}")
    metrics.restart_clock()


def evaluate(
    engine: Any,
    config: EvaluationConfig,
    heldout: HeldoutSet,
    answer: Callable[[list[int]], list[str]],
    step: int,
    *,
    part: Part = whole_row,
    tensor: int = 1,
) -> Evaluation:
    """Held-out loss and scores of answers; every rank takes part and gets the result.

    `tensor` consecutive ranks divide the weights between them. Raises ValueError, naming the
    sample, for a question that asks for a metric we do not have.
    """
    check_questions(heldout.questions)
    loss = heldout_loss(engine, map(part, heldout.batches()))
    answers = answer_questions(
        heldout.questions, answer, batch_size=config.batch_size, tensor=tensor
    )
    stride = max(1, len(answers) // max(1, config.num_examples))
    # The same questions each time: how an answer changes shows what is learnt.
    examples = [
        {
            **heldout.describe(given.index),
            "question": given.kind,
            "expected": given.expected,
            "answer": given.answer,
            "metric": given.metric,
            "score": given.score,
        }
        for given in answers[::stride][: config.num_examples]
    ]
    return summarize(step, loss, answers, examples)


def check_questions(questions: Sequence[Question]) -> None:
    """Raise ValueError, naming the sample, for one whose metric is not ours or cannot be had."""
    for question in questions:
        check_question(question.metric, question.references, question.choices, question.where)


def summarize(
    step: int, loss: float | None, answers: Sequence[Answer], examples: list[dict[str, Any]]
) -> Evaluation:
    """The numbers of all answers."""
    return Evaluation(
        step=step,
        heldout_loss=loss,
        exact_match=score(answers),
        majority=majority_baseline(answers),
        counts=count_kinds(answers),
        examples=examples,
        scores=score_by_metric(answers),
        score=mean([given.score for given in answers]),
    )


@torch.no_grad()
def heldout_loss(engine: Any, batches: Iterable[Batch]) -> float:
    """Summed loss over all target tokens of all ranks, divided by their number.

    Every rank must bring the same number of batches (pad with empty packs): under ZeRO-3 each
    forward is a collective.
    """
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for batch in batches:
        output = engine(**to_device(batch, engine.device))
        total[0] += output.loss_sum.double()
        total[1] += int(batch["num_targets"])
    dist.all_reduce(total)
    engine.train()
    return float(total[0] / total[1].clamp(min=1))


def answer_questions(
    questions: Sequence[Question],
    answer: Callable[[list[int]], list[str]],
    *,
    batch_size: int,
    tensor: int = 1,
) -> list[Answer]:
    """Answer all questions, split over ranks; every rank gets all answers, in order.

    Every rank calls `answer` equally often, with at least one prompt each time, since under
    ZeRO-3 a forward is a collective. `tensor` consecutive ranks are asked the same.
    """
    rank, size = dist.get_rank() // tensor, dist.get_world_size() // tensor
    stride = batch_size * size
    mine: list[Answer] = []
    for start in range(0, len(questions), stride):
        group = questions[start : start + stride][rank::size]
        # A rank with nothing left repeats a question, to stay in step with the others.
        texts = answer([question.index for question in group or questions[:1]])
        for question, text in zip(group, texts, strict=False):
            mine.append(as_answer(question, text))
    gathered: list[list[Answer]] = [[] for _ in range(size * tensor)]
    dist.all_gather_object(gathered, mine)
    return sorted((answer for part in gathered[::tensor] for answer in part), key=lambda a: a.index)


def as_answer(question: Question, text: str) -> Answer:
    """What a question was answered."""
    return Answer(
        question.index,
        question.kind,
        question.expected,
        text,
        question.metric,
        question.references,
        question.choices,
        question.source,
    )


def score_by_metric(answers: Sequence[Answer]) -> list[Score]:
    """Each metric over its questions, and over those of each source if there are several."""
    groups: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    has_sources = len({answer.source for answer in answers}) > 1
    for answer in answers:
        groups[answer.metric, None].append(answer.score)
        if has_sources:
            groups[answer.metric, answer.source].append(answer.score)
    order = sorted(groups, key=lambda group: (group[0], group[1] is not None, group[1] or ""))
    return [
        Score(metric, source, sum(shares) / len(shares), len(shares))
        for metric, source in order
        for shares in [groups[metric, source]]
    ]


def figures(evaluation: Evaluation) -> dict[str, float]:
    """An evaluation as numbers with names: eval/loss, eval/score, eval/METRIC, eval/METRIC/SOURCE.

    eval/exact_match is over the questions that name no other metric.
    """
    known = {"eval/loss": evaluation.heldout_loss, "eval/score": evaluation.score}
    by_metric = {
        "/".join(["eval", each.metric, *([each.source] if each.source else [])]): each.score
        for each in evaluation.scores
    }
    return {name: value for name, value in known.items() if value is not None} | by_metric


def told(evaluation: Evaluation) -> str:
    """For a line of the console: exact match by kind, or each metric where there are others."""
    overall = {each.metric: each.score for each in evaluation.scores if each.source is None}
    shares = evaluation.exact_match if set(overall) <= {"exact_match"} else overall
    return "  ".join(f"{name} {share:.1%}" for name, share in shares.items())


def mean(values: Sequence[float]) -> float | None:
    """Of any; None of none."""
    return sum(values) / len(values) if values else None


def score(answers: Sequence[Answer]) -> dict[str, float]:
    """Exact match by kind of question."""
    right: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        right[answer.kind].append(answer.is_right)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def majority_baseline(answers: Sequence[Answer]) -> dict[str, float]:
    """What always giving the commonest expected answer of a kind would score."""
    expected: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        expected[answer.kind][answer.expected] += 1
    return {
        kind: counter.most_common(1)[0][1] / counter.total() for kind, counter in expected.items()
    }


def count_kinds(answers: Sequence[Answer]) -> dict[str, int]:
    """How many questions there are of each kind."""
    return dict(Counter(answer.kind for answer in answers))


def append_evaluation(run_dir: Path, evaluation: Evaluation) -> None:
    """Add a line to `evaluation.jsonl`, replacing an earlier one of the same step."""
    path = run_dir / "evaluation.jsonl"
    kept = [item for item in read_lines(path) if item["step"] != evaluation.step]
    write_lines(path, [*kept, asdict(evaluation)])
