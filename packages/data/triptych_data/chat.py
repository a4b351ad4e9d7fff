"""Chat messages to token ids and training targets; only the template can make control tokens."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from triptych_data.assemble import ChatTokens, MediaTokens, assemble, disassemble
from triptych_data.chat_config import ChatConfig
from triptych_data.controls import Controls
from triptych_data.encoder import HuggingFaceEncoder, TextEncoder
from triptych_data.messages import MessageForms, is_trained
from triptych_data.template import ChatTemplate, Message
from triptych_data.tiktoken_encoder import TiktokenEncoder, UnlikeTokenizerError
from triptych_data.tiktoken_proof import check_equal, proof_key
from triptych_data.turns import TurnFinder

__all__ = ["ChatTokenizer", "ChatTokens", "MediaTokens", "message_text", "shift_targets"]

IGNORE_INDEX = -100
CHAT_VERSION = 2
"""To be raised whenever the same chat, template and tokenizer would give other tokens."""

_log = logging.getLogger(__name__)
_PROBE = [{"role": "user", "content": "Hi, there:  12 é\n"}]


class ChatTokenizer:
    """A model folder's tokenizer and chat template, which text inside messages cannot escape.

    Any tokenizer of `tokenizers` and any template that prints each text in one piece will do.
    Ids equal `tokenizer.apply_chat_template(messages, tokenize=True)` of transformers, except that
    a quoted control token is ordinary text, and that no token joins an answer's first letters to
    the prompt before it.

    `options.tiktoken` asks for a faster encoder that is proven to give the same ids; `proof` is
    that of another process, `tiktoken_proof` ours, None if it is not used, and `tiktoken_refusal`
    why not.

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
        from transformers import AutoTokenizer

        self._options = options or ChatConfig()
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        variables = {**self._tokenizer.special_tokens_map, **self._options.variables}
        date = self._options.date
        at = None if date is None else datetime.fromisoformat(date)
        self._template = ChatTemplate(template, str(directory), variables, at)
        self._controls = Controls(self._tokenizer, self._template.literals)
        self._forms = MessageForms(self._template)
        self._finder = TurnFinder(self._template, self._controls.special, self._controls.is_risky)
        self.fingerprint = self._make_fingerprint(variables)
        self.tiktoken_proof: str | None = None
        self.tiktoken_refusal: str | None = None
        self._encoder = self._make_encoder(proof)

        self.image_token_id = self._controls.media_ids.get("image", -1)  # -1: takes none
        self.video_token_id = self._controls.media_ids.get("video", -1)
        self.audio_token_id = self._controls.media_ids.get("audio", -1)
        self.end_token = self._find_end_token()
        self.end_token_id = self._controls.ids[self.end_token]
        pad = self._tokenizer.pad_token_id
        self.pad_token_id: int = self.end_token_id if pad is None else pad

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
        generation prompt.

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
        return disassemble(self._encoder.encode(assembly.anchored), assembly)

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids that only the template can make."""
        return frozenset(self._controls.ids.values())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids` to the letter, without special tokens unless asked for."""
        return self._tokenizer.decode(
            list(ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,  # some tokenizers ask for "a ." to become "a."
        )

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
        digest = hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode())
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def _make_encoder(self, proof: str | None) -> TextEncoder:
        """Our encoder, after a look that it splits a text as the stock tokenizer does."""
        description = self._tokenizer.backend_tokenizer.to_str()
        encoder = self._make_plain_encoder()
        if self._options.tiktoken == "off":
            return encoder
        try:
            fast = TiktokenEncoder(description, self._controls.tokens, encoder)
            self.tiktoken_proof = proof_key(description)
            if proof != self.tiktoken_proof:
                check_equal(fast, encoder)
            return fast
        except UnlikeTokenizerError as error:
            self.tiktoken_proof, self.tiktoken_refusal = None, str(error)
            if self._options.tiktoken == "require":
                raise ValueError(
                    f"data.chat.tiktoken: require needs a tokenizer tiktoken can stand in for, got "
                    f"{self._template.where}: {error}; set it to off"
                ) from error
            _log.warning("%s: text is not encoded by tiktoken: %s", self._template.where, error)
            return encoder

    def _make_plain_encoder(self) -> HuggingFaceEncoder:
        backend = self._tokenizer.backend_tokenizer
        messages = self._forms.prepare(_PROBE, None)
        probe = self._template.render(messages, None, add_generation_prompt=True)
        stock = backend.encode(probe, add_special_tokens=False).ids
        where = self._template.where
        encoder = HuggingFaceEncoder(backend, self._controls.tokens, where)
        chat = self._finder.locate(messages, None, (), add_generation_prompt=True)
        assembly = assemble(chat, (), (), self._controls)
        ours = disassemble(encoder.encode(assembly.anchored), assembly).input_ids.tolist()
        if ours != stock:
            raise ValueError(
                f"{where}: a tokenizer must split text at its control tokens only, got {ours} for "
                f"a prompt that stock makes {stock}; it is not supported"
            )
        return encoder

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
