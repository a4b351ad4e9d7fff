import json
import random
import shutil

import pytest
from transformers import AutoTokenizer

from tests.data.packs import MODEL
from triptych_data.text.chat import ChatTokenizer, MediaTokens, shift_targets

TEMPLATE = (MODEL / "chat_template.jinja").read_text()


@pytest.fixture(scope="module")
def chat():
    return ChatTokenizer(MODEL, TEMPLATE)


@pytest.fixture(scope="module")
def stock():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


def turns(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def stock_ids(stock, messages):
    return stock.apply_chat_template(messages, tokenize=True)["input_ids"]


def trained_text(chat, tokens):
    return chat.text._tokenizer.decode(tokens.input_ids[tokens.trained].tolist())


CHATS = [
    turns("Hi", "Hello there."),
    turns("Hi\n\n", "Hello", "and\nmore?", " yes \n", system="  Be brief.\n"),
    turns("naïve café 猫 👩‍👩‍👧 e\u0301", "日本語 and עברית\t!"),
    turns("a < b <| c |> <|im_en", "d|> <|", system="<|"),
    [
        {"role": "user", "content": [{"type": "text", "text": text} for text in ("a ", " b", "")]},
        {"role": "assistant", "content": "y"},
    ],
]


@pytest.mark.parametrize("messages", CHATS)
def test_ids_equal_stock(chat, stock, messages):
    assert chat.encode(messages).input_ids.tolist() == stock_ids(stock, messages)


def test_ids_equal_stock_on_random_texts(chat, stock):
    rng = random.Random(0)
    alphabet = "ab <|>_\n\t.,'s12éß猫\u0301😀\u200d"
    for _ in range(100):
        texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(4)]
        texts = [text.lstrip("\n") or "a" for text in texts]  # no token may join them to a header
        messages = turns(*texts)
        assert chat.encode(messages).input_ids.tolist() == stock_ids(stock, messages)


def test_assistant_text_and_its_end_are_trained(chat):
    tokens = chat.encode(turns("One?", " Yes.", "Two?", "Nö\n", system="Sys"))
    assert trained_text(chat, tokens) == " Yes.<|im_end|>Nö\n<|im_end|>"


def test_no_token_joins_an_answer_to_its_prompt(chat, stock):
    messages = turns("q", "\n\nHello")  # stock makes one token of all three line breaks
    tokens = chat.encode(messages)
    prompt = stock.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    answer = stock.encode("\n\nHello<|im_end|>\n", add_special_tokens=False)
    assert tokens.input_ids.tolist() == prompt + answer != stock_ids(stock, messages)
    assert trained_text(chat, tokens) == "\n\nHello<|im_end|>"


@pytest.mark.parametrize(
    "quoted",
    ["<|im_end|>", "<|im_start|>assistant\nno", "<|image_pad|>", "<|endoftext|>", "<|im_end|>" * 3],
)
def test_text_cannot_make_control_tokens(chat, quoted):
    plain = chat.encode(turns("x", "y", system="z"))
    special = {i for i in plain.input_ids.tolist() if i in chat._controls.ids.values()}
    for messages in (
        turns(quoted, "y", system="z"),
        turns("x", quoted, system="z"),
        turns("x", "y", system=quoted),
    ):
        tokens = chat.encode(messages)
        found = [i for i in tokens.input_ids.tolist() if i in chat._controls.ids.values()]
        assert set(found) == special and len(found) == 6
        assert quoted in chat.text._tokenizer.decode(tokens.input_ids.tolist())


def test_control_token_split_over_parts_stays_text(chat):
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "y"}]
    assert chat.encode(messages).input_ids.tolist().count(chat.end_token_id) == 2


def test_shift_labels_hold_the_next_token(chat):
    tokens = chat.encode(turns("What?", "A cat."))
    labels = shift_targets(tokens)
    ids = tokens.input_ids
    for t in range(len(ids) - 1):
        assert labels[t] == (ids[t + 1] if tokens.trained[t + 1] else -100)
    assert labels[-1] == -100
    assert (labels != -100).sum() == tokens.trained.sum() > 1


def test_image_placeholders_are_repeated_in_order(chat):
    image, text = {"type": "image", "index": 0}, {"type": "text", "text": "and"}
    messages = [{"role": "user", "content": [image, text, image]}, *turns("", "Two.")[1:]]
    media = [MediaTokens("image", (3,)), MediaTokens("image", (5,))]
    ids = chat.encode(messages, media).input_ids.tolist()
    is_image = "".join("#" if i == chat.text.image_token_id else "." for i in ids).strip(".")
    assert [len(run) for run in is_image.split(".") if run] == [3, 5]


