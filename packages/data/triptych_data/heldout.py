"""Held-out samples as questions: what is asked, what is expected, and how to show it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych_data.batch import Batch, Finish
from triptych_data.encoded import EncodedSample
from triptych_data.loader import eval_batches
from triptych_data.look.preview_media import data_uri
from triptych_data.processor import Processor
from triptych_data.sample import is_document, media_parts
from triptych_data.shards.reader import Shards
from triptych_data.text.chat import message_text


@dataclass(frozen=True, slots=True)
class Asked:
    """A held-out sample seen as a question: what it is asked, and how the answer is scored.

    Of the sample's JSON: `kind` is `question`, or "all"; `metric` and `choices` as they are there,
    `references` are `answers`, or the last turn's text; `source`, or the name of the shard's
    folder.
    """

    index: int
    kind: str
    expected: str
    metric: str
    references: tuple[str, ...]
    choices: tuple[str, ...]
    source: str
    where: str


def ask(index: int, record: dict[str, Any], where: str) -> Asked:
    """A chat that ends with the assistant's answer, as a question.

    Raises ValueError, beginning with `where`, for fields of another type than a question's.
    """
    expected = message_text(record["messages"][-1])
    metric = record.get("metric", "exact_match")
    if not isinstance(metric, str):
        raise ValueError(f"{where}: metric must be a name, got {metric!r}; write it as a string")
    return Asked(
        index=index,
        kind=str(record.get("question", "all")),
        expected=expected,
        metric=metric,
        references=_texts(record, "answers", where) or (expected,),
        choices=_texts(record, "choices", where),
        source=str(record.get("source") or Path(where.split(": sample ")[0]).parent.name),
        where=where,
    )


def _texts(record: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """A field that is a list of strings, or is not there."""
    if name not in record:
        return ()
    texts = record[name]
    if not isinstance(texts, list) or not texts or not all(isinstance(x, str) for x in texts):
        raise ValueError(
            f'{where}: {name} must be a list of strings, got {texts!r}; write "{name}": ["…", …] '
            "or leave it out"
        )
    return tuple(texts)


class Heldout:
    """The samples of held-out shards whose last turn is an assistant's answer.

    At most `limit` of them, spread evenly over the shards. Samples are read and decoded when
    asked for, so a large set costs no memory. `finish` is done to every batch.
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        processor: Processor,
        *,
        seq_len: int,
        rank: int,
        world_size: int,
        limit: int,
        finish: Finish | None = None,
    ) -> None:
        self._shards = Shards.open(shards)
        self._processor = processor
        self._seq_len = seq_len
        self._rank = rank
        self._world_size = world_size
        self._finish = finish
        count = self._shards.num_samples
        wanted = [i * count // limit for i in range(limit)] if limit < count else range(count)
        records = ((i, self._shards.read_json(i)) for i in wanted)
        self.questions = [
            ask(i, record, self._shards.where(i))
            for i, record in records
            if not is_document(record) and record["messages"][-1]["role"] == "assistant"
        ]

    def batches(self) -> Iterator[Batch]:
        """This rank's packs of all held-out samples; equally many on every rank."""
        ranks = self._rank, self._world_size
        return eval_batches(
            self._shards.paths, self._processor, self._seq_len, *ranks, self._finish
        )

    def prompt(self, index: int) -> EncodedSample:
        """The sample up to and including the generation prompt, encoded."""
        return self._processor.encode_prompt(self._shards.read(index))[0]

    def describe(self, index: int) -> dict[str, Any]:
        """For people: the sample's key, its last question, and its images as data URIs."""
        raw = self._shards.read(index)
        return {
            "key": raw.key,
            "prompt": message_text(raw.json["messages"][-2]),
            "images": [
                data_uri(raw.media[index])
                for kind, index in media_parts(raw.json)
                if kind == "image"
            ],
        }
