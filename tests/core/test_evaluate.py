"""Exact match: questions split over ranks come back whole, in order, scored by kind."""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from triptych_core.evaluation.evaluate import (
    Answer,
    Evaluation,
    Score,
    answer_questions,
    append_evaluation,
    count_kinds,
    evaluate,
    figures,
    majority_baseline,
    score,
    score_by_metric,
)


def test_scores_by_kind():
    answers = [
        Answer(0, "digit", "7", "7 "),
        Answer(1, "digit", "3", "8"),
        Answer(2, "even", "no", "no"),
        Answer(3, "digit", "7", ""),
    ]
    assert score(answers) == {"digit": 1 / 3, "even": 1.0}
    assert majority_baseline(answers) == {"digit": 2 / 3, "even": 1.0}
    assert count_kinds(answers) == {"digit": 3, "even": 1}


def answer_on_a_rank(num_questions: int) -> tuple[list[Answer], int]:
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    launch(RunConfig(device="cpu"))
    questions = [Answer(i, "echo", str(i), "") for i in range(num_questions)]
    calls = []

    def generate(prompts: list[int]) -> list[str]:
        assert prompts
        calls.append(prompts)
        return [str(prompt) for prompt in prompts]

    return answer_questions(questions, generate, batch_size=2), len(calls)


def test_all_questions_are_answered_once_and_ranks_stay_in_step():
    for answers, calls in run_ranks(answer_on_a_rank, 2, 5):
        assert [answer.index for answer in answers] == [0, 1, 2, 3, 4]
        assert all(answer.is_right for answer in answers)
        assert calls == 2  # 4 questions, then 1: the rank without one still takes part


def test_an_evaluation_replaces_one_of_the_same_step(tmp_path):
    for loss in (3.0, 2.0):
        append_evaluation(tmp_path, Evaluation(0, loss, {}, {}, {}))
    append_evaluation(tmp_path, Evaluation(10, 1.0, {}, {}, {}))
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").open()]
    assert [(line["step"], line["heldout_loss"]) for line in lines] == [(0, 2.0), (10, 1.0)]


MIXED = [
    Answer(0, "all", "7", "7", source="counts"),
    Answer(1, "all", "kitten", "sitten", "anls", ["kitten", "cat"], source="scans"),
    Answer(2, "all", "kitten", "dog", "anls", ["kitten"], source="signs"),
    Answer(3, "all", "100", "104 ", "relaxed_accuracy", ["100"], source="charts"),
    Answer(4, "all", "B", "It is a dog", "multiple_choice", ["B"], ["cat", "dog"], "scans"),
]


def test_each_question_is_scored_by_its_own_metric_and_source():
    near = 5 / 6
    assert [answer.score for answer in MIXED] == pytest.approx([1, near, 0, 1, 1])
    found = {(s.metric, s.source): (s.score, s.count) for s in score_by_metric(MIXED)}
    assert found == {
        ("exact_match", None): (1, 1),
        ("exact_match", "counts"): (1, 1),
        ("anls", None): (pytest.approx(near / 2), 2),
        ("anls", "scans"): (pytest.approx(near), 1),
        ("anls", "signs"): (0, 1),
        ("relaxed_accuracy", None): (1, 1),
        ("relaxed_accuracy", "charts"): (1, 1),
        ("multiple_choice", None): (1, 1),
        ("multiple_choice", "scans"): (1, 1),
    }
    alone = score_by_metric([MIXED[0], Answer(9, "all", "8", "9", source="counts")])
    assert alone == [Score("exact_match", None, 0.5, 2)]  # one source: nothing to set apart


class Asks:
    """A held-out set of two questions, one a mistake."""

    def __init__(self, metric: str) -> None:
        self.questions = [Asked(0), Asked(1, metric)]


class Asked(Answer):
    where = "heldout.tar: sample 7"

    def __init__(self, index: int, metric: str = "anls") -> None:
        super().__init__(index, "all", "7", "", metric, ["7"])


def test_a_misspelt_metric_is_refused_before_anything_is_computed():
    from triptych_core.config import EvaluationConfig

    with pytest.raises(ValueError, match=r"heldout.tar: sample 7: metric .*did you mean 'anls'"):
        evaluate(None, EvaluationConfig(), Asks("anlz"), lambda questions: [], 0)  # type: ignore[arg-type]


def test_figures_have_names_by_metric_and_source():
    evaluation = Evaluation(3, 1.5, {}, {}, {}, scores=score_by_metric(MIXED), score=0.75)
    found = figures(evaluation)
    assert found["eval/loss"] == 1.5
    assert found["eval/score"] == 0.75
    assert found["eval/anls"] == pytest.approx(5 / 12)
    assert found["eval/anls/signs"] == 0
    assert len(found) == 2 + 9


def test_heldout_samples_say_how_they_are_scored(tmp_path: Path):
    from triptych_data.heldout import ask

    chat = {"messages": [{"role": "assistant", "content": "seven"}]}
    plain = ask(3, chat, "held/scans/shard-000000.tar: sample 8")
    assert (plain.metric, plain.references, plain.choices) == ("exact_match", ("seven",), ())
    assert (plain.kind, plain.source, plain.expected) == ("all", "scans", "seven")
    told = chat | {"metric": "anls", "answers": ["7", "seven"], "source": "docvqa"}
    asked = ask(3, told, "a.tar: sample 8")
    assert (asked.metric, asked.references, asked.source) == ("anls", ("7", "seven"), "docvqa")
    for wrong in ({"answers": "7"}, {"answers": []}, {"answers": [7]}, {"choices": [1]}):
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=rf"a.tar: sample 8: {name} must be a list of strings"):
            ask(3, chat | wrong, "a.tar: sample 8")
    with pytest.raises(ValueError, match="metric must be a name, got 3"):
        ask(3, chat | {"metric": 3}, "a.tar: sample 8")
