"""A model folder's tokenizer over text in which no control token can be spelt; documents."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triptych_data.text.assemble import ChatTokens
from triptych_data.text.chat_config import ChatConfig
from triptych_data.text.controls import Controls
from triptych_data.text.encoder import HuggingFaceEncoder, TextEncoder
from triptych_data.text.marks import RESERVED, RESERVED_TEXT
from triptych_data.text.tiktoken_encoder import TiktokenEncoder, UnlikeTokenizerError
from triptych_data.text.tiktoken_proof import check_equal, proof_key

_TEXT_VERSION = 1
"""To be raised whenever the same document and tokenizer would give other tokens."""

_log = logging.getLogger(__name__)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a local model folder. Raises ValueError for one that cannot be read."""
    from transformers import AutoTokenizer

    # What broken files make transformers and tokenizers raise is of any kind.
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{directory}: must hold a tokenizer that transformers reads without code of the "
            f"folder, got {type(error).__name__}: {reason}; fetch its files again"
        ) from error


def check_text(text: str) -> None:
    """Raise ValueError for a text with characters that stand for control tokens here."""
    if RESERVED.search(text):
        raise ValueError(RESERVED_TEXT)


class TextTokenizer:
    """A tokenizer, which it changes, whose control tokens are ordinary text in any text.

    Control tokens are the special ones, and added ones that are among `literals`, the text that a
    chat template prints. `options.tiktoken` asks for a faster encoder that is proven to give the
    same ids; `proof` is that of another process, `tiktoken_proof` ours, None if it is not used, and
    `tiktoken_refusal` why not.

    Raises ValueError for a tokenizer that tiktoken cannot stand in for if it is required.
    """

    def __init__(
        self,
        tokenizer: Any,
        where: str,
        *,
        literals: str = "",
        options: ChatConfig | None = None,
        proof: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._where = where
        self.controls = Controls(tokenizer, literals)
        self.description: str = tokenizer.backend_tokenizer.to_str()
        self.fingerprint = self._make_fingerprint()
        self.vocab_size = 1 + max(tokenizer.get_vocab().values())  # before the encoder adds some
        self.tiktoken_proof: str | None = None
        self.tiktoken_refusal: str | None = None
        self.encoder = self._make_encoder(options or ChatConfig(), proof)
        self.image_token_id = self.controls.media_ids.get("image", -1)  # -1: takes none
        self.video_token_id = self.controls.media_ids.get("video", -1)
        self.audio_token_id = self.controls.media_ids.get("audio", -1)
        # What a processor puts around an image's tokens, where the template does not: InternVL's.
        self.image_borders: tuple[str, str] = (
            getattr(tokenizer, "start_image_token", None) or "",
            getattr(tokenizer, "end_image_token", None) or "",
        )
        # What it puts around the tokens of a video's sound, within those around the video's.
        self.sound_borders: tuple[str, str] = (
            getattr(tokenizer, "audio_bos_token", None) or "",
            getattr(tokenizer, "audio_eos_token", None) or "",
        )
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.pad_token_id: int | None = tokenizer.pad_token_id

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids that no text can make."""
        return frozenset(self.controls.ids.values())

    def document(self, text: str) -> ChatTokens:
        """Tokenise a document: its text and the tokenizer's end token, all of them trained.

        No token of a beginning is put before it. Raises ValueError if there is no end token, and
        for text with characters that stand for control tokens here.
        """
        check_text(text)
        ids = self.encoder.encode(text)
        return self.ended(ChatTokens(ids, np.ones(len(ids), dtype=bool)))

    def ended(self, tokens: ChatTokens) -> ChatTokens:
        """A document's tokens with the end token, trained. Raises ValueError if there is none."""
        if self.eos_token_id is None:
            raise ValueError(
                f"{self._where}: a tokenizer must name an eos_token to end documents by, got none; "
                "add it to tokenizer_config.json"
            )
        ids = np.append(tokens.input_ids, self.eos_token_id)
        return ChatTokens(ids, np.append(tokens.trained, True))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids` to the letter, without special tokens unless asked for."""
        return self._tokenizer.decode(
            list(ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,  # some tokenizers ask for "a ." to become "a."
        )

    def _make_fingerprint(self) -> str:
        """Hash all that the tokens of a document depend on."""
        settings = {
            "version": _TEXT_VERSION,
            "controls": self.controls.ids,
            "end": self._tokenizer.eos_token_id,
        }
        digest = hashlib.sha256(self.description.encode())
        digest.update(json.dumps(settings, sort_keys=True).encode())
        return digest.hexdigest()

    def _make_encoder(self, options: ChatConfig, proof: str | None) -> TextEncoder:
        backend = self._tokenizer.backend_tokenizer
        encoder = HuggingFaceEncoder(backend, self.controls.tokens, self._where)
        if options.tiktoken == "off":
            return encoder
        try:
            fast = TiktokenEncoder(self.description, self.controls.tokens, encoder)
            self.tiktoken_proof = proof_key(self.description)
            if proof != self.tiktoken_proof:
                check_equal(fast, encoder)
            return fast
        except UnlikeTokenizerError as error:
            self.tiktoken_proof, self.tiktoken_refusal = None, str(error)
            if options.tiktoken == "require":
                raise ValueError(
                    f"data.chat.tiktoken: require needs a tokenizer tiktoken can stand in for, got "
                    f"{self._where}: {error}; set it to off"
                ) from error
            _log.warning("%s: text is not encoded by tiktoken: %s", self._where, error)
            return encoder
