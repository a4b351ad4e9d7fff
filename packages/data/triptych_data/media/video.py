"""Video files to uint8 patches with the times they are seen at: frame budgets and layouts.

In a batch a video's patches, grids and positions go where those of images go. Qwen3-VL's is laid
out as one image per temporal patch, each after its time in text; Qwen2.5-VL's and Qwen-Omni's as
one grid, whose time is in its M-RoPE positions.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from triptych_data.media import clips
from triptych_data.media.images import ImageRules, check_ratio, image_grid, patchify, resize

_RATE_DENOMINATOR = 1001  # of NTSC's rates, such as 30000/1001


class VideoRules(NamedTuple):
    """How a model samples and cuts videos.

    Pixels per patch side, patches per token side, frames per patch; bounds on the pixels of all
    frames together after resizing; frames wanted per second and bounds on how many; tokens that
    one frame may take at most, None for as many as `max_pixels` allow.

    With `tokens_per_second` a video is one grid, and so many positions are a second of it (Qwen2.5-
    VL); then `min_pixels` and `max_pixels` bound each frame, `total_pixels` all of them. With
    `tmrope` (Qwen-Omni) frames count as taken at `fps`, however many there are, and sound may come
    with a video: as `soundtrack.sound_order` has it, by `sound_chunk`. `fractional` positions are
    not cut to whole ones (Qwen3-Omni). With `side` every frame is stretched to a square of so many
    pixels (LLaVA-OneVision).
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
    tokens_per_second: float | None = None
    total_pixels: int | None = None
    side: int | None = None
    tmrope: bool = False
    sound_chunk: int | None = None
    fractional: bool = False


class VideoLayout(NamedTuple):
    """What a video becomes: the numbers of its frames, as many as fill whole patches, the patch
    grid (t, h, w), for each of t when it is seen, in seconds, and where it is on M-RoPE's axis t,
    counted from the first, None where each is an image of its own."""

    frames: np.ndarray
    grid: tuple[int, int, int]
    seconds: tuple[float, ...]
    times: tuple[float, ...] | None = None


def encode_video(data: bytes, rules: VideoRules) -> tuple[Tensor, VideoLayout]:
    """Decode a video file and cut it: patches (num_patches, patch_dim) uint8, and its layout.

    Raises ValueError for a file that cannot be decoded or frames too slim for the model.
    """
    with clips.open_video(data) as video:
        info = clips.describe_video(video)
        layout = video_layout(info.width, info.height, info.frames, info.seconds, rules)
        height, width = (side * rules.patch_size for side in layout.grid[1:])
        size = (rules.side, rules.side) if rules.side else (height, width)
        times = layout.frames / frame_rate(info.frames, info.seconds)
        frames = torch.empty(len(times), 3, height, width, dtype=torch.uint8)
        for number, frame in enumerate(clips.frames_at(video, times)):
            resized = resize(torch.from_numpy(frame).permute(2, 0, 1), *size)
            frames[number] = resized[:, :height, :width]
    return patchify(frames, rules), layout


def video_layout(
    width: int, height: int, num_frames: int, seconds: float, rules: VideoRules
) -> VideoLayout:
    """The layout of a video of `num_frames` frames of `width` x `height` pixels and of `seconds`.

    Frames, size and times are those of transformers' processor of the model, for the numbers an
    index holds. Raises ValueError if one side is over 200 times the other.
    """
    rate, depth = frame_rate(num_frames, seconds), rules.temporal_patch_size
    if rules.side is not None:
        wanted = min(max(int(num_frames / rate * rules.fps), rules.min_frames), rules.max_frames)
        wanted = min(wanted, num_frames)
        frames = np.arange(wanted) * num_frames // wanted
        rows = cols = rules.side // rules.patch_size
    elif rules.tokens_per_second is None:
        wanted = int(num_frames / rate * rules.fps)
        wanted = min(max(wanted, rules.min_frames), rules.max_frames, num_frames)
        frames = np.linspace(0, num_frames - 1, wanted).round().astype(np.int64)
        rows, cols = _frame_grid(width, height, max(wanted, depth), rules)
    else:
        frames = _even_frames(num_frames, rate, rules)
        rows, cols = _bounded_frame_grid(width, height, len(frames), rules)
    sampled_fps = len(frames) / num_frames * rate
    frames = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % depth)])
    times = (frames / rate).reshape(-1, depth)
    shown = ((times[:, 0] + times[:, -1]) / 2).tolist()
    positions = _time_positions(len(shown), sampled_fps, rules)
    return VideoLayout(frames, (len(shown), rows, cols), tuple(shown), positions)


def frame_rate(num_frames: int, seconds: float) -> float:
    """Frames per second, free of the rounding that `num_frames / rate` brought into `seconds`."""
    return float(Fraction(num_frames / seconds).limit_denominator(_RATE_DENOMINATOR))


def video_pieces(layout: VideoLayout, merge_size: int) -> tuple[str | int, ...]:
    """What takes the place of a video's placeholder: times as text, and counts of tokens.

    As transformers' Qwen3-VL writes it: `<0.3 seconds><|vision_start|>` tokens `<|vision_end|>`;
    a video of one grid is tokens alone.
    """
    depth, height, width = layout.grid
    tokens = height * width // merge_size**2
    if layout.times is not None:
        return (depth * tokens,)
    pieces: list[str | int] = []
    for time in layout.seconds:
        pieces += [f"<{time:.1f} seconds><|vision_start|>", tokens, "<|vision_end|>"]
    return tuple(pieces)


def _time_positions(count: int, sampled_fps: float, rules: VideoRules) -> tuple[float, ...] | None:
    """Where temporal patches are on M-RoPE's axis t; None where each is an image of its own.

    In single precision and in the order of stock's tensors, since positions are cut to whole ones
    unless they are fractional.
    """
    if rules.tokens_per_second is None:
        return None
    numbers = np.arange(count, dtype=np.float32)
    depth, a_second = rules.temporal_patch_size, np.float32(rules.tokens_per_second)
    if rules.tmrope:
        positions = numbers * np.float32(depth / rules.fps) * a_second
    else:
        positions = numbers * (a_second * np.float32(depth / sampled_fps))
    return tuple((positions if rules.fractional else positions.astype(np.int64)).tolist())


def _even_frames(num_frames: int, rate: float, rules: VideoRules) -> np.ndarray:
    """Numbers of the frames: whole patches of them, as transformers' Qwen2-VL samples them.

    A video of fewer frames than a patch has is taken whole.
    """
    depth = rules.temporal_patch_size
    if num_frames < depth:
        return np.arange(num_frames)
    most = min(rules.max_frames, num_frames) // depth * depth
    wanted = min(max(num_frames / rate * rules.fps, rules.min_frames), most)
    count = max(int(wanted // depth), 1) * depth
    return torch.arange(0, num_frames, num_frames / count).int().numpy().astype(np.int64)


def _bounded_frame_grid(
    width: int, height: int, num_frames: int, rules: VideoRules
) -> tuple[int, int]:
    """Rows and columns of patches in a frame: as an image's, within bounds of its own."""
    most = rules.max_pixels
    if rules.total_pixels is not None:  # a share of it, but never below the least
        share = rules.total_pixels // num_frames
        most = max(min(most, share), int(rules.min_pixels * 1.05))
    _, rows, cols = image_grid(width, height, ImageRules(*rules[:3], rules.min_pixels, most))
    return rows, cols


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
