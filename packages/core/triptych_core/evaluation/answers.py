"""How right an answer is: the metrics that held-out samples name, each a number from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from string import ascii_uppercase

from triptych_core.config import did_you_mean

ANLS_THRESHOLD = 0.5
RELAXED = Decimal("0.05")
_LARGEST_EXPONENT = 300  # beyond what a float holds: no measured value, and slow to subtract
_LETTERS = ascii_uppercase[:10]  # without choices; questions with more than ten are not asked

# "The answer is (B)", "Answer: B": the letter a capital, or "answer is a dog" would be one.
_DECLARED = re.compile(r"(?i:answer)(?:\s+is)?\s*:?\s*[(\[*]*([A-Z])(?![\w'’])")
# "B", "(b)", "B. dog": a letter that the answer begins with, marked as one or alone.
_LEADING = re.compile(r"[(\[*]*([A-Za-z])(?:[)\].:*]|\s*$)")
# Any capital by itself; A and I are words too and count only where they are marked.
_ALONE = re.compile(r"(?<![\w'’])(?:\(([A-Z])\)|([AI])[).:]|([B-HJ-Z])(?![\w'’]))")


def exact_match(answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 if the answer is one of the references, up to white space at the ends."""
    return float(answer.strip() in {reference.strip() for reference in references})


def anls(answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Similarity to the nearest reference: 1 - NL, or 0 where NL is not below 0.5.

    NL is the edit distance divided by the longer length, letters' case and spaces aside (Biten et
    al. 2019, Scene Text Visual Question Answering, equation 1; DocVQA takes the same). At exactly
    0.5 some scripts, lmms-eval's among them, keep 0.5 where the paper says 0.
    """
    return max(_similarity(_plain(answer), _plain(reference)) for reference in references)


def relaxed_accuracy(answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 if a number is off by at most 5 % of a reference, or a text equals one, case aside.

    ChartQA's rule (Masry et al. 2022, section 5.1, after PlotQA): `12 %` is 0.12; text around a
    number makes it text, and so do thousands' commas. A reference of 0 must be met exactly.
    """
    return float(any(_is_near(answer.strip(), reference.strip()) for reference in references))


def multiple_choice(answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 if `chosen_letter` finds in the answer the letter of a reference, a letter or a choice.

    Nothing found is wrong; no letter is drawn for it, as MMMU's script does.
    """
    right = {_letter_of(reference, choices) for reference in references}
    return float(chosen_letter(answer, choices) in right)


METRICS: dict[str, Callable[[str, Sequence[str], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "multiple_choice": multiple_choice,
}


def check_question(
    metric: str, references: Sequence[str], choices: Sequence[str], where: str
) -> None:
    """Raise ValueError unless the metric is one of ours and can be computed on these references."""
    if metric not in METRICS:
        raise ValueError(
            f"{where}: metric must be one of {', '.join(METRICS)}, got {metric!r}"
            f"{did_you_mean(metric, list(METRICS))}"
        )
    if metric != "multiple_choice":
        return
    if len(choices) > len(ascii_uppercase):
        raise ValueError(
            f"{where}: choices must be at most {len(ascii_uppercase)}, got {len(choices)}; "
            "each has a letter"
        )
    odd = [reference for reference in references if _letter_of(reference, choices) is None]
    if odd:
        raise ValueError(
            f"{where}: answers must be letters or choices for multiple_choice, got {odd[0]!r} "
            f"with choices {list(choices)}; write its letter, or list the choices"
        )


def chosen_letter(answer: str, choices: Sequence[str] = ()) -> str | None:
    """The choice that an answer means, by the first of these rules that finds one.

    1. the last "answer is B" or "answer: B"; 2. a letter that the answer begins with, alone or
    marked: "B", "(b)", "B. dog"; 3. the answer is a choice's text; 4. the only letter that stands
    by itself as a capital (A and I only as "(A)" or "A."); 5. the only choice whose text is in the
    answer as whole words, those within a longer one that is there too left out.

    The order, letters before texts and none if several, is that of MMBench's rules (Liu et al.
    2023, section 4; its judge model for the rest is left out).
    """
    letters = ascii_uppercase[: len(choices)] if choices else _LETTERS
    answer = answer.strip()
    declared = [letter for letter in _DECLARED.findall(answer) if letter in letters]
    if declared:
        return declared[-1]
    leading = _LEADING.match(answer)
    if leading and leading[1].upper() in letters:
        return leading[1].upper()
    if (equal := _equal_choice(answer, choices)) is not None:
        return equal
    alone = {"".join(groups) for groups in _ALONE.findall(answer)} & set(letters)
    if alone:
        return alone.pop() if len(alone) == 1 else None
    return _contained_choice(answer, choices)


def edit_distance(left: str, right: str) -> int:
    """Insertions, deletions and substitutions that make one string the other (Levenshtein)."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def _similarity(answer: str, reference: str) -> float:
    longest = max(len(answer), len(reference))
    if longest == 0:
        return 1.0
    if abs(len(answer) - len(reference)) >= ANLS_THRESHOLD * longest:
        return 0.0  # the distance is at least that: a long answer costs nothing
    share = edit_distance(answer, reference) / longest
    return 1.0 - share if share < ANLS_THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _is_near(answer: str, reference: str) -> bool:
    given, wanted = _number(answer), _number(reference)
    if given is None or wanted is None:
        return answer.lower() == reference.lower()
    return abs(given - wanted) <= RELAXED * abs(wanted)


def _number(text: str) -> Decimal | None:
    """Decimal, so that 1.05 lies within 5 % of 1: in binary it does not."""
    try:
        value = Decimal(text.removesuffix("%").strip())
    except InvalidOperation:
        return None
    if not value.is_finite() or abs(value.adjusted()) > _LARGEST_EXPONENT:
        return None
    return value / 100 if text.endswith("%") else value


def _letter_of(reference: str, choices: Sequence[str]) -> str | None:
    """The letter of a reference; a choice's text goes before a letter, for choices like "A"."""
    if (equal := _equal_choice(reference, choices)) is not None:
        return equal
    letter = reference.strip().upper()
    letters = ascii_uppercase[: len(choices)] if choices else _LETTERS
    return letter if len(letter) == 1 and letter in letters else None


def _equal_choice(text: str, choices: Sequence[str]) -> str | None:
    plain = _plain(text).rstrip(".")
    found = [i for i, choice in enumerate(choices) if _plain(choice).rstrip(".") == plain]
    return ascii_uppercase[found[0]] if len(found) == 1 else None


def _contained_choice(answer: str, choices: Sequence[str]) -> str | None:
    plain, texts = _plain(answer), [_plain(choice).rstrip(".") for choice in choices]
    found = [i for i, text in enumerate(texts) if text and _has_words(plain, text)]
    longest = [
        i for i in found if not any(j != i and _has_words(texts[j], texts[i]) for j in found)
    ]
    return ascii_uppercase[longest[0]] if len(longest) == 1 else None


def _has_words(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None
