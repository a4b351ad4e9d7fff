"""The tokens that steer a model, which only its chat template may print."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from tokenizers import AddedToken

from triptych_data.text.encoder import anchor

# Attributes of transformers' tokenizers, and Qwen's names where a tokenizer has none.
_MEDIA = {
    "image": (("image_token", "context_image_token"), "<|image_pad|>"),
    "video": (("video_token",), "<|video_pad|>"),
    "audio": (("audio_token",), "<|audio_pad|>"),
}


_OLDER_AUDIO = "<|AUDIO|>"  # Qwen2-Audio's, which Aero has and does not name


class Controls:
    """A tokenizer's special tokens, and its other added ones that the template prints.

    `ids` and `anchors` by token, in order of id; `names` by kind of media, and `media_ids` without
    kinds the model does not take; `placeholders`: what the template prints for a medium, and its
    kind. `pattern` finds a control token, `special` a special one, and `markup` one of the others
    that begins a line.
    """

    def __init__(self, tokenizer: Any, literals: str) -> None:
        found = {
            number: token
            for number, token in sorted(tokenizer.added_tokens_decoder.items())
            # A blank is text, whatever else it is: templates are full of them.
            if token.special or (token.content in literals and not token.content.isspace())
        }
        self.tokens: list[AddedToken] = list(found.values())
        self.ids = {token.content: number for number, token in found.items()}
        self.anchors = {token.content: anchor(i) for i, token in enumerate(self.tokens)}
        self.pattern = _any_of(self.ids)
        self.special = _any_of([token.content for token in self.tokens if token.special])
        others = _any_of([token.content for token in self.tokens if not token.special])
        self.markup = re.compile(rf"^[ \t]*{others.pattern}", re.MULTILINE)
        self._edges = {edge for token in self.ids for edge in (token[0], token[-1])}

        names = {
            kind: next(
                filter(None, (getattr(tokenizer, each, None) for each in attributes)), default
            )
            for kind, (attributes, default) in _MEDIA.items()
        }
        if names["audio"] not in self.ids and _OLDER_AUDIO in self.ids:
            names["audio"] = _OLDER_AUDIO
        self.names = names
        self.media_ids = {kind: self.ids[name] for kind, name in names.items() if name in self.ids}
        self.placeholders = {name: kind for kind, name in names.items()}
        begin = getattr(tokenizer, "boi_token", None)
        if begin is not None and names["image"] not in literals:  # Gemma's template prints this one
            self.placeholders[begin] = "image"

    def is_risky(self, text: str) -> bool:
        """Whether `text` could be a part of a control token that holds its first or last letter."""
        return not self._edges.isdisjoint(text)


def _first_named(tokenizer: Any, attributes: Sequence[str]) -> str | None:
    """The token that the tokenizer names by one of these attributes."""
    names = (getattr(tokenizer, attribute, None) for attribute in attributes)
    return next((name for name in names if name), None)


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """A pattern of these tokens, the longest first, in one group; of none, it never matches."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
