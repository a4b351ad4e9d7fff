"""Exact match: questions split over ranks come back whole, in order, scored by kind."""

import json

from tests.ranks import run_ranks
from triptych_core.evaluate import (
    Answer,
    Evaluation,
    answer_questions,
    append_evaluation,
    count_kinds,
    majority_baseline,
    score,
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
