"""Real chat templates and ours in the manner of others, over random and adversarial chats."""

import json
import random
import unicodedata

import pytest
from transformers import AutoTokenizer

from tests.data.model_folders import FAMILIES, TEMPLATES, family_folder, model_folder
from tests.data.packs import MODEL
from triptych_data.look.preview import pieces
from triptych_data.processor import Processor
from triptych_data.sample import RawSample
from triptych_data.text.chat import ChatTokenizer, MediaTokens
from triptych_data.text.chat_config import ChatConfig
from triptych_data.text.template import ChatTemplate, read_template

DAY = "2026-01-02"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: family_folder(root / name, name) for name in FAMILIES}


@pytest.fixture(scope="session")
def chats(folders):
    return {name: tokenizer(folder) for name, folder in folders.items()}


def tokenizer(folder, **options):
    return ChatTokenizer(folder, read_template(folder), ChatConfig(**{"date": DAY, **options}))


def user(text):
    return {"role": "user", "content": text}


def says(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def calls(*arguments, **keys):
    functions = [{"name": "find", "arguments": each} for each in arguments]
    listed = [{"id": f"c{i}", "type": "function", "function": f} for i, f in enumerate(functions)]
    return {"role": "assistant", "content": None, "tool_calls": listed, **keys}


def result(text):
    return {"role": "tool", "tool_call_id": "c0", "name": "find", "content": text}


def tool(**changes):
    function = {
        "name": "find",
        "description": "Finds.",
        "parameters": {
            "type": "object",
            "properties": {"what": {"type": "string", "description": "what"}},
            "required": ["what"],
        },
    }
    return {"type": "function", "function": {**function, **changes}}


def text_of(chat, ids):
    return chat.text._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def trained(chat, messages, **keys):
    tokens = chat.encode(messages, **keys)
    return text_of(chat, tokens.input_ids[tokens.trained])


def stock_render(chat, messages, template, **keys):
    return chat.text._tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **keys
    )


TWO = [user("Hi"), says("Hello."), user("More?"), says("Yes")]
LAST_ONLY = ("gptoss",)  # the history ends turns otherwise than a model does


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "qwen3": "Hello.<|im_end|><think>\n\n</think>\n\nYes<|im_end|>",
        "qwen3_vl": "Hello.<|im_end|>Yes<|im_end|>",
        "phi3": "Hello.<|end|>Yes<|end|>",
        "smolvlm": " Hello.<end_of_utterance> Yes<end_of_utterance>",
        "llama_like": "Hello.<|eot|>Yes<|eot|>",
        "gemma_like": "Hello.</turn>Yes</turn>",
        "deepseek_like": "Hello.<｜eos｜>Yes<｜eos｜>",
        "generation_like": "Hello.<|im_end|>Yes<|im_end|>",
    }.items(),
)
def test_trained_is_what_follows_the_prompt_of_each_turn(chats, name, expected):
    assert trained(chats[name], TWO) == expected
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TWO]
    assert trained(chats[name], parts) == expected


def test_harmony_turns_end_by_return(folders, chats):
    with pytest.raises(ValueError, match=r"with <\|return\|>, got <\|end\|> in the history"):
        chats["gptoss"].encode(TWO)
    last = tokenizer(folders["gptoss"], train_turns="last")
    assert trained(last, TWO) == "<|channel|>final<|message|>Yes<|return|>"
    thought = [user("Hi"), says("Hello.", reasoning_content="hm")]
    assert trained(last, thought) == (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>"
        "Hello.<|return|>"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qwen3",
            '<tool_call>\n{"name": "find", "arguments": {"what": "a"}}\n</tool_call>\n<tool_call>\n'
            '{"name": "find", "arguments": {}}\n</tool_call><|im_end|>'
            "<think>\n\n</think>\n\nIt is.<|im_end|>",
        ),
        (
            "qwen3_vl",
            '<tool_call>\n{"name": "find", "arguments": {"what": "a"}}\n</tool_call>\n<tool_call>\n'
            '{"name": "find", "arguments": {}}\n</tool_call><|im_end|>It is.<|im_end|>',
        ),
        (
            "deepseek_like",
            '<｜call｜>find\n{"what": "a"}<｜call_end｜><｜call｜>find\n{}<｜call_end｜><｜eos｜>'
            "It is.<｜eos｜>",
        ),
    ],
)
@pytest.mark.parametrize("written", [({"what": "a"}, {}), ('{"what": "a"}', "{}")])
def test_calls_are_trained_and_results_are_not(chats, name, expected, written):
    messages = [user("Where?"), calls(*written), result("SECRET"), says("It is.")]
    tools = None if name == "deepseek_like" else [tool()]
    assert trained(chats[name], messages, tools=tools) == expected


