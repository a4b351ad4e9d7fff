"""Media of samples by a model folder's rules: patches and frames, and the tokens that stand for
them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from triptych_data.faults import BadSample
from triptych_data.media.audio import AudioRules, audio_tokens, hear, hear_video, heard_frames
from triptych_data.media.augment import vary_jpeg
from triptych_data.media.config import JpegConfig
from triptych_data.media.images import (
    ImageRules,
    check_ratio,
    decode_image,
    encode_image,
    image_grid,
    patchify,
)
from triptych_data.media.probe import MediaInfo
from triptych_data.media.soundtrack import SoundOrder, sound_order
from triptych_data.media.taps import Taps, frame_taps, pooled_side, square_taps, tiled_taps
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
from triptych_data.sample import KINDS, RawSample, heard_parts, media_parts
from triptych_data.shards.index import MediaColumns
from triptych_data.text.chat import MediaTokens
from triptych_data.text.text_tokenizer import TextTokenizer

Grid = tuple[int, int, int]


class Medium(NamedTuple):
    """What a medium becomes in the text, and as images."""

    tokens: MediaTokens
    grids: list[Grid]
    times: list[tuple[float, ...] | None]
    """of each grid: where its frames are on M-RoPE's axis t, None for one after another"""
    frames: int = 0
    """of a recording, or of a video's sound"""
    sound: SoundOrder | None = None
    """of a video that is heard"""


class EncodedMedium(NamedTuple):
    """Values of a medium: patches, frames of its sound, and of which features its tokens are made
    where they are not those of its patches."""

    medium: Medium
    patches: Tensor | None = None
    heard: Tensor | None = None
    taps: Taps | None = None


