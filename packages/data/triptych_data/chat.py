"""Chat messages to token ids and training targets; only the template can make control tokens."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IGNORE_INDEX = -100
Message = Mapping[str, Any]

# Private-use characters of the last plane, wrapped around every text before the template is
# rendered: they tell afterwards which characters the template made and which it only quoted.
_QUOTED, _TRAINED, _END = "\U0010fffb", "\U0010fffc", "\U0010fffd"
_MARKS = re.compile(f"[{_QUOTED}{_TRAINED}{_END}]")
_SPANS = re.compile(f"([{_QUOTED}{_TRAINED}])([^{_QUOTED}{_TRAINED}{_END}]*){_END}")


_CUT_TEXT = (
    "the chat template must print every message's text in one piece, got it cut; it may treat "
    "some words of this sample (such as </think>) specially: use a template that does not"
)


class ChatTokens(NamedTuple):
    """A tokenised chat: `input_ids (L,) int64`, and `trained (L,) bool` where a loss is taken."""

    input_ids: np.ndarray
    trained: np.ndarray


class _Span(NamedTuple):
    text: str
    kind: str | None  # _QUOTED or _TRAINED for a message's text, None for the template's own


class ChatTokenizer:
    """A model folder's tokenizer and chat template, which text inside messages cannot escape.

    Ids equal `tokenizer.apply_chat_template(messages, tokenize=True)` of transformers wherever no
    message quotes a special token; a quoted one is ordinary text here. The template must print
    each text in one piece, trimmed or not.

    Raises ValueError for a template that prints no special token after an assistant's text.
    """

    def __init__(self, directory: Path, template: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._template = template
        self._backend = self._tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True  # what is honoured, `tokenize` splits off itself
        added = self._tokenizer.added_tokens_decoder
        self._special = {token.content: i for i, token in added.items() if token.special}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

        self.image_token = getattr(self._tokenizer, "image_token", None) or "<|image_pad|>"
        self.image_token_id = self._special.get(self.image_token, -1)  # -1: takes no images
        self.end_token = self._find_end_token(directory)
        self.end_token_id = self._special[self.end_token]
        pad = self._tokenizer.pad_token_id
        self.pad_token_id: int = self.end_token_id if pad is None else pad

    def encode(
        self,
        messages: Sequence[Message],
        image_lengths: Sequence[int] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> ChatTokens:
        """Tokenise a chat; the k-th image placeholder is repeated `image_lengths[k]` times.

        Trained are the tokens that begin inside an assistant's text, and the token that ends its
        turn. A turn without text trains nothing.

        Raises ValueError if a text holds one of our marks, or the template refuses or rewrites the
        messages, or prints another number of images than they have.
        """
        return self._tokenize(self._render(messages, add_generation_prompt), image_lengths)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _find_end_token(self, directory: Path) -> str:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        spans = self._render(probe, add_generation_prompt=False)
        last = max(i for i, span in enumerate(spans) if span.kind == _TRAINED)
        found = self._special_pattern.search("".join(span.text for span in spans[last + 1 :]))
        if found is None:
            raise ValueError(
                f"{directory}: the chat template must print a special token after an assistant's "
                "text, got none; without it the model cannot learn to stop"
            )
        return found[0]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[_Span]:
        # Rendering twice costs ~0.1 ms and proves that our marks changed nothing the template does.
        plain = self._apply_template(
            [_map_texts(message, lambda text: text) for message in messages], add_generation_prompt
        )
        if _MARKS.search(plain):
            raise ValueError(
                "message text must not contain the private-use characters U+10FFFB to U+10FFFD, "
                "got one; remove it"
            )
        for clean in (str, str.strip):  # some templates trim
            marked = self._apply_template(
                [_mark(message, clean) for message in messages], add_generation_prompt
            )
            if _MARKS.sub("", marked) == plain:
                return _split_spans(marked)
        raise ValueError(_CUT_TEXT)

    def _apply_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    def _tokenize(self, spans: list[_Span], image_lengths: Sequence[int]) -> ChatTokens:
        ids: list[int] = []
        trained: list[bool] = []
        lengths = iter(image_lengths)
        stretch: list[_Span] = []  # since the last special token
        turn_is_trained = False
        num_images = 0
        for span in spans:
            if span.kind is not None:
                turn_is_trained = span.kind == _TRAINED
                stretch.append(span)
                continue
            for i, text in enumerate(self._special_pattern.split(span.text)):
                if i % 2 == 0:  # between two special tokens
                    stretch.append(_Span(text, None))
                    continue
                self._encode_stretch(stretch, ids, trained)
                stretch.clear()
                is_image = text == self.image_token
                num_images += is_image
                count = next(lengths, 0) if is_image else 1
                ids.extend([self._special[text]] * count)
                ends_turn = turn_is_trained and text == self.end_token
                trained.extend([ends_turn] * count)
                turn_is_trained = turn_is_trained and not ends_turn
        self._encode_stretch(stretch, ids, trained)
        if num_images != len(image_lengths):
            raise ValueError(
                f"the chat template must print one {self.image_token} per image, got {num_images} "
                f"for {len(image_lengths)} images; use a template that supports images"
            )
        return ChatTokens(np.array(ids, dtype=np.int64), np.array(trained, dtype=bool))

    def _encode_stretch(self, stretch: list[_Span], ids: list[int], trained: list[bool]) -> None:
        """Encode neighbouring spans as one string, as stock does: tokens may cross borders."""
        text = "".join(span.text for span in stretch)
        if not text:
            return
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids.extend(encoding.ids)
        begins_in_trained = np.zeros(len(text), dtype=bool)
        begin = 0
        for span in stretch:
            begins_in_trained[begin : begin + len(span.text)] = span.kind == _TRAINED
            begin += len(span.text)
        if begins_in_trained.any():
            trained.extend(begins_in_trained[[start for start, _ in encoding.offsets]].tolist())
        else:
            trained.extend([False] * len(encoding.ids))


def shift_targets(tokens: ChatTokens) -> np.ndarray:
    """Return `shift_labels (L,) int64`: position t holds token t + 1 if trained, else -100."""
    labels = np.full(len(tokens.input_ids), IGNORE_INDEX, dtype=np.int64)
    labels[:-1] = np.where(tokens.trained[1:], tokens.input_ids[1:], IGNORE_INDEX)
    return labels


def message_text(message: Message) -> str:
    """Return a message's texts joined, without its media."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _mark(message: Message, clean: Callable[[str], str]) -> dict[str, Any]:
    start = _TRAINED if message["role"] == "assistant" else _QUOTED

    def wrap(text: str) -> str:
        text = clean(text)
        return f"{start}{text}{_END}" if text else ""  # templates ask whether there is any text

    return _map_texts(message, wrap)


def _map_texts(message: Message, change: Callable[[str], str]) -> dict[str, Any]:
    """Return the message as templates expect it, each text changed by `change`."""
    content = message["content"]
    if isinstance(content, str):
        return {"role": message["role"], "content": change(content)}
    parts = [
        {"type": "text", "text": change(part["text"])}
        if part["type"] == "text"
        else {"type": part["type"]}
        for part in content
    ]
    return {"role": message["role"], "content": parts}


def _split_spans(marked: str) -> list[_Span]:
    spans, end = [], 0
    for match in _SPANS.finditer(marked):
        spans.append(_Span(marked[end : match.start()], None))
        spans.append(_Span(match[2], match[1]))
        end = match.end()
    spans.append(_Span(marked[end:], None))
    # A template that splits a text leaves half a pair behind; half-known spans are worse than none.
    if any(_MARKS.search(span.text) for span in spans if span.kind is None):
        raise ValueError(_CUT_TEXT)
    return spans