def test_a_call_in_harmony(folders):
    messages = [user("Where?"), calls({"what": "a"}), result("SECRET"), says("It is.")]
    assert trained(tokenizer(folders["gptoss"]), messages, tools=[tool()]) == (
        ' to=functions.find<|channel|>commentary json<|message|>{"what": "a"}<|call|>'
        "<|channel|>final<|message|>It is.<|return|>"
    )


@pytest.mark.parametrize("written", ["key", "text"])
def test_reasoning_is_trained_where_it_is_printed(chats, written):
    answer = (
        says("Hello.", reasoning_content="hm")
        if written == "key"
        else says("<think>\nhm\n</think>\n\nHello.")
    )
    chat = chats["qwen3"]
    tokens = chat.encode([user("Hi"), answer])
    assert text_of(chat, tokens.input_ids[tokens.trained]) == (
        "<think>\nhm\n</think>\n\nHello.<|im_end|>"
    )
    assert tokens.input_ids.tolist().count(chat._controls.ids["<think>"]) == 1


def test_dropped_reasoning_is_refused_unless_it_is_not_trained(folders, chats):
    messages = [user("Hi"), says("Hello.", reasoning_content="hm"), user("More?"), says("Yes")]
    with pytest.raises(ValueError, match=r"got it dropped from messages\[1\]"):
        chats["qwen3"].encode(messages)
    prompt = chats["qwen3"].encode(messages[:3], add_generation_prompt=True)
    assert not prompt.trained.any()
    last = tokenizer(folders["qwen3"], train_turns="last")
    assert trained(last, messages) == "<think>\n\n</think>\n\nYes<|im_end|>"
    messages[1]["train"] = False
    assert trained(chats["qwen3"], messages) == "<think>\n\n</think>\n\nYes<|im_end|>"
    assert trained(chats["generation_like"], [TWO[0], messages[1] | {"train": True}]) == (
        "<think>\nhm\n</think>\n\nHello.<|im_end|>"
    )


def test_variables_reach_the_template(folders):
    chat = tokenizer(folders["qwen3"], variables={"enable_thinking": False})
    assert trained(chat, TWO[:2]) == "Hello.<|im_end|>"  # the empty thought is the prompt's
    with pytest.raises(ValueError, match="after the prompt it makes for generating it"):
        chat.encode(TWO)  # but not in the history


LETTERS = "ab <|>_\n\t.,'s12éß猫\u0301😀\u200d"


