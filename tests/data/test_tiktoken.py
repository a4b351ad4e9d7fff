"""Text by tiktoken: the ids of `tokenizers` to the last one, or a reason why not."""

import json
import pickle
import random
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.data.packs import MODEL
from triptych_data.processor import Processor
from triptych_data.text.chat import ChatTokenizer
from triptych_data.text.chat_config import ChatConfig
from triptych_data.text.encoder import CLOSE, OPEN, HuggingFaceEncoder, anchor
from triptych_data.text.template import read_template
from triptych_data.text.tiktoken_encoder import TiktokenEncoder, UnlikeTokenizerError
from triptych_data.text.tiktoken_proof import check_equal, proof_key

pytest.importorskip("tiktoken")

REQUIRED = ChatConfig(tiktoken="require")


def encoders(change=lambda tokenizer: None):
    """Both encoders of the tiny tokenizer, changed."""
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    change(tokenizer)
    backend = Tokenizer.from_str(json.dumps(tokenizer))
    controls = [t for _, t in sorted(backend.get_added_tokens_decoder().items()) if t.special]
    description = backend.to_str()
    reference = HuggingFaceEncoder(backend, controls, "here")
    return TiktokenEncoder(description, controls, reference), reference


def added(content, **flags):
    def change(tokenizer):
        tokens = tokenizer["added_tokens"]
        off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        tokens.append({"id": tokens[-1]["id"] + 1, "content": content, **off, **flags})

    return change


def test_ids_are_equal():
    fast, reference = encoders()
    rng = random.Random(1)
    pieces = [
        "a",
        " the",
        "\n",
        OPEN,
        CLOSE,
        anchor(0),
        anchor(3),
        "é",
        "e\u0301",
        "<|im_end|>",
        "12",
    ]
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=20))
        ids = fast.encode(text)
        assert ids.dtype == np.int64
        assert ids.tolist() == reference.encode(text).tolist()


def test_added_tokens_in_text_are_kept():
    fast, reference = encoders(added("<b>"))
    text = "a <b>bold<b><b"
    assert fast.encode(text).tolist() == reference.encode(text).tolist()
    assert fast.encode(text).tolist().count(415) == 2


def test_whole_chats_are_equal():
    template = read_template(MODEL)
    fast = ChatTokenizer(MODEL, template, REQUIRED)
    plain = ChatTokenizer(MODEL, template)
    assert fast.text.tiktoken_proof and fast.text.tiktoken_refusal is None
    assert plain.text.tiktoken_proof is None
    assert fast.fingerprint == plain.fingerprint
    for text in ("Hi", " a\n\n", "<|im_end|> e\u0301 猫"):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        ours, theirs = fast.encode(messages), plain.encode(messages)
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        assert ours.trained.tolist() == theirs.trained.tolist()


def merge_otherwise(tokenizer):
    """ "ab" merges first, so "abc" is never made; tiktoken makes any token of two neighbours."""
    model = tokenizer["model"]
    model["vocab"] = {t: i for i, t in enumerate(t for t in model["vocab"] if len(t) == 1)}
    model["merges"] = [["a", "b"], ["b", "c"], ["a", "bc"]]
    model["vocab"] |= {"ab": 256, "bc": 257, "abc": 258}


def blanks_together(tokenizer):
    split = tokenizer["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\s+(?!\S)|", "")


def test_other_merges_are_found():
    fast, reference = encoders(merge_otherwise)
    with pytest.raises(UnlikeTokenizerError, match="gives other ids for 'abc'"):
        check_equal(fast, reference)


def test_another_split_is_found():
    _, reference = encoders()
    fast, _ = encoders(blanks_together)
    with pytest.raises(UnlikeTokenizerError, match="gives other ids for"):
        check_equal(fast, reference)


def test_missing_normalisation_is_found():
    _, reference = encoders()
    fast, _ = encoders(lambda tokenizer: tokenizer.update(normalizer=None))
    with pytest.raises(UnlikeTokenizerError, match="gives other ids for"):
        check_equal(fast, reference)


def _set(*path, value):
    def change(tokenizer):
        place = tokenizer
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


