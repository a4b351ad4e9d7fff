"""A web page of samples as the loss sees them: each token trained, ignored or special."""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import NamedTuple

from triptych_data.encoded import EncodedSample
from triptych_data.look.preview_media import figures
from triptych_data.processor import Processor
from triptych_data.sample import KINDS, RawSample, is_document, media_parts
from triptych_data.shards.reader import Shards
from triptych_data.text.chat import IGNORE_INDEX

LONGEST_CHARACTER = 8
"""Tokens that one character may be cut into before its bytes are shown as they are."""


class Piece(NamedTuple):
    """What is shown as one: a token mostly, or those that share a character or an image."""

    text: str
    ids: list[int]
    position: int
    kinds: tuple[str, ...]


def build_page(
    shards: Shards,
    model: str | Path,
    num_samples: int,
    *,
    keys: Sequence[str] = (),
    processor: Processor | None = None,
) -> str:
    """The HTML of `num_samples` samples, spread evenly over `shards`, under a model folder.

    With `keys` it shows these samples instead; `processor` is one of the folder with settings of
    its own. Self-contained; whatever the samples hold is
    escaped, and the page may run no script but its own. A sample the model's chat template refuses
    is shown with the reason. Raises ValueError for a key that no sample has.
    """
    processor = processor or Processor.from_directory(model)
    chosen = _with_keys(shards, keys) if keys else _spread(shards.num_samples, num_samples)
    files = resources.files("triptych_data.look")
    template = Template(files.joinpath("preview_template.html").read_text("utf-8"))
    script = files.joinpath("preview.js").read_text("utf-8")
    about = (
        f"{len(chosen)} of {shards.num_samples:,} samples in "
        f"{', '.join(map(str, shards.paths[:3]))}"
        f"{' …' if len(shards.paths) > 3 else ''}, under {model}"
    )
    return template.substitute(
        title="Samples as the loss sees them",
        about=escape(about),
        samples="\n".join(_article(shards.read(i), processor) for i in chosen),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def pieces(encoded: EncodedSample, processor: Processor) -> Iterator[Piece]:
    """The tokens of a sample as text, in order.

    Kinds hold "trained" for a target and "special" for what only the chat template can print; a
    quoted control token is text like any other.
    """
    ids, labels = encoded.input_ids.tolist(), encoded.shift_labels.tolist()
    special, media_ids = processor.control_ids, (processor.image_token_id, processor.video_token_id)
    decode = partial(processor.decode, skip_special_tokens=False)
    start = 0
    while start < len(ids):
        end = start + 1
        text = decode(ids[start:end])
        if ids[start] in media_ids:
            while end < len(ids) and ids[end] == ids[start]:
                end += 1
            kinds: tuple[str, ...] = ("special", "image")
        elif ids[start] in special:
            kinds = ("special",)
        else:
            longer = text
            while "�" in longer and end - start < LONGEST_CHARACTER and end < len(ids):
                end += 1
                longer = decode(ids[start:end])
            if "�" in longer:  # never a character: one token by itself
                end = start + 1
            else:
                text = longer
            kinds = ()
        trained = start > 0 and labels[start - 1] != IGNORE_INDEX
        if trained or not kinds:
            kinds = (*kinds, "trained" if trained else "ignored")
        yield Piece(text, ids[start:end], start, kinds)
        start = end


def _spread(total: int, wanted: int) -> list[int]:
    count = min(wanted, total)
    return [i * total // count for i in range(count)]


def _with_keys(shards: Shards, keys: Sequence[str]) -> list[int]:
    wanted = set(keys)
    found = {key: i for i in range(len(shards)) if (key := shards.keys(i)) in wanted}
    for key in keys:
        if key not in found:
            raise ValueError(
                f"{shards.paths[0]}: a key must be one of the shards', got {key!r}, which no "
                "sample has; check that key and shards belong together"
            )
    return [found[key] for key in keys]


def _article(raw: RawSample, processor: Processor) -> str:
    try:
        encoded = processor.encode(raw)
    except ValueError as error:
        chat = escape(json.dumps(raw.json, ensure_ascii=False, indent=2))
        body = (
            f'<p class="error">{escape(str(error))}</p>{figures(raw, processor)}<pre>{chat}</pre>'
        )
        return f"<article><header><b>{escape(raw.key)}</b></header>{body}</article>"
    tokens = len(encoded.input_ids)
    facts = [
        f"{tokens:,} tokens",
        f"{encoded.num_targets:,} trained ({encoded.num_targets / tokens:.0%})",
        *(f"{count} {kind}{'s' * (count > 1)}" for kind, count in _counts(raw)),
    ]
    header = f"<b>{escape(raw.key)}</b>" + "".join(f"<span>{fact}</span>" for fact in facts)
    shown = pieces(encoded, processor)
    return (
        f"<article><header>{header}</header>{figures(raw, processor)}"
        f"<pre>{_spans(shown)}</pre>{_other_keys(raw)}</article>"
    )


def _counts(raw: RawSample) -> list[tuple[str, int]]:
    kinds = [kind for kind, _ in media_parts(raw.json)]
    return [(kind, kinds.count(kind)) for kind in KINDS if kind in kinds]


def _spans(shown: Iterable[Piece]) -> str:
    spans = []
    for piece in shown:
        text = escape(piece.text).replace("\n", "<i>↵</i>\n")
        if "image" in piece.kinds:
            text += f" × {len(piece.ids)}"
        ids = f"{piece.ids[0]} …" if "image" in piece.kinds else ", ".join(map(str, piece.ids))
        title = f"position {piece.position}, id {ids}, {' '.join(piece.kinds)}"
        spans.append(f'<span class="{" ".join(piece.kinds)}" title="{title}">{text}</span>')
    return "".join(spans)


def _other_keys(raw: RawSample) -> str:
    shown = "text" if is_document(raw.json) else "messages"
    others = {key: value for key, value in raw.json.items() if key != shown}
    if not others:
        return ""
    text = escape(json.dumps(others, ensure_ascii=False, indent=2))
    return f"<details><summary>other keys</summary><pre>{text}</pre></details>"