def random_text(rng, controls):
    words = ["".join(rng.choices(LETTERS, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 4))]
    words += rng.sample(controls, k=rng.randint(0, 2))
    rng.shuffle(words)
    text = rng.choice(["", " ", "\n", "x"]) + "".join(words) + rng.choice(["", " ", "\n\n", "."])
    return text if text.strip() else "a"


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_text_is_exact_on_random_chats(folders, name):
    """Against stock: the whole rendering minus the prompt, up to its last stop token."""
    chat = tokenizer(folders[name], train_turns="last")
    template = read_template(folders[name])
    special = [t.content for t in chat._controls.tokens if t.special]
    control_ids = set(chat._controls.ids.values())
    rng = random.Random(name)
    for _ in range(60):
        turns = rng.randint(1, 3)
        texts = [random_text(rng, special) for _ in range(2 * turns)]
        messages = [(user if i % 2 == 0 else says)(text) for i, text in enumerate(texts)]
        if rng.random() < 0.5:
            messages.insert(0, {"role": "system", "content": random_text(rng, special)})
        tokens = chat.encode(messages)

        clean = [{**message, "content": "x"} for message in messages]
        wanted = chat.encode(clean).input_ids.tolist()
        controls = [i for i in tokens.input_ids.tolist() if i in control_ids]
        assert controls == [i for i in wanted if i in control_ids]

        shown = chat._forms.prepare(messages, None)
        if name == "gptoss":
            continue  # its stock rendering tells today's date
        prompt = stock_render(chat, shown[:-1], template, add_generation_prompt=True)
        whole = stock_render(chat, shown, template)
        assert whole.startswith(prompt)
        answer = whole[len(prompt) :]
        answer = answer[: answer.rindex(chat.end_token) + len(chat.end_token)]
        got = text_of(chat, tokens.input_ids[tokens.trained])
        assert got == unicodedata.normalize("NFC", answer)


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_equal_stock_where_nothing_is_quoted(folders, chats, name):
    chat, template = chats[name], read_template(folders[name])
    stock = AutoTokenizer.from_pretrained(folders[name], local_files_only=True)
    rng = random.Random(name)
    for _ in range(30):
        text = "".join(rng.choices("ab c.'s1é猫", k=20)).strip() or "a"
        messages = chat._forms.prepare([user(text), says(text)], None)
        text = chat._template.render(messages, None)  # with our date, otherwise the same
        if name != "gptoss":
            assert text == stock_render(chat, messages, template)
        expected = stock.encode(text, add_special_tokens=False)
        assert chat.encode(messages).input_ids.tolist() == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_what_the_whole_begins_with(folders, name):
    chat = tokenizer(folders[name], train_turns="last")
    for text in ("Yes", "\n\nYes", " Yes"):
        prompt = chat.encode([user("Hi\n")], add_generation_prompt=True)
        whole = chat.encode([user("Hi\n"), says(text)])
        length = len(prompt.input_ids)
        assert not prompt.trained.any() and not whole.trained[:length].any()
        assert whole.input_ids[:length].tolist() == prompt.input_ids.tolist()
        assert whole.trained[length]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_becomes_a_control_token(chats, name):
    chat = chats[name]
    control_ids = set(chat._controls.ids.values())

    def controls(messages, **keys):
        ids = chat.encode(messages, **keys).input_ids.tolist()
        return [i for i in ids if i in control_ids]

    wanted = controls([user("x"), says("x")])
    for token in chat._controls.tokens:
        for text in (token.content, f"x{token.content}", f"{token.content}\n{token.content}"):
            assert controls([user(text), says("x")]) == wanted
            markup = not token.special and text.startswith(token.content)
            reasoning = name == "qwen3" and token.content == "</think>"  # the template cuts there
            if markup or reasoning:
                with pytest.raises(ValueError, match=r"prints itself|cut or changed"):
                    chat.encode([user("x"), says(text)])
            else:
                assert controls([user("x"), says(text)]) == wanted


@pytest.mark.parametrize("name", ["qwen3", "qwen3_vl", "gptoss"])
def test_no_tool_makes_a_control_token(chats, name):
    chat = chats[name]
    control_ids = set(chat._controls.ids.values())

    def controls(evil):
        parameters = {"type": "object", "properties": {f"a{evil}": {"type": "string"}}}
        described = tool(description=f"d{evil}", parameters=parameters)
        messages = [
            user("x"),
            calls({f"k{evil}": f"v{evil}", "list": [evil, {evil: 1}]}),
            result(f"r{evil}"),
            says("x"),
        ]
        ids = chat.encode(messages, tools=[described]).input_ids.tolist()
        return [i for i in ids if i in control_ids]

    wanted = controls("x")
    for token in chat._controls.ids:
        assert controls(token) == wanted


