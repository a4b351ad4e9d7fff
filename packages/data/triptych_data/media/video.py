"""Video files to uint8 patches with the times they are seen at: Qwen3-VL's frame budget and layout.

A video is laid out as one image per temporal patch, each after its time in text: in a batch its
patches, grids and positions go where those of images go.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from triptych_data.media import clips
from triptych_data.media.images import check_ratio, patchify, resize

_RATE_DENOMINATOR = 1001  # of NTSC's rates, such as 30000/1001


class VideoRules(NamedTuple):
    """How a model samples and cuts videos.

    Pixels per patch side, patches per token side, frames per patch; bounds on the pixels of all
    frames together after resizing; frames wanted per second and bounds on how many; tokens that
    one frame may take at most, None for as many as `max_pixels` allow.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    fps: float
    min_frames: int
    max_frames: int
    max_frame_tokens: int | None = None


class VideoLayout(NamedTuple):
    """What a video becomes: the numbers of its frames, as many as fill whole patches, the patch
    grid (t, h, w), and for each of t when it is seen, in seconds."""

    frames: np.ndarray
    grid: tuple[int, int, int]
    seconds: tuple[float, ...]


def encode_video(data: bytes, rules: VideoRules) -> tuple[Tensor, VideoLayout]:
    """Decode a video file and cut it: patches (num_patches, patch_dim) uint8, and its layout.

    Raises ValueError for a file that cannot be decoded or frames too slim for the model.
    """
    with clips.open_video(data) as video:
        info = clips.describe_video(video)
        layout = video_layout(info.width, info.height, info.frames, info.seconds, rules)
        height, width = (side * rules.patch_size for side in layout.grid[1:])
        times = layout.frames / frame_rate(info.frames, info.seconds)
        frames = torch.empty(len(times), 3, height, width, dtype=torch.uint8)
        for number, frame in enumerate(clips.frames_at(video, times)):
            frames[number] = resize(torch.from_numpy(frame).permute(2, 0, 1), height, width)
    return patchify(frames, rules), layout


def video_layout(
    width: int, height: int, num_frames: int, seconds: float, rules: VideoRules
) -> VideoLayout:
    """The layout of a video of `num_frames` frames of `width` x `height` pixels and of `seconds`.

    Frames, size and times are those of transformers' Qwen3-VL, for the numbers an index holds.
    Raises ValueError if one side is over 200 times the other.
    """
    rate = frame_rate(num_frames, seconds)
    wanted = int(num_frames / rate * rules.fps)
    wanted = min(max(wanted, rules.min_frames), rules.max_frames, num_frames)
    frames = np.linspace(0, num_frames - 1, wanted).round().astype(np.int64)
    depth = rules.temporal_patch_size
    rows, cols = _frame_grid(width, height, max(wanted, depth), rules)
    frames = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % depth)])
    times = (frames / rate).reshape(-1, depth)
    shown = ((times[:, 0] + times[:, -1]) / 2).tolist()
    return VideoLayout(frames, (len(shown), rows, cols), tuple(shown))


def frame_rate(num_frames: int, seconds: float) -> float:
    """Frames per second, free of the rounding that `num_frames / rate` brought into `seconds`."""
    return float(Fraction(num_frames / seconds).limit_denominator(_RATE_DENOMINATOR))


def video_pieces(layout: VideoLayout, merge_size: int) -> tuple[str | int, ...]:
    """What takes the place of a video's placeholder: times as text, and counts of tokens.

    As transformers' Qwen3-VL writes it: `<0.3 seconds><|vision_start|>` tokens `<|vision_end|>`.
    """
    _, height, width = layout.grid
    tokens = height * width // merge_size**2
    pieces: list[str | int] = []
    for time in layout.seconds:
        pieces += [f"<{time:.1f} seconds><|vision_start|>", tokens, "<|vision_end|>"]
    return tuple(pieces)


def _frame_grid(width: int, height: int, num_frames: int, rules: VideoRules) -> tuple[int, int]:
    """Rows and columns of patches in a frame: `smart_resize` of transformers' Qwen3-VL."""
    factor, depth = rules.patch_size * rules.merge_size, rules.temporal_patch_size
    max_pixels = rules.max_pixels
    if rules.max_frame_tokens is not None:
        frame = min(rules.max_frame_tokens * factor**2, max_pixels // num_frames)
        max_pixels = max(frame, int(rules.min_pixels * 1.05)) * num_frames
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_ratio(width, height)
    rows, cols = round(height / factor), round(width / factor)
    pixels = round(num_frames / depth) * depth * rows * cols * factor**2
    if pixels > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        cols = max(1, math.floor(width / shrink / factor))
    elif pixels < rules.min_pixels:
        enlarge = math.sqrt(rules.min_pixels / (num_frames * height * width))
        rows = math.ceil(height * enlarge / factor)
        cols = math.ceil(width * enlarge / factor)
    return rows * rules.merge_size, cols * rules.merge_size
