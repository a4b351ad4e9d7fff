"""Each metric on the cases where scripts are known to differ, or to go wrong."""

import random

import pytest

from triptych_core.evaluation.answers import (
    METRICS,
    anls,
    check_question,
    chosen_letter,
    edit_distance,
    exact_match,
    multiple_choice,
    relaxed_accuracy,
)

ANIMALS = ["cat", "dog", "hot dog", "none of the above"]


def test_exact_match_of_any_reference():
    assert exact_match(" 7\n", ["eight", "7 "]) == 1
    assert exact_match("Seven", ["seven"]) == 0  # case counts, as it always did
    assert exact_match("", ["7"]) == 0


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [("kitten", "sitting", 3), ("saturday", "sunday", 3), ("", "abc", 3), ("abc", "abc", 0)],
)
def test_known_edit_distances(left, right, distance):
    assert edit_distance(left, right) == edit_distance(right, left) == distance


def test_edit_distance_equals_its_recursive_definition():
    def plainly(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        changed = plainly(a[1:], b[1:]) + (a[0] != b[0])
        return min(changed, plainly(a[1:], b) + 1, plainly(a, b[1:]) + 1)

    draw = random.Random(0)
    for _ in range(100):
        a, b = ("".join(draw.choices("ab", k=draw.randint(0, 5))) for _ in range(2))
        assert edit_distance(a, b) == plainly(a, b), (a, b)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("Coca  Cola", ["coca cola"], 1.0),  # case and spaces aside
        ("kitten", ["sitting", "mitten"], 5 / 6),  # the nearest of several
        ("abcd", ["abxy"], 0.0),  # NL is 0.5: not below the threshold
        ("abcde", ["abcxy"], 1 - 2 / 5),
        ("", ["7"], 0.0),
        ("", [""], 1.0),
        ("the answer is 7", ["7"], 0.0),  # far too long
    ],
)
def test_anls(answer, references, score):
    assert anls(answer, references) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("105", "100", 1),  # the bound itself belongs to it
        ("95", "100", 1),
        ("105.01", "100", 0),
        ("1.05", "1", 1),  # in binary floats 0.05000000000000004 off
        ("-96", "-100", 1),
        ("96", "-100", 0),
        ("12%", "0.12", 1),
        ("12", "12%", 0),
        ("0.0", "0", 1),
        ("0.001", "0", 0),
        ("2014", "2010", 1),  # years too: the rule knows no years
        ("1,000", "1000", 0),  # commas make it text
        ("Yes", "yes", 1),
        ("yes.", "yes", 0),
        ("nan", "nan", 1),  # as text
        ("inf", "5", 0),
        ("1e999999999", "5", 0),
        ("about 5", "5", 0),
        ("%", "5", 0),
    ],
)
def test_relaxed_accuracy(answer, reference, score):
    assert relaxed_accuracy(answer, [reference]) == score
    assert relaxed_accuracy(answer, ["elsewhere", reference]) == score


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (b) ", "B"),
        ("B.", "B"),
        ("C: hot dog", "C"),
        ("**B**", "B"),
        ("(B) dog", "B"),
        ("A cat sits there, so the answer is B.", "B"),
        ("Answer: (C)", "C"),
        ("The answer is B. No, the answer is D", "D"),  # the last one said
        ("dog", "B"),
        ("Dog.", "B"),
        ("hot dog", "C"),
        ("It shows a hot dog", "C"),  # "dog" lies within it
        ("It is a dog", "B"),
        ("I see a cat", "A"),  # neither I nor a is a letter here
        ("A dog", "B"),  # an article
        ("It must be option B", "B"),
        ("either B or C", None),
        ("a cat and a dog", None),
        ("concatenate", None),  # no whole word
        ("E", None),  # there is no such choice
        ("the answer is a dog", "B"),
        ("", None),
        ("?", None),
    ],
)
def test_the_choice_an_answer_means(answer, letter):
    assert chosen_letter(answer, ANIMALS) == letter


def test_multiple_choice():
    assert multiple_choice("B", ["B"], ANIMALS) == 1
    assert multiple_choice("b) dog", ["dog"], ANIMALS) == 1  # the reference as text
    assert multiple_choice("B", ["A", "dog"], ANIMALS) == 1
    assert multiple_choice("no idea", ["B"], ANIMALS) == 0
    assert multiple_choice("The answer is C", ["C"]) == 1  # choices only in the prompt
    assert multiple_choice("I think so", ["I"]) == 0
    # A choice's text that is another one's letter: "A" is the second choice.
    assert multiple_choice("B", ["A"], ["B+", "A", "C"]) == 1


def test_what_cannot_be_scored_is_refused():
    check_question("multiple_choice", ["dog"], ANIMALS, "here")
    with pytest.raises(ValueError, match=r"here: metric must be one of .*got 'anlss'.*anls"):
        check_question("anlss", ["7"], [], "here")
    with pytest.raises(ValueError, match=r"answers must be letters or choices .*'horse'"):
        check_question("multiple_choice", ["horse"], ANIMALS, "here")
    with pytest.raises(ValueError, match=r"answers must be letters or choices .*'E'"):
        check_question("multiple_choice", ["E"], ANIMALS, "here")
    with pytest.raises(ValueError, match="at most 26"):
        check_question("multiple_choice", ["A"], ["x"] * 27, "here")


def test_every_metric_lies_between_0_and_1_whatever_is_said():
    draw = random.Random(1)
    for metric in METRICS.values():
        for _ in range(200):
            text = "".join(draw.choices("AB.()% 0159é\n", k=draw.randint(0, 9)))
            assert 0 <= metric(text, ["A", "B"], ["x", "y"]) <= 1