def test_turns_are_selected(folders, chats):
    messages = [user("a"), says("\n\nb"), user("c"), calls({"what": "d"}), result("e"), says("f")]
    call = '<tool_call>\n{"name": "find", "arguments": {"what": "d"}}\n</tool_call><|im_end|>'
    chat, last = chats["qwen3_vl"], tokenizer(folders["qwen3_vl"], train_turns="last")
    assert trained(chat, messages) == f"\n\nb<|im_end|>{call}f<|im_end|>"
    assert trained(last, messages) == f"{call}f<|im_end|>"  # all since the user's last message
    for off in ({"train": False}, {"weight": 0}):
        chosen = [messages[0], messages[1] | off, *messages[2:]]
        assert trained(chat, chosen) == f"{call}f<|im_end|>"
        assert (chat.encode(chosen).input_ids == chat.encode(messages).input_ids).all()
    assert trained(chat, [*messages[:-1], messages[-1] | {"weight": 1, "train": True}])
    for wrong in ({"train": 1}, {"weight": 0.5}, {"train": "no"}):
        with pytest.raises(ValueError, match=r"messages\[1\]\.(train|weight): must be"):
            chat.encode([messages[0], messages[1] | wrong])


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("change", "messages", "error"),
    [
        (
            ("m.content", "m.content[:3]"),
            [user("abcdef"), says("b")],
            "got that of messages.0. cut",
        ),
        (
            ("m.content", "m.content.split('</think>')[-1]"),
            [user("a"), says("<think>b</think>c")],
            "got that of messages.1. cut",
        ),
        (
            ("in messages", "in messages if m.role != 'system'"),
            [{"role": "system", "content": "s"}, user("a"), says("b")],
            "got none of messages.0.'s content",
        ),
        (
            ("m.content", "m.content + m.content"),
            [user("a"), says("b")],
            "got that of messages.1. repeated",
        ),
        (
            ("m.content", "m.content"),
            [user("a"), calls({})],
            "got none of messages.1.'s tool_calls",
        ),
        (
            ("assistant\n", "assistant\n<think>\n"),
            [user("a"), says("b")],
            "after the prompt it makes",
        ),
        (
            ("m.content", "m.content|length ~ m.content"),
            [user("a"), says("b")],
            "got that of messag",
        ),
        (("m.content", "m.missing.more"), [user("a"), says("b")], "refuses the messages"),
        (("m.content", "1 // 0 ~ m.content"), [user("a"), says("b")], "refuses the messages"),
        (
            ("m.content", "m.content.__class__.mro()"),
            [user("a"), says("b")],
            "refuses the messages",
        ),
        (("m.content", "strftime_now('%Y') + m.content"), [user("a"), says("b")], "data.chat.date"),
    ],
)
def test_templates_that_change_what_is_said_are_refused(tmp_path, change, messages, error):
    template = CHATML.replace(*change)
    folder = model_folder(tmp_path, template)
    with pytest.raises(ValueError, match=error) as refused:
        tokenizer(folder, date=None).encode(messages)
    assert str(folder) in str(refused.value)


CALL = "(m.content or '') + (m.tool_calls[0].function | tojson if m.tool_calls else '')"


def test_arguments_are_no_text_within_json(tmp_path):
    chat = tokenizer(model_folder(tmp_path, CHATML.replace("m.content", CALL)))
    for arguments in ({"what": "é<"}, '{"what":"é<"}'):
        assert trained(chat, [user("a"), calls(arguments)]) == (
            '{"name": "find", "arguments": {"what": "é<"}}<|im_end|>'
        )
    with pytest.raises(ValueError, match=r"messages\[1\].tool_calls\[0\].arguments: must be JSON"):
        chat.encode([user("a"), calls("{what")])


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_control_tokens_that_take_blanks_are_as_in_stock(tmp_path, side):
    folder = model_folder(tmp_path, CHATML)
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    for token in described["added_tokens"]:
        token[side] = True
    path.write_text(json.dumps(described))
    stock = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    messages = [user("a \n"), says("b\n"), user(" c"), says("d ")]
    tokens = tokenizer(folder).encode(messages)
    assert tokens.input_ids.tolist() == stock.apply_chat_template(messages)["input_ids"]
    assert tokens.trained.sum() >= 4