SPLITS = ("pre_tokenizer", "pretokenizers")
NFC_THEN_LOWER = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set("normalizer", value={"type": "Lowercase"}), "normalizer is Lowercase"),
        (_set("normalizer", value=NFC_THEN_LOWER), "normalizer is Lowercase"),
        (_set("pre_tokenizer", value=None), "no pre-tokenizer"),
        (_set("pre_tokenizer", value={"type": "Whitespace"}), "not ByteLevel"),
        (_set(*SPLITS, 0, "behavior", value="Removed"), "does not isolate"),
        (_set(*SPLITS, 0, "pattern", value={"String": " "}), "does not match a regular"),
        (_set(*SPLITS, 1, "use_regex", value=True), "in 2 steps"),
        (_set(*SPLITS, 1, "add_prefix_space", value=True), "without prefix space"),
        (_set("model", "byte_fallback", value=True), "not plain byte-level BPE"),
        (_set("model", "end_of_word_suffix", value="</w>"), "where words begin or end"),
        (added("<b>", lstrip=True), "looks at its neighbours"),
        (added("<b>", normalized=True), "is found after NFC"),
        (added("<b>", rstrip=True, special=True), "takes blanks beside it"),
    ],
)
def test_other_tokenizers_are_refused(change, reason):
    with pytest.raises(UnlikeTokenizerError, match=reason):
        encoders(change)


def test_a_vocabulary_without_all_bytes_is_refused():
    def change(tokenizer):
        tokenizer["model"]["vocab"] = {"a": 0}
        tokenizer["model"]["merges"] = []

    with pytest.raises(UnlikeTokenizerError, match="lacks 255 of the 256 bytes"):
        encoders(change)


def test_the_pattern_of_gpt2_is_known():
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    fast, reference = encoders(_set("pre_tokenizer", value={**byte_level, "use_regex": True}))
    for text in ("It's 12ab's,  \n\nx ", "'re !?  é"):
        assert fast.encode(text).tolist() == reference.encode(text).tolist()


def test_whole_words_may_win_over_merges():
    def change(tokenizer):
        tokenizer["model"]["ignore_merges"] = True
        tokenizer["model"]["vocab"]["unmerged"] = 500

    fast, reference = encoders(change)
    assert fast.encode("unmerged").tolist() == reference.encode("unmerged").tolist() == [500]
    assert fast.encode("a unmerged").tolist() == reference.encode("a unmerged").tolist()


def test_ids_that_anchors_would_take_are_refused():
    with pytest.raises(ValueError, match="here: a tokenizer's ids must have no holes, got 420"):
        encoders(lambda tokenizer: tokenizer["model"]["vocab"].update(unmerged=420))


def test_what_tiktoken_gives_up_on_is_encoded_all_the_same():
    fast, reference = encoders()
    text = " " * 1_000_000  # more than its regular expressions have stack for
    with pytest.raises(ValueError, match="stack"):
        fast._encoding.encode_to_numpy(text)
    assert np.array_equal(fast.encode(f"a{OPEN}{text}"), reference.encode(f"a{OPEN}{text}"))


def test_require_names_the_reason_and_if_equal_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    template = read_template(MODEL)
    with pytest.raises(ValueError, match=r"data.chat.tiktoken: .*pip install 'triptych-data\[tik"):
        ChatTokenizer(MODEL, template, REQUIRED)
    chat = ChatTokenizer(MODEL, template, ChatConfig(tiktoken="if_equal"))
    assert "not installed" in chat.text.tiktoken_refusal and chat.text.tiktoken_proof is None
    assert "not installed" in caplog.text
    assert chat.encode([{"role": "user", "content": "a"}]).input_ids.size


def test_a_proof_is_taken_over_by_copies(monkeypatch):
    processor = Processor.from_directory(MODEL, chat=REQUIRED)
    proof = processor._chat.text.tiktoken_proof
    monkeypatch.setattr("triptych_data.text.text_tokenizer.check_equal", _fail)
    copy = pickle.loads(pickle.dumps(processor))
    assert copy._chat.text.tiktoken_proof == proof
    with pytest.raises(AssertionError, match="proven again"):
        ChatTokenizer(MODEL, read_template(MODEL), REQUIRED, "another tokenizer's proof")


def _fail(*_):
    raise AssertionError("proven again")


def test_a_proof_is_of_one_tokenizer():
    assert len({proof_key("a"), proof_key("b")}) == 2
