import json
from typing import Any

import pytest

from triptych_data.sample import (
    check_sample,
    dump_json,
    image_indexes,
    load_json,
    parse_input,
    text_bytes,
)

USER = {"role": "user", "content": "What is it?"}
ASSISTANT = {"role": "assistant", "content": "A cat."}
IMAGE = {"type": "image", "image": "a.jpg"}


def parse(record: Any) -> Any:
    return parse_input(json.dumps(record), "chats.jsonl:7")


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    "part", [IMAGE, {"type": "image_url", "image_url": {"url": "a.jpg"}}], ids=["image", "openai"]
)
def test_image_parts_are_numbered(part):
    text = {"type": "text", "text": "and <image> in a part is only text"}
    sample = parse({"messages": [user(part, text, part), ASSISTANT], "source": "x"})
    numbered = [{"type": "image", "index": 0}, text, {"type": "image", "index": 1}]
    assert sample.json == {"messages": [user(*numbered), ASSISTANT], "source": "x"}
    assert sample.images == ["a.jpg", "a.jpg"]
    assert image_indexes(sample.json) == [0, 1]


def test_extra_keys_of_parts_and_messages_stay():
    message = {**user({**IMAGE, "max_pixels": 9}), "name": "Ann"}
    kept = parse({"messages": [message, ASSISTANT]}).json["messages"][0]
    assert kept == {**user({"type": "image", "index": 0, "max_pixels": 9}), "name": "Ann"}


def test_placeholders_become_parts_and_text_is_kept_to_the_letter():
    messages = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": "<image>\n or <image>?"},
        ASSISTANT,
        {"role": "user", "content": "<image>"},
        ASSISTANT,
    ]
    sample = parse({"messages": messages, "images": ["a.jpg", "b.png", "c.webp"]})
    contents = [message["content"] for message in sample.json["messages"]]
    assert contents == [
        "Look.",
        [
            {"type": "image", "index": 0},
            {"type": "text", "text": "\n or "},
            {"type": "image", "index": 1},
            {"type": "text", "text": "?"},
        ],
        "A cat.",
        [{"type": "image", "index": 2}],
        "A cat.",
    ]
    assert sample.images == ["a.jpg", "b.png", "c.webp"]
    assert "images" not in sample.json


def test_text_bytes_counts_utf8_of_all_texts():
    sample = parse({"messages": [user(IMAGE, {"type": "text", "text": "ü"}), ASSISTANT]})
    assert text_bytes(sample.json) == 2 + 6


def test_dumped_json_is_compact_and_loads_again():
    record = {"messages": [USER, {"role": "assistant", "content": "Größe 👍"}], "n": 1.5}
    data = dump_json(record)
    assert b" : " not in data and "Größe 👍".encode() in data
    assert load_json(data, "x") == record


def test_an_emoji_written_as_two_escapes_is_fine():
    assert load_json(r'"\ud83d\udc4d"', "x") == "👍"


BAD = [
    ([], "a record must be a JSON object, got []"),
    ({}, "messages must be a non-empty list, got None"),
    ({"messages": []}, "messages must be a non-empty list, got []"),
    ({"messages": "hi"}, "messages must be a non-empty list, got 'hi'"),
    ({"messages": ["hi"]}, "messages[0] must be an object, got 'hi'"),
    ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role must be one of"),
    ({"messages": [USER]}, "messages must hold an assistant turn, got roles ['user']"),
    ({"messages": [ASSISTANT, USER]}, "must be from user, got 'assistant'"),
    ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content must be text or a list"),
    ({"messages": [USER, {**ASSISTANT, "content": " \n"}]}, "must not be empty for assistant"),
    ({"messages": [USER, {**ASSISTANT, "content": []}]}, "must not be empty for assistant"),
    ({"messages": [user({"type": "text", "text": 3}), ASSISTANT]}, "content[0].text must be a str"),
    ({"messages": [user({"type": "smell"}), ASSISTANT]}, "type must be text or image, got 'smell'"),
    ({"messages": [user("hi"), ASSISTANT]}, "type must be text or image, got 'hi'"),
    ({"messages": [user({"type": "video", "video": "a"}), ASSISTANT]}, "not supported yet"),
    ({"messages": [user({"type": "input_audio"}), ASSISTANT]}, "not supported yet"),
    ({"messages": [user({"type": "image"}), ASSISTANT]}, "an image part must name its file"),
    ({"messages": [user({"type": "image", "index": 0}), ASSISTANT]}, "must name its file"),
    ({"messages": [{**USER, "content": "<image>?"}, ASSISTANT]}, "must not hold <image> without"),
    (
        {"messages": [{**USER, "content": "<image><image>"}, ASSISTANT], "images": ["a.jpg"]},
        "got 2 placeholders and 1 images",
    ),
    ({"messages": [USER, ASSISTANT], "images": ["a.jpg"]}, "got 0 placeholders and 1 images"),
    ({"messages": [USER, ASSISTANT], "images": "a.jpg"}, "images must be a list of paths"),
    ({"messages": [user(IMAGE), ASSISTANT], "images": ["a.jpg"]}, "beside a list of images"),
]


@pytest.mark.parametrize(("record", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_surely_wrong_is_refused(record, message):
    with pytest.raises(ValueError) as error:
        parse(record)
    text = str(error.value)
    assert text.startswith("chats.jsonl:7: ") and message in text
    assert "; " in text, "an error says what to do"


@pytest.mark.parametrize(
    "line",
    [b'{"messages": [', b'{"a": NaN}', b'{"a": "\xff"}', rb'{"a": "\ud83d"}', b"[" * 100_000],
    ids=["cut", "nan", "latin1", "surrogate", "deep"],
)
def test_broken_json_is_refused(line):
    with pytest.raises(ValueError, match=r"^chats.jsonl:3: must be valid JSON in UTF-8, got "):
        parse_input(line, "chats.jsonl:3")


@pytest.mark.parametrize("index", [1, -1, "0", True, None])
def test_shard_form_needs_an_index_in_range(index):
    record = {"messages": [user({"type": "image", "index": index}), ASSISTANT]}
    with pytest.raises(ValueError, match=r"index must number one of the sample's 1 images"):
        check_sample(record, 1, "x")


def test_shard_form_must_use_every_image():
    with pytest.raises(ValueError, match=r"every image must be used in messages.*image 1"):
        check_sample({"messages": [user({"type": "image", "index": 0}), ASSISTANT]}, 2, "x")