def test_unknown_tools_are_refused(chats):
    with pytest.raises(ValueError, match="must print the record's tools, got none"):
        chats["llama_like"].encode(TWO, tools=[tool()])
    assert len(chats["llama_like"].encode(TWO, tools=[]).input_ids)


def test_a_media_token_is_never_trained():
    image, text = {"type": "image", "index": 0}, {"type": "text", "text": "b"}
    messages = [user([image, text]), says([text, image, text])]
    media = [MediaTokens("image", (3,)), MediaTokens("image", ("<|im_end|>now", 2))]
    chat = tokenizer(MODEL)
    tokens = chat.encode(messages, media)
    assert text_of(chat, tokens.input_ids[tokens.trained]) == "bb<|im_end|>"
    assert (tokens.input_ids == chat.text.image_token_id).sum() == 5
    assert tokens.input_ids.tolist().count(chat.end_token_id) == 3  # one in what a medium becomes
    with pytest.raises(ValueError, match=r"got \['image', 'image'\] for \['image'\]"):
        chat.encode(messages, media[:1])
    with pytest.raises(ValueError, match=r"for \['image', 'video'\]"):
        chat.encode(messages, [media[0], MediaTokens("video", (1,))])


def test_the_tokenizers_own_media_token_is_used(chats):
    chat = chats["smolvlm"]
    assert text_of(chat, [chat.text.image_token_id]) == "<image>"
    messages = [user([{"type": "image", "index": 0}, {"type": "text", "text": "a"}]), says("b")]
    tokens = chat.encode(messages, [MediaTokens("image", (4,))])
    assert (tokens.input_ids == chat.text.image_token_id).sum() == 4


BLOCK = "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    + HEADER
    + BLOCK
    + "{% else %}"
    + HEADER
    + "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "block",
    [
        BLOCK,
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}",
        "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}",
        "{%- generation -%}{{ m.content }}{%- endgeneration -%}{{ '\n<|im_end|>\n' }}",
    ],
)
def test_generation_blocks_are_cut_to_text_and_stop(tmp_path, block):
    template = GENERATION.replace(BLOCK, block)
    chat = tokenizer(model_folder(tmp_path, template))
    gap = "\n" if "'\n<|im_end|>" in block else ""
    assert trained(chat, TWO) == f"Hello.{gap}<|im_end|>Yes{gap}<|im_end|>"
    messages = [*TWO[:3], TWO[3] | {"train": False}]
    assert trained(chat, messages) == f"Hello.{gap}<|im_end|>"
    stock = chat.text._tokenizer.apply_chat_template(TWO, chat_template=template, tokenize=False)
    assert chat._template.render(TWO, None) == stock


def test_generation_blocks_win_over_an_inconsistent_prompt(tmp_path):
    template = GENERATION.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'")
    assert (
        trained(tokenizer(model_folder(tmp_path, template)), TWO) == "Hello.<|im_end|>Yes<|im_end|>"
    )


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("{{ m.content }}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}", "outside"),
        ("{% generation %}{{ m.content }}{% endgeneration %}now<|im_end|>", "'now' between"),
    ],
)
def test_wrong_generation_blocks_are_refused(tmp_path, block, error):
    chat = tokenizer(model_folder(tmp_path, GENERATION.replace(BLOCK, block)))
    with pytest.raises(ValueError, match=error):
        chat.encode(TWO)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.role }}{% if loop.first %}{% break %}{% endif %}{% endfor %}",
        "{{ {'ü': '<&>', 'b': [1, none]} | tojson }}{{ [1] | tojson(indent=2) }}",
        "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ dict(a=1) }}",
        "  {% if tools %}\n  {{ tools[0].function.name }}\n  {% endif %}\n{{ messages[0].role }}",
        "{{ bos_token }}|{{ eos_token }}|{{ messages[0].reasoning_content }}|{{ x is defined }}",
        "{% generation %}{{ messages | length }}{% endgeneration %}",
    ],
)
def test_templates_render_as_in_transformers(folders, source):
    stock = AutoTokenizer.from_pretrained(folders["llama_like"], local_files_only=True)
    messages = [user("a") | {"reasoning": "r"}, says("b")]
    keys = {"tools": [tool()], "add_generation_prompt": True}
    ours = ChatTemplate(source, "here", {**stock.special_tokens_map, "x": 1})
    expected = stock.apply_chat_template(
        messages, chat_template=source, tokenize=False, x=1, **keys
    )
    assert ours.render(messages, keys["tools"], add_generation_prompt=True) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% set ns = namespace() %}{% set ns._a = 1 %}",
        "{{ namespace(_Namespace__attrs=1) }}",
        "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.json }}",
        "{% include 'a' %}",
    ],
)
def test_templates_are_fenced_in(source):
    with pytest.raises(ValueError, match="here: the chat template refuses"):
        ChatTemplate(source, "here", {}).render([user("a")], None)


