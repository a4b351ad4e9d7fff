"""The same token ids by tiktoken, several times as fast: built from a tokenizer, then proven."""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken

from triptych_data.text.encoder import ANY_ANCHOR, TextEncoder, anchor_id

_GPT2 = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
)


class UnlikeTokenizerError(ValueError):
    """Why tiktoken cannot stand in for a tokenizer."""


class TiktokenEncoder:
    """Encodes anchored text as `HuggingFaceEncoder` does, for byte-level BPE tokenizers.

    `description` is a backend's `to_str()`, before the HuggingFaceEncoder `reference` changed it;
    that one takes what tiktoken gives up on (a million blanks in a row). Raises
    UnlikeTokenizerError for a tokenizer of another kind, or without tiktoken; whether one of this
    kind gives the same ids, `find_difference` tells.
    """

    def __init__(
        self, description: str, controls: Sequence[AddedToken], reference: TextEncoder
    ) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise UnlikeTokenizerError(
                "tiktoken is not installed (pip install 'triptych-data[tiktoken]')"
            ) from error
        tokenizer = json.loads(description)
        names = {token.content for token in controls}
        others = [token for token in tokenizer["added_tokens"] if token["content"] not in names]
        self._others = {token["content"]: token["id"] for token in others}
        self._reference = reference
        self._nfc = _normalizes(tokenizer["normalizer"])
        _check_added(others, controls, self._nfc)
        longest_first = sorted(map(re.escape, self._others), key=len, reverse=True)
        self._split = re.compile("(" + "|".join([ANY_ANCHOR, *longest_first]) + ")")
        ranks, self._ids = _ranks(tokenizer["model"])
        self._encoding = tiktoken.Encoding(
            "triptych",
            pat_str=_pattern(tokenizer["pre_tokenizer"]),
            mergeable_ranks=ranks,
            special_tokens={},
        )

    def words(self) -> list[str]:
        """Return the vocabulary as text; a token of broken UTF-8 holds replacement characters."""
        return [self._encoding.decode([rank]) for rank in range(len(self._ids))]

    def encode(self, anchored: str) -> np.ndarray:
        """Return token ids (int64), below 0 for borders and anchors."""
        chunks = [np.zeros(0, dtype=np.int64)]
        for i, part in enumerate(self._split.split(anchored)):
            if i % 2:
                number = self._others.get(part)
                chunks.append(np.array([anchor_id(part) if number is None else number]))
            elif part:
                chunks.append(self._encode_text(part))
        return np.concatenate(chunks)

    def _encode_text(self, text: str) -> np.ndarray:
        normal = text
        if self._nfc and not unicodedata.is_normalized("NFC", text):
            normal = unicodedata.normalize("NFC", text)
        try:
            return self._ids[self._encoding.encode_to_numpy(normal)]
        except ValueError:  # its regular expressions have a bounded stack
            return self._reference.encode(text)


def _normalizes(normalizer: Mapping[str, Any] | None) -> bool:
    """Whether the tokenizer brings text into NFC; else it must not change it at all."""
    if normalizer is None:
        return False
    if normalizer["type"] == "Sequence":
        each = [_normalizes(step) for step in normalizer["normalizers"]]  # all have to be known
        return any(each)
    if normalizer["type"] == "NFC":
        return True
    raise UnlikeTokenizerError(f"its normalizer is {normalizer['type']}, not NFC or none")


def _check_added(
    others: Sequence[Mapping[str, Any]], controls: Sequence[AddedToken], nfc: bool
) -> None:
    for token in others:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise UnlikeTokenizerError(f"its token {token['content']!r} looks at its neighbours")
        if token["normalized"] and nfc:
            raise UnlikeTokenizerError(f"its token {token['content']!r} is found after NFC")
    for control in controls:
        if control.lstrip or control.rstrip:
            raise UnlikeTokenizerError(f"its token {control.content!r} takes blanks beside it")


def _pattern(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """The one regular expression that cuts text before merges."""
    if pre_tokenizer is None:
        raise UnlikeTokenizerError("it has no pre-tokenizer, so that it is not byte-level")
    steps = (
        pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    )
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise UnlikeTokenizerError("its last pre-tokenizer is not ByteLevel without prefix space")
    if not splits and last["use_regex"]:
        return _GPT2
    if len(splits) != 1 or last["use_regex"]:
        raise UnlikeTokenizerError(f"it cuts text in {len(steps)} steps, where tiktoken has one")
    split = splits[0]
    if split["type"] != "Split" or (split["behavior"], split["invert"]) != ("Isolated", False):
        raise UnlikeTokenizerError("its pre-tokenizer does not isolate what it matches")
    pattern = split["pattern"].get("Regex")
    if pattern is None:
        raise UnlikeTokenizerError("its pre-tokenizer does not match a regular expression")
    return str(pattern)


def _ranks(model: Mapping[str, Any]) -> tuple[dict[bytes, int], np.ndarray]:
    """tiktoken's table, bytes to rank (the order of merging), and `(num_ranks,)` the ranks' ids."""
    if model["type"] != "BPE" or model["dropout"] or model["byte_fallback"]:
        raise UnlikeTokenizerError("its model is not plain byte-level BPE")
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise UnlikeTokenizerError("its model marks where words begin or end")
    vocabulary: dict[str, int] = model["vocab"]
    letters = _byte_letters()
    missing = [letter for letter in letters if letter not in vocabulary]
    if missing:
        raise UnlikeTokenizerError(f"its vocabulary lacks {len(missing)} of the 256 bytes")
    merges = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
    # A token ranks by the first merge that makes it.
    order = dict.fromkeys([*letters, *(left + right for left, right in merges)])
    if model["ignore_merges"]:  # then a whole word that is a token stays one, merges or not
        order |= dict.fromkeys(sorted(vocabulary, key=vocabulary.__getitem__))
    byte_of = {letter: byte for byte, letter in enumerate(letters)}
    try:
        ranks = {bytes(map(byte_of.__getitem__, token)): i for i, token in enumerate(order)}
        ids = [vocabulary[token] for token in order]
    except KeyError as error:
        raise UnlikeTokenizerError(f"its vocabulary holds {error}, which is no byte") from error
    return ranks, np.array(ids, dtype=np.int64)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies: itself if printable Latin-1,
    else the next one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, spare = [], 0x100
    for byte in range(256):
        letters.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return letters