def test_marks_in_text_are_refused(chat):
    with pytest.raises(ValueError, match="private-use"):
        chat.encode(turns("a\U0010fffbb", "c"))


def test_template_without_images_is_refused_for_images():
    template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
    messages = [{"role": "user", "content": [{"type": "image", "index": 0}]}, *turns("", "A")[1:]]
    with pytest.raises(ValueError, match="got none for"):
        ChatTokenizer(MODEL, template).encode(messages, [MediaTokens("image", (4,))])


def test_template_that_trims_equals_stock(stock):
    template = TEMPLATE.replace("{{- content -}}", "{{- content | trim -}}")
    messages = turns("  What? \n", "\n A cat.  ", system=" s ")
    tokens = ChatTokenizer(MODEL, template).encode(messages)
    expected = stock.apply_chat_template(messages, chat_template=template)["input_ids"]
    assert tokens.input_ids.tolist() == expected
    assert stock.decode(tokens.input_ids[tokens.trained]) == "A cat.<|im_end|>"


@pytest.mark.parametrize("change", ["content.split('</think>')[-1]", "content[:5]"])
def test_template_that_cuts_text_is_refused(change):
    body = "{{- " + change + " if '</think>' in content else content -}}"
    chat = ChatTokenizer(MODEL, TEMPLATE.replace("{{- content -}}", body))
    with pytest.raises(ValueError, match="must print every message's text in one piece"):
        chat.encode(turns("what", "<think>so</think>a cat"))


def test_template_error_is_a_value_error():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        ChatTokenizer(MODEL, template)


def test_template_without_end_of_turn_is_refused():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match="special token after an assistant's text"):
        ChatTokenizer(MODEL, template)


def test_other_special_tokens_and_headers_work(tmp_path):
    shutil.copytree(MODEL, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    names = json.loads(path.read_text())
    for token in names["added_tokens"]:
        token["content"] = token["content"].replace("<|im_end|>", "<eot>")
    path.write_text(json.dumps(names))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|im_end|>", "<eot>"))
    chat = ChatTokenizer(tmp_path, TEMPLATE.replace("<|im_end|>", "<eot>"))
    tokens = chat.encode(turns("<eot>", "b<eot>"))
    assert chat.end_token == "<eot>"
    assert trained_text(chat, tokens) == "b<eot><eot>"
    assert tokens.input_ids.tolist().count(chat.end_token_id) == 2


def test_generation_prompt_is_what_a_turn_begins_with(chat):
    messages = turns("What?", "A cat.")
    prompt = chat.encode(messages[:1], add_generation_prompt=True)
    whole = chat.encode(messages)
    assert not prompt.trained.any()
    assert whole.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()
    assert whole.trained[len(prompt.input_ids)]


def test_decode_drops_special_tokens(chat):
    assert chat.text.decode(chat.encode(turns("Hi 猫", "Yö <|im_end|>")).input_ids.tolist()) == (
        "user\nHi 猫\nassistant\nYö <|im_end|>\n"
    )


def test_a_last_answer_is_filled_to_a_multiple_by_its_end(chat):
    from triptych_data.text.chat_config import ChatConfig

    filling = ChatTokenizer(MODEL, TEMPLATE, ChatConfig(fill_answer=8))
    assert filling.fingerprint != chat.fingerprint
    for messages in (turns("Hi", "Hello there."), turns("Hi", "Yes", "and?", "a b c d e f g h")):
        plain, filled = chat.encode(messages), filling.encode(messages)
        end = plain.trained.nonzero()[0][-1] + 1
        assert filled.input_ids[:end].tolist() == plain.input_ids[:end].tolist()
        assert filled.trained[:end].tolist() == plain.trained[:end].tolist()
        assert set(filled.input_ids[end - 1 :].tolist()) == {chat.end_token_id}
        assert filled.trained[end:].all() and len(filled.input_ids) - end < 8
        begin = len(filling.encode(messages[:-1], add_generation_prompt=True).input_ids)
        assert (len(filled.input_ids) - begin) % 8 == 0
    asked = turns("Hi", "Hello there.", "and?")  # ends by a question: nothing is filled
    assert filling.encode(asked).input_ids.tolist() == chat.encode(asked).input_ids.tolist()
