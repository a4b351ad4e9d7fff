import json
import sys

import pytest

from triptych_data import strict_json
from triptych_data.strict_json import DEPTH_LIMIT, load_json

HOSTILE = {
    "maximum recursion depth exceeded": b"[" * 10_000 + b"]" * 10_000,
    "more than 100 levels": b'{"a":' * 101 + b"1" + b"}" * 101,
    "the constant NaN": b'{"a": NaN}',
    "the constant -Infinity": b"[-Infinity]",
    "the number 1e999, which is beyond what a float holds": b"[1e999]",
    "the key 'a' twice in one object": b'{"a": 1, "b": 2, "a": 3}',
    "surrogates not allowed": rb'["\ud800"]',
    "can't decode byte 0xff": b'["\xff"]',
    "limit (4300": b"1" * 5000,
    "Expecting": b'{"a": ',
    "Extra data": b"{} {}",
    "Expecting value": b"",
    "Invalid control character": b'["a\nb"]',
}


@pytest.mark.parametrize("message", HOSTILE)
def test_hostile_json_is_refused_with_its_place(message):
    with pytest.raises(ValueError) as error:
        load_json(HOSTILE[message], "x.tar: sample a")
    text = str(error.value)
    assert text.startswith("x.tar: sample a: must be valid JSON in UTF-8, got ") and message in text
    assert len(text) < 400


def test_depth_is_ours_not_that_of_the_stack():
    """Just within the limit, from a stack that is nearly used up; text may hold any brackets."""
    nested = b"[" * DEPTH_LIMIT + b"]" * DEPTH_LIMIT

    def deep(left: int) -> object:
        return deep(left - 1) if left else load_json(nested, "x")

    assert deep(sys.getrecursionlimit() - 400)
    assert load_json(json.dumps(["[{" * 500] * 200), "x")
    with pytest.raises(ValueError, match="more than 100 levels"):
        load_json(b"[" + nested + b"]", "x")


def test_size_is_limited(monkeypatch):
    monkeypatch.setattr(strict_json, "JSON_LIMIT", 100)
    assert load_json(b'"' + b"a" * 98 + b'"', "x")
    with pytest.raises(ValueError, match="x: must be valid JSON in UTF-8, got 101 bytes, of at"):
        load_json(b'"' + b"a" * 99 + b'"', "x")


def test_what_is_json_is_read_as_json_reads_it():
    value = {"a": [1, -2.5e3, True, None, "ü😀", {"b": {}}], "": 1e308}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert load_json(text, "x") == value
        assert load_json(b"\xef\xbb\xbf" + text.encode(), "x") == value
    assert load_json(rb'"\ud83d\ude00"', "x") == "😀"
