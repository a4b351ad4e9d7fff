import json
from typing import Any

import pytest

from triptych_data.sample import (
    check_sample,
    dump_json,
    load_json,
    media_kinds,
    media_parts,
    parse_input,
    text_bytes,
)
from triptych_data.tools import call_arguments

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
    assert sample.media == [("image", "a.jpg"), ("image", "a.jpg")]
    assert media_parts(sample.json) == [("image", 0), ("image", 1)]


SPELLINGS = [
    ({"type": "video", "video": "a.mp4"}, ("video", "a.mp4")),
    ({"type": "video_url", "video_url": {"url": "a.mp4"}}, ("video", "a.mp4")),
    ({"type": "audio", "audio": "a.wav"}, ("audio", "a.wav")),
    ({"type": "audio_url", "audio_url": {"url": "a.wav"}}, ("audio", "a.wav")),
    (
        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "mp3"}},
        ("audio", "data:audio/mp3;base64,UklGRg=="),
    ),
]


@pytest.mark.parametrize(("part", "source"), SPELLINGS, ids=[p["type"] for p, _ in SPELLINGS])
def test_videos_and_audios_are_numbered_with_the_images(part, source):
    sample = parse({"messages": [user(IMAGE, part, IMAGE), ASSISTANT]})
    assert sample.media == [("image", "a.jpg"), source, ("image", "a.jpg")]
    assert media_parts(sample.json) == [("image", 0), (source[0], 1), ("image", 2)]
    assert media_kinds(sample.json) == ["image", source[0], "image"]


def test_placeholders_of_all_kinds_count_together():
    message = {"role": "user", "content": "<video><image>, <audio>and <video>"}
    lists = {"images": ["i.jpg"], "videos": ["v.mp4", "w.mp4"], "audios": ["a.wav"]}
    sample = parse({"messages": [message, ASSISTANT], **lists})
    assert [source for _, source in sample.media] == ["v.mp4", "i.jpg", "a.wav", "w.mp4"]
    assert media_kinds(sample.json) == ["video", "image", "audio", "video"]
    assert sample.json == {"messages": [user(*sample.json["messages"][0]["content"]), ASSISTANT]}


def test_a_medium_has_one_kind():
    parts = [{"type": "image", "index": 0}, {"type": "video", "index": 0}]
    with pytest.raises(ValueError, match="of one kind, got number 0 as image and as video"):
        check_sample({"messages": [user(*parts), ASSISTANT]}, 1, "x")


CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Ulm"}'},
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_tool_calls_and_results_stay_as_openai_writes_them():
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
        ASSISTANT,
    ]
    sample = parse({"messages": messages, "tools": [TOOL]})
    assert sample.json == {"messages": messages, "tools": [TOOL]}
    texts = len("What is it?" + "Rain." + "A cat.")
    assert text_bytes(sample.json) == texts + len(dump_json([TOOL])) + len(dump_json([CALL]))
    assert call_arguments(CALL) == {"city": "Ulm"}


def with_call(**changes: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{**CALL, **changes}]}


BAD_TOOLS = [
    ([USER, with_call(function="weather")], "tool_calls[0] must name a function"),
    ([USER, with_call(function={"name": "f", "arguments": "{"})], "must be an object or JSON"),
    ([USER, with_call(function={"name": "f", "arguments": "[1]"})], "must be an object or JSON"),
    ([USER, {**ASSISTANT, "tool_calls": CALL}], "tool_calls must be a list in an assistant's"),
    ([{**USER, "tool_calls": [CALL]}, ASSISTANT], "list in an assistant's message"),
    ([USER, {"role": "assistant", "tool_calls": []}], "content must be text or a list"),
    (
        [USER, with_call(), {"role": "tool", "tool_call_id": "call_2", "content": "Rain."}],
        "must name a call before it, got 'call_2'",
    ),
    ([USER, with_call(), {"role": "tool", "content": None}], "content must be text or a list"),
]


@pytest.mark.parametrize(("messages", "message"), BAD_TOOLS, ids=[text for _, text in BAD_TOOLS])
def test_wrong_tools_are_refused(messages, message):
    with pytest.raises(ValueError) as error:
        parse({"messages": messages})
    assert message in str(error.value) and "; " in str(error.value)


def test_definitions_of_tools_are_objects():
    with pytest.raises(ValueError, match="tools must be a list of objects, got 'weather'"):
        parse({"messages": [USER, ASSISTANT], "tools": "weather"})


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
    assert [source for _, source in sample.media] == ["a.jpg", "b.png", "c.webp"]
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
    ({"messages": [{"role": "bot", "content": ""}]}, "messages[0].role must be one of"),
    ({"messages": [USER]}, "messages must hold an assistant turn, got roles ['user']"),
    ({"messages": [ASSISTANT, USER]}, "must be from user, got 'assistant'"),
    ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content must be text or a list"),
    ({"messages": [USER, {**ASSISTANT, "content": " \n"}]}, "must not be empty for assistant"),
    ({"messages": [USER, {**ASSISTANT, "content": []}]}, "must not be empty for assistant"),
    ({"messages": [user({"type": "text", "text": 3}), ASSISTANT]}, "content[0].text must be a str"),
    ({"messages": [user({"type": "smell"}), ASSISTANT]}, "or audio, got 'smell'"),
    ({"messages": [user("hi"), ASSISTANT]}, "or audio, got 'hi'"),
    ({"messages": [user({"type": "input_audio"}), ASSISTANT]}, "type input_audio must name its"),
    ({"messages": [user({"type": "image"}), ASSISTANT]}, "of type image must name its file"),
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
    with pytest.raises(ValueError, match=r"index must number one of the sample's 1 media"):
        check_sample(record, 1, "x")


def test_shard_form_must_use_every_image():
    with pytest.raises(ValueError, match=r"every medium must be used in the text.*number 1"):
        check_sample({"messages": [user({"type": "image", "index": 0}), ASSISTANT]}, 2, "x")
