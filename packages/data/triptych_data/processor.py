"""A model folder's tokenizer and media rules, applied to samples: encode, measure, decode."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from triptych_data.encoded import EncodedSample, Measures
from triptych_data.faults import BadSample
from triptych_data.media.audio import (
    AudioRules,
    audio_tokens,
    hear,
    hear_video,
    heard_frames,
    most_frames,
)
from triptych_data.media.augment import vary_jpeg
from triptych_data.media.config import JpegConfig, VideoConfig
from triptych_data.media.images import (
    ImageRules,
    check_ratio,
    decode_image,
    encode_image,
    image_grid,
    patchify,
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
from triptych_data.media.soundtrack import SoundOrder, sound_order
from triptych_data.media.taps import (
    Taps,
    frame_taps,
    join_taps,
    pooled_side,
    square_taps,
    tiled_taps,
)
from triptych_data.media.tiling import (
    TileLayout,
    TilingRules,
    encode_tiles,
    square_tile,
    tile_layout,
)
from triptych_data.media.video import (
    VideoLayout,
    VideoRules,
    encode_video,
    frame_rate,
    video_layout,
    video_pieces,
)
from triptych_data.sample import KINDS, RawSample, heard_parts, is_document, media_parts
from triptych_data.shards.index import MediaColumns
from triptych_data.text.chat import (
    IGNORE_INDEX,
    ChatTokenizer,
    ChatTokens,
    MediaTokens,
    message_text,
    shift_targets,
)
from triptych_data.text.chat_config import ChatConfig
from triptych_data.text.template import find_template, read_template
from triptych_data.text.text_tokenizer import TextTokenizer, check_text, load_tokenizer

ENCODING_VERSION = 2
"""To be raised whenever the same sample and model folder would give other tokens or patches."""

Grid = tuple[int, int, int]


class _Medium(NamedTuple):
    """What a medium becomes in the text, and as images."""

    tokens: MediaTokens
    grids: list[Grid]
    times: list[tuple[float, ...] | None]
    """of each grid: where its frames are on M-RoPE's axis t, None for one after another"""
    frames: int = 0
    """of a recording, or of a video's sound"""
    sound: SoundOrder | None = None
    """of a video that is heard"""