class MediaEncoder:
    """What the text and the batch get of the images, videos and recordings of a sample.

    Rules are None for what the model does not take; beside one of several tiled images its square
    is of `image_mean`. `jpeg` varies images' quality; without `hears_videos` the sound of videos is
    left out.
    """

    def __init__(
        self,
        directory: Path,
        image_rules: ImageRules | None,
        video_rules: VideoRules | None,
        audio_rules: AudioRules | None,
        text: TextTokenizer,
        image_mean: tuple[float, ...],
        *,
        jpeg: JpegConfig | None,
        hears_videos: bool,
    ) -> None:
        self._directory = directory
        self._rules = image_rules
        self._video_rules = video_rules
        self._audio_rules = audio_rules
        self._text = text
        self._image_mean = image_mean
        self._jpeg = jpeg
        self._takes_sound_of_videos = hears_videos
        self._patch_size, self._merge_size = image_rules[:2] if image_rules else (0, 0)
        self._tiling = image_rules.tiling if image_rules else None
        self._frames_behind = audio_rules.behind if audio_rules else 0

    def encode(
        self, raw: RawSample, record: dict[str, Any], epoch: int | None
    ) -> list[EncodedMedium]:
        """Decode the media that `record`, all of a sample or its first messages, refers to, in the
        order in which the text meets them; with an `epoch` images may be varied.

        Raises BadSample that names the medium.
        """
        found = list[EncodedMedium]()
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
                medium = self._encode_medium(kind, raw.media[index], vary, is_alone, is_heard)
            except ValueError as error:
                raise BadSample(f"{kind} {index}: {error}", reason=f"corrupt {kind}") from error
            found.append(medium)
        return found

    def measure(self, record: dict[str, Any], media: MediaColumns) -> list[Medium]:
        """What `encode` would make of media, by their rows of the index.

        Raises ValueError as `encode` does, except for damaged media, and where rows are missing.
        """
        columns = [column.tolist() for column in media]
        is_alone = [KINDS[kind] for kind in columns[0]].count("image") == 1
        rows, found = list(zip(*columns, strict=True)), list[Medium]()
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
            found.append(medium)
        return found

    def measure_file(self, info: MediaInfo) -> Medium:
        """The same of a medium alone in its sample."""
        return self._measure_medium(info.kind, *info[2:6])

    def frame_times(self, info: MediaInfo) -> list[float]:
        """The seconds of a video at which its frames are taken; none for a model without video."""
        if self._video_rules is None:
            return []
        layout = video_layout(*info[2:6], self._video_rules)
        return (layout.frames / frame_rate(info.frames, info.seconds)).tolist()

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
    ) -> EncodedMedium:
        """is_alone: it is the only image; is_heard: a video comes with its sound."""
        if kind == "image" and self._tiling is not None:
            return self._encode_tiled(data, self._tiling, vary, is_alone)
        if kind == "image":
            patches, grid = encode_image(data, self._image_rules(), vary)
            return EncodedMedium(self._image(grid), patches)
        if kind == "audio":
            frames = hear(data, self._rules_of_sound())
            return EncodedMedium(self._audio(len(frames) - self._frames_behind), heard=frames)
        patches, layout = encode_video(data, self._rules_for(kind))
        taps = frame_taps(*layout.grid[:2]) if self._tiling is not None else None
        is_heard = is_heard and self._hears_videos
        sound = hear_video(data, self._rules_of_sound()) if is_heard else None
        return EncodedMedium(
            self._video(layout, 0 if sound is None else len(sound)), patches, sound, taps
        )

    def _encode_tiled(
        self,
        data: bytes,
        tiling: TilingRules,
        vary: Callable[[Tensor], Tensor] | None,
        is_alone: bool,
    ) -> EncodedMedium:
        if is_alone:
            tiles, layout = encode_tiles(data, tiling, vary)
            medium, taps = self._tiled(layout), tiled_taps(layout, tiling.side)
        else:
            background = [int(255 * mean) for mean in self._image_mean]
            image = decode_image(data)
            image = image if vary is None else vary(image)
            tiles = square_tile(image, tiling.tile, background)[None]
            medium, taps = self._tiled(None), square_taps(tiling.side)
        shown = tiling.side * self._patch_size
        patches = patchify(tiles[:, :, :shown, :shown].contiguous(), self._image_rules())
        return EncodedMedium(medium, patches, taps=taps)

    def _measure_medium(
        self,
        kind: str,
        width: int,
        height: int,
        frames: int,
        seconds: float,
        is_alone: bool = True,
        sound: float | None = None,
    ) -> Medium:
        """sound: seconds of that of a video which is heard; None: it is not."""
        if kind == "image" and self._tiling is not None:
            check_ratio(width, height)
            return self._tiled(tile_layout(width, height, self._tiling) if is_alone else None)
        if kind == "image":
            return self._image(image_grid(width, height, self._image_rules()))
        if kind == "audio":
            return self._audio(heard_frames(seconds, self._rules_of_sound()))
        rules = self._rules_for(kind)
        heard = 0
        if sound is not None and self._hears_videos and sound:
            heard = heard_frames(sound, self._rules_of_sound())
        return self._video(video_layout(width, height, frames, seconds, rules), heard)

    def _image(self, grid: Grid) -> Medium:
        tiles, height, width = grid
        tokens = self._image_rules().tokens or height * width // self._merge_size**2
        before, after = self._text.image_borders
        pieces = tuple(piece for piece in (before, tiles * tokens, after) if piece)
        return Medium(MediaTokens("image", pieces), [(1, height, width)] * tiles, [None] * tiles)

    def _tiled(self, layout: TileLayout | None) -> Medium:
        """An image of any resolution, each tile a grid; None is a square, as one of several."""
        assert self._tiling is not None
        side = self._tiling.side
        count, tokens = 1, side**2 + 1
        if layout is not None:
            count, tokens = 1 + layout.grid[0] * layout.grid[1], layout.num_tokens
        return Medium(MediaTokens("image", (tokens,)), [(1, side, side)] * count, [None] * count)

    def _video(self, layout: VideoLayout, heard: int) -> Medium:
        """A video as M-RoPE sees it: one grid, or an image per temporal patch; with so many frames
        of its sound."""
        frames, height, width = layout.grid
        if self._tiling is not None:  # pooled, and a line break
            pooled = MediaTokens("video", (frames * pooled_side(height) ** 2 + 1,))
            return Medium(pooled, [(1, height, width)] * frames, [None] * frames)
        tokens = MediaTokens("video", video_pieces(layout, self._merge_size))
        if heard:
            return self._video_with_sound(layout, heard)
        if layout.times is not None:
            return Medium(tokens, [layout.grid], [layout.times])
        return Medium(tokens, [(1, height, width)] * frames, [None] * frames)

    def _video_with_sound(self, layout: VideoLayout, heard: int) -> Medium:
        rules, sound = self._rules_for("video"), audio_tokens(heard, self._rules_of_sound().chunk)
        assert layout.times is not None and rules.sound_chunk is not None
        assert rules.tokens_per_second is not None
        _, height, width = layout.grid
        each = height * width // self._merge_size**2
        times = layout.times
        if rules.fractional:  # in double precision, as stock orders tokens
            step = rules.temporal_patch_size / rules.fps
            times = tuple((np.arange(len(times)) * step * rules.tokens_per_second).tolist())
        order = sound_order(times, each, sound, rules.sound_chunk)
        before, after = self._text.sound_borders
        between = (n if kind == "video" else (kind, n) for kind, n in order.pieces)
        tokens = MediaTokens("video", (before, *between, after))
        return Medium(tokens, [layout.grid], [layout.times], heard, order)

    def _audio(self, frames: int) -> Medium:
        tokens = audio_tokens(frames, self._rules_of_sound().chunk)
        return Medium(MediaTokens("audio", (tokens,)), [], [], frames)

    @property
    def _hears_videos(self) -> bool:
        """Whether the sound of videos is taken where a sample says so.

        Raises ValueError for a model that does not hear them, unless the configuration leaves it.
        """
        if not self._takes_sound_of_videos:
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