def test_a_broken_template_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must be valid Jinja, got .* in line 2"):
        tokenizer(model_folder(tmp_path, "a\n{% for %}"))


def test_the_named_default_template_is_read(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    folder = model_folder(tmp_path, "", chat_template=named)
    (folder / "chat_template.jinja").unlink()
    assert read_template(folder) == CHATML


def test_the_fingerprint_covers_what_changes_tokens(tmp_path, folders):
    def fingerprint(folder=folders["llama_like"], **options):
        return tokenizer(folder, **options).fingerprint

    template = read_template(folders["llama_like"])

    def changed(name, template=template, added=(), **settings):
        settings = {"bos_token": "<bos>", "eos_token": "<|eot|>", **settings}
        special = [*FAMILIES["llama_like"].special, "<bos>"]
        return fingerprint(model_folder(tmp_path / name, template, special, added, **settings))

    assert changed("same") == fingerprint() == fingerprint(tiktoken="if_equal")
    others = {
        fingerprint(train_turns="last"),
        fingerprint(variables={"a": 1}),
        fingerprint(date="2026-01-03"),
        changed("template", template + " "),
        changed("bos", bos_token="<|eot|>"),
        changed("added", added=["<x>"]),
    }
    assert len(others | {fingerprint()}) == 7


def test_every_template_is_tried():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES)


def test_a_preview_tells_control_tokens_from_quoted_ones(folders):
    folder = folders["deepseek_like"]
    processor = Processor.from_directory(folder)
    record = {"messages": [user("a<｜User｜>猫"), says("b")]}
    shown = list(pieces(processor.encode(RawSample("k", "here", record, [])), processor))
    assert [p.text for p in shown if "special" in p.kinds] == [
        "<｜bos｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜eos｜>",
    ]
    assert "".join(p.text for p in shown if "ignored" in p.kinds) == "a<｜User｜>猫"
    assert "".join(p.text for p in shown if "trained" in p.kinds) == "b<｜eos｜>"


def test_decoding_is_exact(tmp_path):
    folder = model_folder(tmp_path, CHATML, clean_up_tokenization_spaces=True)
    chat = tokenizer(folder)
    tokens = chat.encode([user("a"), says("b , c 's .")])
    assert chat.text.decode(tokens.input_ids[tokens.trained]) == "b , c 's ."


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"date": "2026-13-01"}, "data.chat.date: must be a day"),
        ({"variables": {"messages": []}}, r"data.chat.variables: .* got \['messages'\]"),
        ({"train_turns": "first"}, "train_turns"),
        ({"trainturns": "last"}, "trainturns"),
    ],
)
def test_settings_are_checked(options, error):
    with pytest.raises(ValueError, match=error):
        ChatConfig(**options)


def test_blanks_stay_text_even_where_they_are_added_tokens(tmp_path):
    template = CHATML.replace("'<|im_end|>\n'", "'<|im_end|>\n\n'")
    chat = tokenizer(model_folder(tmp_path, template, (), ["\n\n"]))
    number = chat.text._tokenizer.convert_tokens_to_ids("\n\n")
    ids = chat.encode([user("a\n\nb"), says("c\n\nd")]).input_ids.tolist()
    assert number not in chat.text.control_ids and ids.count(number) == 4