class _Encoded(NamedTuple):
    """Values of a medium: patches, frames of its sound, and of which features its tokens are made
    where they are not those of its patches."""

    medium: _Medium
    patches: Tensor | None = None
    heard: Tensor | None = None
    taps: Taps | None = None


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
        self._rules = rules
        self._video_rules = video_rules
        self._audio_rules = audio_rules
        self._options = options
        self._jpeg: JpegConfig | None = options["jpeg"]
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
        facts: dict[str, Any] = {
            "version": ENCODING_VERSION,
            "chat": (self._chat or self._text).fingerprint,
            "image": _given(rules) if rules else None,
            "video": _stated(video_rules) if video_rules else None,
            "jpeg": self._jpeg.model_dump() if self._jpeg else None,
        }
        if audio_rules:
            facts["audio"] = audio_rules._asdict()
        if options["video"] is not None and not options["video"].sound:
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
        columns = [column.tolist() for column in media]
        is_alone = [KINDS[kind] for kind in columns[0]].count("image") == 1
        rows, media_ = list(zip(*columns, strict=True)), list[_Medium]()
        heard = heard_parts(record)
        if len(rows) != len(heard) + sum(heard):
            raise ValueError(
                f"the index must have {len(heard) + sum(heard)} rows of media, those of sound of "
                f"videos among them, got {len(rows)}; run: triptych-data index --overwrite"
            )
        for is_heard in heard:
            kind, (width, height), frames, seconds = rows.pop(0)
            sound = rows.pop(0)[-1] if is_heard else None
            medium = self._measure_medium(
                KINDS[kind], width, height, frames, seconds, is_alone, sound
            )
            media_.append(medium)
        tokens = self._tokenize(record, record.get("messages", ()), media_)
        num_targets = int(tokens.trained[1:].sum())
        images = [h * w for medium in media_ for t, h, w in medium.grids for _ in range(t)]
        pairs = sum(patches * patches for patches in images)
        frames = sum(medium.frames for medium in media_)
        counts = len(tokens.input_ids), num_targets, sum(images), len(images), pairs, frames
        return Measures(*counts)

    def media_tokens(self, info: MediaInfo) -> int:
        """Tokens of a medium, alone in its sample, that stand for its patches.

        Raises ValueError for one not taken.
        """
        medium = self._measure_medium(info.kind, *info[2:6])
        return sum(piece for piece in medium.tokens.pieces if isinstance(piece, int))

    def frame_times(self, info: MediaInfo) -> list[float]:
        """The seconds of a video at which its frames are taken; none for a model without video."""
        if self._video_rules is None:
            return []
        layout = video_layout(*info[2:6], self._video_rules)
        return (layout.frames / frame_rate(info.frames, info.seconds)).tolist()

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
        patches: list[Tensor] = []
        heard: list[Tensor] = []
        media: list[_Medium] = []
        taps: list[Taps] = []
        record = raw.json if is_document(raw.json) else {"messages": messages}
        parts = list(media_parts(record))
        is_alone = [kind for kind, _ in parts].count("image") == 1
        for (kind, index), is_heard in zip(parts, heard_parts(record), strict=True):
            if index >= len(raw.media):
                raise BadSample(
                    f"{kind} {index}: must be a member of the sample, got {len(raw.media)} media; "
                    "write its shard again",
                    reason="missing member",
                )
            vary = self._vary(raw.key, index, epoch)
            try:
                found = self._encode_medium(kind, raw.media[index], vary, is_alone, is_heard)
            except ValueError as error:
                raise BadSample(f"{kind} {index}: {error}", reason=f"corrupt {kind}") from error
            media.append(found.medium)
            patches += [] if found.patches is None else [found.patches]
            heard += [] if found.heard is None else [found.heard]
            taps += [] if found.taps is None else [found.taps]
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

    def _vary(self, key: str, number: int, epoch: int | None) -> Callable[[Tensor], Tensor] | None:
        """What changes the pixels of an image; without epoch they are as stored."""
        if self._jpeg is None or epoch is None:
            return None
        return partial(vary_jpeg, config=self._jpeg, key=key, number=number, epoch=epoch)

    def _encode_medium(
        self,
        kind: str,
        data: bytes,
        vary: Callable[[Tensor], Tensor] | None,
        is_alone: bool,
        is_heard: bool,
    ) -> _Encoded:
        """is_alone: it is the only image; is_heard: a video comes with its sound."""
        if kind == "image" and self.tiling is not None:
            return self._encode_tiled(data, self.tiling, vary, is_alone)
        if kind == "image":
            patches, grid = encode_image(data, self._image_rules(), vary)
            return _Encoded(self._image(grid), patches)
        if kind == "audio":
            frames = hear(data, self._rules_of_sound())
            return _Encoded(self._audio(len(frames) - self.frames_behind), heard=frames)
        patches, layout = encode_video(data, self._rules_for(kind))
        taps = frame_taps(*layout.grid[:2]) if self.tiling is not None else None
        is_heard = is_heard and self._hears_videos
        sound = hear_video(data, self._rules_of_sound()) if is_heard else None
        return _Encoded(
            self._video(layout, 0 if sound is None else len(sound)), patches, sound, taps
        )

    def _encode_tiled(
        self,
        data: bytes,
        tiling: TilingRules,
        vary: Callable[[Tensor], Tensor] | None,
        is_alone: bool,
    ) -> _Encoded:
        if is_alone:
            tiles, layout = encode_tiles(data, tiling, vary)
            medium, taps = self._tiled(layout), tiled_taps(layout, tiling.side)
        else:
            background = [int(255 * mean) for mean in self.image_mean]
            image = decode_image(data)
            image = image if vary is None else vary(image)
            tiles = square_tile(image, tiling.tile, background)[None]
            medium, taps = self._tiled(None), square_taps(tiling.side)
        shown = tiling.side * self.patch_size
        patches = patchify(tiles[:, :, :shown, :shown].contiguous(), self._image_rules())
        return _Encoded(medium, patches, taps=taps)

    def _measure_medium(
        self,
        kind: str,
        width: int,
        height: int,
        frames: int,
        seconds: float,
        is_alone: bool = True,
        sound: float | None = None,
    ) -> _Medium:
        """sound: seconds of that of a video which is heard; None: it is not."""
        if kind == "image" and self.tiling is not None:
            check_ratio(width, height)
            return self._tiled(tile_layout(width, height, self.tiling) if is_alone else None)
        if kind == "image":
            return self._image(image_grid(width, height, self._image_rules()))
        if kind == "audio":
            return self._audio(heard_frames(seconds, self._rules_of_sound()))
        rules = self._rules_for(kind)
        heard = 0
        if sound is not None and self._hears_videos and sound:
            heard = heard_frames(sound, self._rules_of_sound())
        return self._video(video_layout(width, height, frames, seconds, rules), heard)

    def _image(self, grid: Grid) -> _Medium:
        tiles, height, width = grid
        tokens = self._image_rules().tokens or height * width // self.merge_size**2
        before, after = self._text.image_borders
        pieces = tuple(piece for piece in (before, tiles * tokens, after) if piece)
        return _Medium(MediaTokens("image", pieces), [(1, height, width)] * tiles, [None] * tiles)

    def _tiled(self, layout: TileLayout | None) -> _Medium:
        """An image of any resolution, each tile a grid; None is a square, as one of several."""
        assert self.tiling is not None
        side = self.tiling.side
        count, tokens = 1, side**2 + 1
        if layout is not None:
            count, tokens = 1 + layout.grid[0] * layout.grid[1], layout.num_tokens
        return _Medium(MediaTokens("image", (tokens,)), [(1, side, side)] * count, [None] * count)

    def _video(self, layout: VideoLayout, heard: int) -> _Medium:
        """A video as M-RoPE sees it: one grid, or an image per temporal patch; with so many frames
        of its sound."""
        frames, height, width = layout.grid
        if self.tiling is not None:  # pooled, and a line break
            pooled = MediaTokens("video", (frames * pooled_side(height) ** 2 + 1,))
            return _Medium(pooled, [(1, height, width)] * frames, [None] * frames)
        tokens = MediaTokens("video", video_pieces(layout, self.merge_size))
        if heard:
            return self._video_with_sound(layout, heard)
        if layout.times is not None:
            return _Medium(tokens, [layout.grid], [layout.times])
        return _Medium(tokens, [(1, height, width)] * frames, [None] * frames)

    def _video_with_sound(self, layout: VideoLayout, heard: int) -> _Medium:
        rules, sound = self._rules_for("video"), audio_tokens(heard, self._rules_of_sound().chunk)
        assert layout.times is not None and rules.sound_chunk is not None
        assert rules.tokens_per_second is not None
        _, height, width = layout.grid
        each = height * width // self.merge_size**2
        times = layout.times
        if rules.fractional:  # in double precision, as stock orders tokens
            step = rules.temporal_patch_size / rules.fps
            times = tuple((np.arange(len(times)) * step * rules.tokens_per_second).tolist())
        order = sound_order(times, each, sound, rules.sound_chunk)
        before, after = self._text.sound_borders
        between = (n if kind == "video" else (kind, n) for kind, n in order.pieces)
        tokens = MediaTokens("video", (before, *between, after))
        return _Medium(tokens, [layout.grid], [layout.times], heard, order)

    def _audio(self, frames: int) -> _Medium:
        tokens = audio_tokens(frames, self._rules_of_sound().chunk)
        return _Medium(MediaTokens("audio", (tokens,)), [], [], frames)

    @property
    def _hears_videos(self) -> bool:
        """Whether the sound of videos is taken where a sample says so.

        Raises ValueError for a model that does not hear them, unless the configuration leaves it.
        """
        video = self._options["video"]
        if video is not None and not video.sound:
            return False
        if self._video_rules is None or self._video_rules.sound_chunk is None:
            raise ValueError(
                f"{self._directory}: the model must hear videos, got one to be heard; set "
                "data.video.sound=false"
            )
        return True

    def _rules_of_sound(self) -> AudioRules:
        if self._audio_rules is None:
            raise self._no_rules("audio")
        return self._audio_rules

    def _image_rules(self) -> ImageRules:
        if self._rules is None:
            raise self._no_rules("image")
        return self._rules

    def _rules_for(self, kind: str) -> VideoRules:
        if self._video_rules is None:
            raise self._no_rules(kind)
        return self._video_rules

    def _no_rules(self, kind: str) -> ValueError:
        return ValueError(
            f"{self._directory}: the model must take what its samples hold, got {kind}, for "
            "which the folder has no preprocessor file, or its family no place; leave the sample "
            "out"
        )

    def _tokenize(
        self,
        record: dict[str, Any],
        messages: Sequence[dict[str, Any]],
        media: list[_Medium],
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
