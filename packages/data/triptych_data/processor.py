"""A model folder's tokenizer and media rules, applied to samples: encode, measure, decode."""

import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triptych_data.encoded import EncodedSample, Measures
from triptych_data.media.audio import (
    AudioRules,
    most_frames,
)
from triptych_data.media.config import JpegConfig, VideoConfig
from triptych_data.media.images import (
    ImageRules,
)
from triptych_data.media.positions import mrope_positions
from triptych_data.media.probe import MediaInfo
from triptych_data.media.rules import (
    IMAGE_FILE,
    has_images,
    has_mrope,
    read_audio_rules,
    read_bytes,
    read_frame_rules,
    read_image_rules,
    read_video_rules,
)
from triptych_data.media.taps import (
    join_taps,
)
from triptych_data.media.video import (
    VideoRules,
)
from triptych_data.media_encoder import MediaEncoder, Medium
from triptych_data.sample import RawSample, is_document
from triptych_data.shards.index import MediaColumns
from triptych_data.text.chat import (
    IGNORE_INDEX,
    ChatTokenizer,
    ChatTokens,
    message_text,
    shift_targets,
)
from triptych_data.text.chat_config import ChatConfig
from triptych_data.text.template import find_template, read_template
from triptych_data.text.text_tokenizer import TextTokenizer, check_text, load_tokenizer

ENCODING_VERSION = 2
"""To be raised whenever the same sample and model folder would give other tokens or patches."""


