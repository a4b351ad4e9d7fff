"""Chat messages to token ids and training targets; only the template can make control tokens."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from triptych_data.encoded import IGNORE_INDEX
from triptych_data.text.assemble import (
    ChatTokens,
    MediaTokens,
    assemble,
    assemble_document,
    disassemble,
)
from triptych_data.text.chat_config import ChatConfig
from triptych_data.text.messages import MessageForms, is_trained
from triptych_data.text.template import ChatTemplate, Message
from triptych_data.text.text_tokenizer import TextTokenizer, check_text, load_tokenizer
from triptych_data.text.turns import TurnFinder

__all__ = ["ChatTokenizer", "ChatTokens", "MediaTokens", "message_text", "shift_targets"]

CHAT_VERSION = 2
"""To be raised whenever the same chat, template and tokenizer would give other tokens."""

_AROUND = ("(before)", "(after)")
_PROBE = [{"role": "user", "content": "Hi, there:  12 é\n"}]


class ChatTokenizer:
    """A model folder's tokenizer and chat template, which text inside messages cannot escape.

    Any tokenizer of `tokenizers` and any template that prints each text in one piece will do.
    Ids equal `tokenizer.apply_chat_template(messages, tokenize=True)` of transformers, except that
    a quoted control token is ordinary text, and that no token joins an answer's first letters to
    the prompt before it.

    `text` is the tokenizer by itself, for documents; `options` and `proof` are its.

    Raises ValueError for a template that prints no special token after an assistant's text, and
    for a tokenizer that tiktoken cannot stand in for if it is required.
    """

    def __init__(
        self,
        directory: Path,
        template: str,
        options: ChatConfig | None = None,
        proof: str | None = None,
    ) -> None:
        self._options = options or ChatConfig()
        tokenizer = load_tokenizer(directory)
        variables = {**tokenizer.special_tokens_map, **self._options.variables}
        date = self._options.date
        at = None if date is None else datetime.fromisoformat(date)
        self._template = ChatTemplate(template, str(directory), variables, at)
        self._forms = MessageForms(self._template)
        self._printed: dict[str, str] = {}
        stock = self._stock_probe(tokenizer)
        self.text = TextTokenizer(
            tokenizer,
            str(directory),
            literals=self._template.literals,
            options=self._options,
            proof=proof,
        )
        self._controls = self.text.controls
        self._finder = TurnFinder(self._template, self._controls.special, self._controls.is_risky)
        self.fingerprint = self._make_fingerprint(variables)
        self._check_probe(stock)
        self.end_token = self._find_end_token()
        self.end_token_id = self._controls.ids[self.end_token]

    def encode(
        self,
        messages: Sequence[Message],
        media: Sequence[MediaTokens] = (),
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> ChatTokens:
        """Tokenise a chat; the k-th placeholder of a medium becomes `media[k]`.

        Trained is all that the model has to say in an assistant's turn (what follows the
        generation prompt: text, reasoning, calls) and the token that ends it, in the turns that
        the options select. A turn without text trains nothing, and nothing does with a
        generation prompt. `fill_answer` repeats the end token of a chat that ends by a trained
        turn.

        Raises ValueError if the template refuses, cuts or drops what the messages say, writes a
        trained turn otherwise than it is generated, or prints other media than the chat has.
        """
        trained = set() if add_generation_prompt else self._trained_turns(messages)
        prepared = self._forms.prepare(messages, tools or None)
        self._check_assistants(prepared)
        chat = self._finder.locate(
            prepared, tools or None, trained, add_generation_prompt=add_generation_prompt
        )
        assembly = assemble(chat, trained, media, self._controls)
        tokens = disassemble(self.text.encoder.encode(assembly.anchored), assembly)
        multiple = self._options.fill_answer
        if multiple and len(messages) - 1 in trained and tokens.trained.any():
            return fill_answer(tokens, multiple, self.end_token_id)
        return tokens

    def document(
        self, parts: Sequence[Mapping[str, Any]], media: Sequence[MediaTokens]
    ) -> ChatTokens:
        """Tokenise a document of texts and media, which look as they do in a user's message.

        All of its texts is trained, and the tokenizer's end token behind it; no medium is. Raises
        ValueError if the template does not print a medium where it stands.
        """
        pieces = []
        for part in parts:
            if part["type"] == "text":
                check_text(part["text"])
                pieces.append((part["text"], True))
            else:
                pieces.append((self._print_medium(part["type"]), False))
        assembly = assemble_document(pieces, media, self._controls)
        return self.text.ended(disassemble(self.text.encoder.encode(assembly.anchored), assembly))

    def _print_medium(self, kind: str) -> str:
        """What the template prints for a medium between two texts of a user's."""
        if kind not in self._printed:
            before, after = ({"type": "text", "text": text} for text in _AROUND)
            messages = [{"role": "user", "content": [before, {"type": kind}, after]}]
            rendered = self._template.render(messages, None)
            _, begins, rest = rendered.partition(_AROUND[0])
            between, ends, _ = rest.partition(_AROUND[1])
            if not begins or not ends:
                raise ValueError(
                    f"{self._template.where}: the chat template must print a medium where it "
                    f"stands, got {rendered!r:.200} for one between texts; leave such documents out"
                )
            self._printed[kind] = between
        return self._printed[kind]

    def _make_fingerprint(self, variables: Mapping[str, Any]) -> str:
        """Hash all that ids and targets depend on."""
        settings = {
            "version": CHAT_VERSION,
            "template": self._template.source,
            "variables": variables,
            "controls": self._controls.ids,
            "placeholders": self._controls.placeholders,
            "options": self._options.model_dump(include={"train_turns", "date"}),
        }
        if self._options.fill_answer:
            settings["fill_answer"] = self._options.fill_answer
        digest = hashlib.sha256(self.text.description.encode())
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def _stock_probe(self, tokenizer: Any) -> list[int]:
        """What the stock tokenizer makes of a prompt, before ours changes it."""
        messages = self._forms.prepare(_PROBE, None)
        probe = self._template.render(messages, None, add_generation_prompt=True)
        return tokenizer.backend_tokenizer.encode(probe, add_special_tokens=False).ids

    def _check_probe(self, stock: list[int]) -> None:
        """Refuse a tokenizer that splits a prompt otherwise than at its control tokens."""
        messages = self._forms.prepare(_PROBE, None)
        chat = self._finder.locate(messages, None, (), add_generation_prompt=True)
        assembly = assemble(chat, (), (), self._controls)
        ours = disassemble(self.text.encoder.encode(assembly.anchored), assembly).input_ids.tolist()
        if ours != stock:
            raise ValueError(
                f"{self._template.where}: a tokenizer must split text at its control tokens only, "
                f"got {ours} for a prompt that stock makes {stock}; it is not supported"
            )

    def _find_end_token(self) -> str:
        probe = [*_PROBE, {"role": "assistant", "content": "b"}]
        return self._finder.stop_token(self._forms.prepare(probe, None))

    def _trained_turns(self, messages: Sequence[Message]) -> set[int]:
        """The assistant's messages to train; the last turn is all since the user's before it."""
        roles = [message["role"] for message in messages]
        turns = [i for i, role in enumerate(roles) if role == "assistant"]
        if self._options.train_turns == "last" and turns:
            asked = max((i for i in range(turns[-1]) if roles[i] == "user"), default=-1)
            turns = [i for i in turns if i > asked]
        return {i for i in turns if is_trained(messages[i], f"messages[{i}]")}

    def _check_assistants(self, messages: Sequence[Message]) -> None:
        """Refuse markup given as plain text: the template writes it by tokens of its own, and the
        model would learn to spell it."""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            found = self._controls.markup.search(message_text(message))
            if found is not None:
                raise ValueError(
                    f"messages[{number}]: an assistant's text must not hold lines that begin by "
                    f"{found[1]}, which the chat template prints itself; give reasoning as "
                    "reasoning_content and calls as tool_calls"
                )


def fill_answer(tokens: ChatTokens, multiple: int, end_token_id: int) -> ChatTokens:
    """The tokens with the last trained run made as long as a multiple; what came behind it goes."""
    trained = np.flatnonzero(tokens.trained)
    end = trained[-1] + 1
    gaps = np.flatnonzero(np.diff(trained) > 1)
    length = end - trained[gaps[-1] + 1 if len(gaps) else 0]
    more = -length % multiple
    ids = np.concatenate([tokens.input_ids[:end], np.full(more, end_token_id)])
    return ChatTokens(
        ids.astype(tokens.input_ids.dtype),
        np.concatenate([tokens.trained[:end], np.ones(more, dtype=bool)]),
    )


def shift_targets(tokens: ChatTokens) -> np.ndarray:
    """Return `shift_labels (L,) int64`: position t holds token t + 1 if trained, else -100."""
    labels = np.full(len(tokens.input_ids), IGNORE_INDEX, dtype=np.int64)
    labels[:-1] = np.where(tokens.trained[1:], tokens.input_ids[1:], IGNORE_INDEX)
    return labels


def message_text(message: Message) -> str:
    """Return a message's texts joined, without its media; of a bare call, none."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