class Processor:
    """Samples to model inputs by the rules of a Hugging Face model folder (Qwen3-VL's layout).

    A folder without preprocessor files is one of text alone, and one without a chat template takes
    documents alone. `position_axes` is 3 for M-RoPE; 1 for text alone, for language models without
    it, and for towers that see all images in one size, their `image_side`.

    Pickling stores the folder's path, not the tokenizer; unpickling reads it again and raises
    ValueError if the folder has changed meanwhile.
    """

    def __init__(
        self,
        directory: Path,
        rules: ImageRules | None,
        settings: dict[str, Any],
        video_rules: VideoRules | None,
        audio_rules: AudioRules | None,
        options: dict[str, Any],
        tiktoken_proof: str | None = None,
    ) -> None:
        self._directory = directory
        self._options = options
        template, where = find_template(directory), str(directory)
        chat = {"options": options["chat"], "proof": tiktoken_proof}
        self._chat = None if template is None else ChatTokenizer(directory, template, **chat)
        self._text = (
            TextTokenizer(load_tokenizer(directory), where, **chat)
            if self._chat is None
            else self._chat.text
        )
        # 0: takes no images
        self.patch_size, self.merge_size, self.temporal_patch_size = (
            rules[:3] if rules else (0,) * 3
        )
        self.image_side = rules.side if rules else None
        self.image_tokens = None  # an image's, where all are of one size
        if rules and rules.side:
            self.image_tokens = rules.tokens or (rules.side // rules.patch_size) ** 2
        self.tiling = rules.tiling if rules else None
        self.num_mels = audio_rules.num_mels if audio_rules else 0  # 0: takes no sound
        self.audio_chunk = audio_rules.chunk if audio_rules else None
        self.frames_behind = audio_rules.behind if audio_rules else 0
        self.most_frames = most_frames(audio_rules) if audio_rules else 0  # of a recording
        is_turned = rules is not None and rules.side is None and has_mrope(directory)
        self.position_axes = 3 if is_turned else 1  # M-RoPE's, or plain
        self.fractional = video_rules is not None and video_rules.fractional  # M-RoPE's positions
        self.image_mean = _statistics(directory, settings, "image_mean")
        self.image_std = _statistics(directory, settings, "image_std")
        self.eos_token_id = self._find_end()
        pad = self._text.pad_token_id
        self.pad_token_id: int = self.eos_token_id if pad is None else pad
        self.vocab_size = self._text.vocab_size
        self.image_token_id = self._text.image_token_id
        self.video_token_id = self._text.video_token_id
        self.audio_token_id = self._text.audio_token_id
        self.control_ids = self._text.control_ids
        hears_videos = options["video"] is None or options["video"].sound
        self._media = MediaEncoder(
            directory,
            rules,
            video_rules,
            audio_rules,
            self._text,
            self.image_mean,
            jpeg=options["jpeg"],
            hears_videos=hears_videos,
        )
        facts: dict[str, Any] = {
            "version": ENCODING_VERSION,
            "chat": (self._chat or self._text).fingerprint,
            "image": _given(rules) if rules else None,
            "video": _stated(video_rules) if video_rules else None,
            "jpeg": options["jpeg"].model_dump() if options["jpeg"] else None,
        }
        if audio_rules:
            facts["audio"] = audio_rules._asdict()
        if not hears_videos:
            facts["sound of videos"] = False
        self.fingerprint = _fingerprint(facts)
        # The same by name, for people: of a tokenizer apart from what a template makes of it.
        self.parts = json.loads(json.dumps(facts | {"tokenizer": self._text.fingerprint}))

    @classmethod
    def from_directory(
        cls,
        path: str | Path,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video: VideoConfig | None = None,
        jpeg: JpegConfig | None = None,
        chat: ChatConfig | None = None,
        tiktoken_proof: str | None = None,
    ) -> "Processor":
        """Read tokenizer, chat template and preprocessor files of a local model folder.

        `min_pixels` and `max_pixels` replace the folder's bounds on an image's size, `video` its
        rules for videos; `jpeg` varies images' quality; `chat` says which turns are trained.
        Raises ValueError if a file is missing or asks for what we do not do.
        """
        directory = Path(path)
        read_bytes(directory / "tokenizer.json")  # without it transformers makes an empty one
        rules, settings, video_rules = None, dict[str, Any](), None
        if has_images(directory):
            bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
            rules, settings = read_image_rules(directory, **bounds)
            if rules.side is None:
                video_rules = read_video_rules(directory, video or VideoConfig())
                if not has_mrope(directory):
                    video_rules = None  # LLaVA-OneVision-1.5's, which was trained on none
            elif rules.tiling is not None:  # of other towers of one size no videos are taken
                video_rules = read_frame_rules(directory, video or VideoConfig(), rules)
            _check_alike(directory, rules, video_rules)
        options = {
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
            "video": video,
            "jpeg": jpeg,
            "chat": chat,
        }
        audio_rules = read_audio_rules(directory)
        return cls(directory, rules, settings, video_rules, audio_rules, options, tiktoken_proof)

    def __reduce__(self) -> tuple[Any, ...]:
        options = {**self._options, "tiktoken_proof": self._text.tiktoken_proof}
        return _reopen, (str(self._directory.resolve()), options, self.fingerprint)

    @property
    def patch_dim(self) -> int:
        """Values of one patch: 3 * temporal_patch_size * patch_size**2."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def encode(self, raw: RawSample, epoch: int | None = None) -> EncodedSample:
        """Encode a whole sample with its targets; with an `epoch` its images may be varied.

        Raises ValueError that names the sample.
        """
        try:
            return self._encode(raw, raw.json.get("messages", ()), epoch=epoch)
        except ValueError as error:
            raise ValueError(f"{raw.where}: {error}") from error

    def encode_prompt(self, raw: RawSample) -> tuple[EncodedSample, str]:
        """Encode what precedes the last assistant turn, generation prompt included, and return
        the text expected there.

        Raises ValueError, naming the sample, if its last message is not the assistant's.
        """
        try:
            *prompt, answer = raw.json.get("messages", ({"role": "document"},))
            if answer["role"] != "assistant" or not prompt:
                raise ValueError(
                    f"the last message must be an assistant's answer, got {answer['role']!r}; "
                    "leave the sample out of the evaluation"
                )
            return self._encode(raw, prompt, add_generation_prompt=True), message_text(answer)
        except ValueError as error:
            raise ValueError(f"{raw.where}: {error}") from error

    def encode_words(self, text: str) -> list[int]:
        """Token ids of words alone. Raises ValueError for characters that stand for control tokens
        here."""
        check_text(text)
        ids: list[int] = self._text.encoder.encode(text).tolist()
        return ids

    def measure(self, record: dict[str, Any], media: MediaColumns) -> Measures:
        """Return what `encode` would make of a sample, without decoding its media.

        `media` are the index's rows of the sample, in the order in which the text meets them
        (`Shards.media_of`). Raises ValueError as `encode` does, except for damaged media, and
        names no sample.
        """
        found = self._media.measure(record, media)
        tokens = self._tokenize(record, record.get("messages", ()), found)
        num_targets = int(tokens.trained[1:].sum())
        images = [h * w for medium in found for t, h, w in medium.grids for _ in range(t)]
        pairs = sum(patches * patches for patches in images)
        frames = sum(medium.frames for medium in found)
        counts = len(tokens.input_ids), num_targets, sum(images), len(images), pairs, frames
        return Measures(*counts)

    def media_tokens(self, info: MediaInfo) -> int:
        """Tokens of a medium, alone in its sample, that stand for its patches.

        Raises ValueError for one not taken.
        """
        medium = self._media.measure_file(info)
        return sum(piece for piece in medium.tokens.pieces if isinstance(piece, int))

    def frame_times(self, info: MediaInfo) -> list[float]:
        """The seconds of a video at which its frames are taken; none for a model without video."""
        return self._media.frame_times(info)

    def decode(self, ids: Sequence[int] | Tensor, *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids, without special tokens unless asked for."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        return self._text.decode(ids, skip_special_tokens=skip_special_tokens)

    def _encode(
        self,
        raw: RawSample,
        messages: Sequence[dict[str, Any]],
        *,
        epoch: int | None = None,
        add_generation_prompt: bool = False,
    ) -> EncodedSample:
        record = raw.json if is_document(raw.json) else {"messages": messages}
        found = self._media.encode(raw, record, epoch)
        media = [each.medium for each in found]
        patches = [each.patches for each in found if each.patches is not None]
        heard = [each.heard for each in found if each.heard is not None]
        taps = [each.taps for each in found if each.taps is not None]
        tokens = self._tokenize(raw.json, messages, media, add_generation_prompt)
        labels = np.full_like(tokens.input_ids, IGNORE_INDEX)
        if not add_generation_prompt:
            labels = shift_targets(tokens)
        grids = np.array([grid for medium in media for grid in medium.grids], dtype=np.int64)
        grids = grids.reshape(-1, 3)
        pads = [self.image_token_id, self.video_token_id]
        is_image = np.isin(tokens.input_ids, pads)
        positions = np.arange(len(is_image))[None]
        if self.position_axes == 3:
            times = [each for medium in media for each in medium.times]
            sounds = [medium.sound for medium in media for _ in medium.grids]
            positions = mrope_positions(
                is_image, grids, self.merge_size, times, sounds, fractional=self.fractional
            )
        return EncodedSample(
            key=raw.key,
            input_ids=torch.from_numpy(tokens.input_ids),
            shift_labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(positions),
            pixel_values=torch.cat(patches) if patches else None,
            image_grid_thw=torch.from_numpy(grids),
            image_positions=torch.from_numpy(np.flatnonzero(is_image)),
            audio_features=torch.cat(heard) if heard else None,
            audio_lengths=torch.tensor(
                [len(frames) - self.frames_behind for frames in heard], dtype=torch.int64
            ),
            audio_positions=torch.from_numpy(
                np.flatnonzero(tokens.input_ids == self.audio_token_id)
            ),
            num_targets=int((labels != IGNORE_INDEX).sum()),
            taps=join_taps(taps, _starts(patches)) if taps else None,
        )

    def _find_end(self) -> int:
        """The token that ends an answer, and generation; of a folder without chats, a document."""
        end = self._text.eos_token_id if self._chat is None else self._chat.end_token_id
        if end is None:
            raise ValueError(
                f"{self._directory}: must name an eos_token in tokenizer_config.json, got none; "
                "add it"
            )
        return end

    def _tokenize(
        self,
        record: dict[str, Any],
        messages: Sequence[dict[str, Any]],
        media: list[Medium],
        add_generation_prompt: bool = False,
    ) -> ChatTokens:
        if is_document(record) and isinstance(record["text"], str):
            return self._text.document(record["text"])
        if self._chat is None:
            read_template(self._directory)  # which says what is missing
        assert self._chat is not None
        if is_document(record):
            return self._chat.document(record["text"], [medium.tokens for medium in media])
        tokens = self._chat.encode(
            messages,
            [medium.tokens for medium in media],
            tools=record.get("tools"),
            add_generation_prompt=add_generation_prompt,
        )
        if not add_generation_prompt and not tokens.trained[1:].any():
            raise ValueError(
                "a sample must hold a target, got no text in any assistant turn; leave it out"
            )
        return tokens


def _reopen(path: str, options: dict[str, Any], fingerprint: str) -> Processor:
    processor = Processor.from_directory(path, **options)
    if processor.fingerprint != fingerprint:
        raise ValueError(
            f"{path}: tokenizer, chat template and media settings must not change during a run, "
            "got other ones than at its start; start the run again"
        )
    return processor


def _check_alike(directory: Path, image: ImageRules, video: VideoRules | None) -> None:
    """Videos go through the batch as images do, so their patches are of one shape."""
    if video is not None and video[:3] != image[:3]:
        raise ValueError(
            f"{directory}: images and videos must have the same patch, merge and temporal patch "
            f"size, got {image[:3]} and {video[:3]}; fix the preprocessor files"
        )


def _given(rules: ImageRules) -> dict[str, int]:
    """Rules without those that a folder does not have."""
    return {name: value for name, value in rules._asdict().items() if value is not None}


def _stated(rules: VideoRules) -> dict[str, Any]:
    """Rules without those that came later where there are none: fingerprints stay."""
    own = ("tokens_per_second", "total_pixels", "side", "tmrope", "sound_chunk", "fractional")
    return {n: v for n, v in rules._asdict().items() if n not in own or v not in (None, False)}


def _starts(patches: Sequence[Tensor]) -> list[int]:
    """How many patches there are before each."""
    return [0, *accumulate(len(each) for each in patches)][:-1]


def _statistics(directory: Path, settings: dict[str, Any], name: str) -> tuple[float, ...]:
    """Mean or deviation of the three colours. Raises ValueError for what is none."""
    value = settings.get(name, (0.5, 0.5, 0.5))
    numbers = value if isinstance(value, list | tuple) else ()
    low = 0.0 if name == "image_mean" else 1e-6  # pixels are divided by the deviation
    if len(numbers) != 3 or not all(
        isinstance(number, int | float) and low <= number <= 1 for number in numbers
    ):
        raise ValueError(
            f"{directory / IMAGE_FILE}: {name} must be three numbers from {low} to 1, got "
            f"{str(value)[:80]}; fetch the file again"
        )
    return tuple(numbers)


def _fingerprint(settings: dict[str, Any]) -> str:
    """Hash all that token ids and patches depend on; mean and std act later, on the device."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
