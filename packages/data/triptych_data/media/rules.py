"""How a model folder wants images and videos: preprocessor files to `ImageRules`, `VideoRules`."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from triptych_data.media.audio import AudioRules
from triptych_data.media.config import VideoConfig
from triptych_data.media.images import BICUBIC, INTERPOLATIONS, ImageRules
from triptych_data.media.tiling import TilingRules
from triptych_data.media.video import VideoRules

IMAGE_FILE = "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
CONFIG_FILE = "config.json"
_MOST_TILES = 256
# What transformers' Qwen3-VL video processor does where the file does not say.
_VIDEO_DEFAULTS = {"fps": 2, "min_frames": 4, "max_frames": 768}
_COUNTS = ("min_frames", "max_frames")
_VIDEO_FRAME_TOKENS = 768
_VIDEO_TYPE = "Qwen3VLVideoProcessor"
# What Qwen2.5-VL's authors do (qwen-vl-utils), whose folders have no file for videos; as the
# defaults of transformers' Qwen2VLVideoProcessor, whose budget is 0.9 of so many tokens.
_GRID_PROCESSOR = "Qwen2_5_VLProcessor"
_FRAME_TOKENS = {"shortest_edge": 128, "longest_edge": 768}
_GRID_SIZE = {edge: tokens * 28 * 28 for edge, tokens in _FRAME_TOKENS.items()}
_GRID_TOKENS = 128_000
# Transformers' Qwen-Omni processors, which heed no other size for videos unless asked to: a token's
# side in pixels, of which _FRAME_TOKENS bound a frame, and frames a second where none are said.
_OMNI = {"Qwen2_5OmniProcessor": (28, 2), "Qwen3OmniMoeProcessor": (32, 1)}
# Of transformers' Qwen-Omni, where config.json does not say: positions of M-RoPE in a second, and
# how long the pieces are in which a video's sound follows its pictures.
_POSITIONS_A_SECOND = ("position_id_per_seconds", 25)
_SECONDS_A_CHUNK = ("seconds_per_chunk", 2)
_CHUNKED_SOUND = ("Qwen2_5OmniProcessor",)
# LLaVA-OneVision's videos: 32 frames at most, of one a second (arXiv 2408.03326, section 4).
_TILED_PROCESSOR = "LlavaOnevisionProcessor"
_TILED_SAMPLING = {"fps": 1, "min_frames": 1, "max_frames": 32}
_RATIO = re.compile(r"anyres_max_([1-9]\d{0,3})")
_MOST_TILES_A_SIDE = 64
_PATCHES_A_SIDE = "vit_max_num_patch_per_side"
_PLAIN_POSITIONS = ("llavaonevision1_5",)  # by config.json; the processor is Qwen2.5-VL's
_HEARS = "WhisperFeatureExtractor"
_CHUNKS = {"Qwen3OmniMoeProcessor": 100}  # frames, by the processor's class; it knows no other
_BEHIND = {"AeroProcessor": 2}  # frames that Whisper's convolutions see of what follows
_MOST_SECONDS = 3600
_TOKENS_PER_SECOND = 4  # of transformers' Qwen2.5-VL, where config.json does not say


def read_image_rules(
    directory: Path, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> tuple[ImageRules, dict[str, Any]]:
    """The rules for images and all settings of preprocessor_config.json; arguments replace bounds.

    Raises ValueError if the file is missing or asks for what we do not do.
    """
    path = directory / IMAGE_FILE
    settings = read_json(path)
    bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    if "height" in (settings.get("size") or {}):
        return _one_size(path, settings, bounds), settings
    numbers: dict[str, Any] = dict(_geometry(path, settings, bounds))
    rules = ImageRules(**numbers, most_side=_most_side(path.with_name(CONFIG_FILE), numbers))
    _check_bounds(path, rules, "data.min_pixels", "data.max_pixels")
    return rules, settings


def _most_side(path: Path, numbers: Mapping[str, Any]) -> int | None:
    """The longest side in pixels that a Bagel's table of positions has, by config.json."""
    config = read_json(path) if path.exists() else {}
    most: Any = config.get(_PATCHES_A_SIDE)
    if most is None:
        return None
    if not isinstance(most, int) or most < numbers["merge_size"]:
        raise ValueError(
            f"{path}: {_PATCHES_A_SIDE} must be a number of patches, got {str(most)[:80]}; fetch "
            "the file again"
        )
    factor = numbers["merge_size"]
    return most // factor * factor * int(numbers["patch_size"])


def read_audio_rules(directory: Path) -> AudioRules | None:
    """The rules for sound, where preprocessor_config.json is also Whisper's; else None.

    Raises ValueError if it asks for what we do not do.
    """
    path = directory / IMAGE_FILE
    settings = read_json(path) if path.exists() else {}
    if settings.get("feature_extractor_type") != _HEARS:
        return None
    plain = AudioRules()
    bounds = {
        "sampling_rate": (plain.rate, 1, 1 << 18),
        "n_fft": (plain.window, 2, 1 << 16),
        "hop_length": (plain.hop, 1, 1 << 16),
        "feature_size": (plain.num_mels, 1, 1 << 12),
        "chunk_length": (int(plain.max_seconds), 1, _MOST_SECONDS),
    }
    numbers = []
    for name, (default, least, most) in bounds.items():
        value: Any = settings.get(name, default)
        if not isinstance(value, int) or not least <= value <= most:
            raise ValueError(
                f"{path}: {name} must be from {least} to {most}, got {str(value)[:80]}; fetch the "
                "file again"
            )
        numbers.append(value)
    for name in ("dither", "padding_value"):
        if settings.get(name):
            raise ValueError(f"{path}: {name} must be 0, got {settings[name]}; use a model's own")
    name = str(settings.get("processor_class"))
    return AudioRules(*numbers)._replace(chunk=_CHUNKS.get(name), behind=_BEHIND.get(name, 0))


def has_images(directory: Path) -> bool:
    """Whether a folder has files for images or videos: one for sound alone may be there, too."""
    path = directory / IMAGE_FILE
    if (directory / VIDEO_FILE).exists() or not path.exists():
        return (directory / VIDEO_FILE).exists()
    settings = read_json(path)
    return "feature_extractor_type" not in settings or "image_processor_type" in settings


def read_video_rules(directory: Path, config: VideoConfig) -> VideoRules | None:
    """The rules for videos by video_preprocessor_config.json; None if the folder has none.

    A Qwen2.5-VL's and a Qwen-Omni's need no such file. What `config` holds replaces the file's.
    Raises ValueError if the file or `config` asks for what we do not do.
    """
    path = directory / VIDEO_FILE
    images = read_json(directory / IMAGE_FILE)
    settings = read_json(path) if path.exists() else {}
    names = (settings.get("processor_class"), images.get("processor_class"))
    if _GRID_PROCESSOR in names:
        return _grid_rules(path, settings or _without_file(images), config)
    omni = next((name for name in names if name in _OMNI), None)
    if omni is not None:
        return _omni_rules(path, settings or _without_file(images), config, omni)
    if config.frame_pixels is not None:
        raise ValueError(
            "data.video.frame_pixels: must be left out for a model whose videos are not one grid, "
            f"got {list(config.frame_pixels)}; set data.video.max_pixels"
        )
    if not settings or settings.get("video_processor_type", _VIDEO_TYPE) != _VIDEO_TYPE:
        return None  # laid out in another way: refused when a sample has one
    bounds = {"min_pixels": None, "max_pixels": config.max_pixels}
    numbers: dict[str, Any] = dict(_geometry(path, settings, bounds))
    capped = settings.get("cap_pixels_per_frame")
    tokens = settings.get("max_video_tokens", _VIDEO_FRAME_TOKENS) if capped else None
    rules = VideoRules(**numbers, **_sampling(path, settings, config), max_frame_tokens=tokens)
    _check_bounds(path, rules, "size.shortest_edge", "data.video.max_pixels")
    return rules


def _without_file(images: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for videos of one grid where a folder has those for images alone."""
    shared = ("patch_size", "merge_size", "temporal_patch_size", "resample")
    kept = {name: images[name] for name in shared if name in images}
    return kept | {"size": _GRID_SIZE, "cap_pixels_per_frame": True}


def _grid_rules(path: Path, settings: Mapping[str, Any], config: VideoConfig) -> VideoRules:
    """Qwen2.5-VL's rules: bounds on each frame, and seconds in the positions."""
    settings = {"size": _GRID_SIZE, **settings}
    least, most = config.frame_pixels or (None, None)
    bounds = {"min_pixels": least, "max_pixels": most}
    numbers: dict[str, Any] = dict(_geometry(path, settings, bounds))
    total = config.max_pixels
    if total is None and settings.get("cap_pixels_per_frame"):
        area = (numbers["patch_size"] * numbers["merge_size"]) ** 2
        total = int(settings.get("max_video_tokens", _GRID_TOKENS) * area * 0.9)
        total *= numbers["temporal_patch_size"]
    rules = VideoRules(
        **numbers,
        **_sampling(path, settings, config),
        tokens_per_second=_tokens_per_second(path.with_name(CONFIG_FILE)),
        total_pixels=total,
    )
    _check_bounds(path, rules, "size.shortest_edge", "data.video.frame_pixels")
    return rules


def _omni_rules(
    path: Path, settings: Mapping[str, Any], config: VideoConfig, name: str
) -> VideoRules:
    """Qwen-Omni's rules: Qwen2.5-VL's with bounds of its own, and seconds by the rate asked for."""
    side, fps = _OMNI[name]
    own = {n: v for n, v in settings.items() if n not in ("min_pixels", "max_pixels")}
    own["size"] = {edge: tokens * side**2 for edge, tokens in _FRAME_TOKENS.items()}
    own["fps"] = settings.get("fps") or fps
    a_second = _thinker_number(path.with_name(CONFIG_FILE), *_POSITIONS_A_SECOND)
    chunk = 0
    if name in _CHUNKED_SOUND:
        chunk = int(a_second * _thinker_number(path.with_name(CONFIG_FILE), *_SECONDS_A_CHUNK))
    rules = _grid_rules(path, own, config)
    rules = rules._replace(tokens_per_second=a_second, tmrope=True, sound_chunk=chunk)
    seconds = rules.temporal_patch_size / rules.fps
    # Stock's positions of a Qwen3-Omni are single precision's, and not cut.
    is_whole = (seconds * a_second).is_integer() and (seconds * 256).is_integer()
    return rules._replace(fractional=name not in _CHUNKED_SOUND and not is_whole)


def _thinker_number(path: Path, name: str, default: float) -> float:
    """A positive number of a Qwen-Omni by config.json, also a whole model's."""
    config = read_json(path) if path.exists() else {}
    thinker = config.get("thinker_config")
    given = thinker if isinstance(thinker, dict) else config
    value: Any = given.get(name, default)
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{path}: {name} must be positive, got {value!r}; fetch the file again")
    return value


def _tokens_per_second(path: Path) -> float:
    """Positions of Qwen2.5-VL's M-RoPE in a second of video, by config.json."""
    vision = read_json(path).get("vision_config") if path.exists() else None
    given = vision if isinstance(vision, dict) else {}
    value: Any = given.get("tokens_per_second", _TOKENS_PER_SECOND)
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(
            f"{path}: vision_config.tokens_per_second must be positive, got {value!r}; "
            "fetch the file again"
        )
    return value


def _sampling(path: Path, settings: Mapping[str, Any], config: VideoConfig) -> dict[str, Any]:
    """How often frames are taken, and how many, checked."""
    sampling = {**_VIDEO_DEFAULTS, **_said(settings)}
    if config.fps is not None:
        sampling["fps"] = config.fps
    if config.max_frames is not None:
        sampling["max_frames"] = config.max_frames
        sampling["min_frames"] = min(sampling["min_frames"], config.max_frames)
    for name, value in sampling.items():
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{path}: {name} must be positive, got {value!r}; fix it")
    return sampling


def _said(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is not null: transformers writes what a processor leaves open so."""
    return {n: settings[n] for n in _VIDEO_DEFAULTS if settings.get(n) is not None}


def has_mrope(directory: Path) -> bool:
    """Whether tokens of a model with images of many sizes have places in time, height and width."""
    path = directory / CONFIG_FILE
    return not path.exists() or read_json(path).get("model_type") not in _PLAIN_POSITIONS


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder. Raises ValueError, with the file, if there is none."""
    try:
        value = json.loads(read_bytes(path))
        if not isinstance(value, dict):
            raise TypeError(f"a {type(value).__name__}")
        return value
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: must be a JSON object, got {error}; fetch the file again"
        ) from error


def read_bytes(path: Path) -> bytes:
    """A file of a model folder. Raises ValueError, with the file, if there is none."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: must be a readable file, got {error.strerror}; model.path must name a local "
            "Hugging Face model folder"
        ) from error


def _one_size(
    path: Path, settings: Mapping[str, Any], bounds: Mapping[str, int | None]
) -> ImageRules:
    """The rules of a tower whose images are all squares of one size, as SigLIP's."""
    side, interpolation = settings["size"]["height"], settings.get("resample", BICUBIC)
    beside = path.with_name(PROCESSOR_FILE)
    processor = read_json(beside) if beside.exists() or "patch_size" not in settings else {}
    patch_size: Any = settings.get("patch_size") or processor.get("patch_size")
    patch_size = patch_size or _patch_of_model(path.with_name(CONFIG_FILE))
    for name, given, is_right, wanted in (
        ("size.width", settings["size"].get("width"), settings["size"].get("width") == side, side),
        ("resample", interpolation, interpolation in INTERPOLATIONS, "2 or 3"),
        ("do_center_crop", True, not settings.get("do_center_crop"), "false"),
        ("patch_size", patch_size, isinstance(patch_size, int) and 0 < patch_size <= side, "given"),
    ):
        if not is_right:
            raise ValueError(
                f"{path}: {name} must be {wanted} for images of one size, got {given}; "
                "take the files of a model of one size"
            )
    for name, value in bounds.items():
        if value is not None:
            raise ValueError(
                f"data.{name}: must be left out for a model whose images are all "
                f"{side}x{side} pixels, got {value}"
            )
    mode = None if interpolation == BICUBIC else interpolation
    tokens = _image_tokens(beside, processor, (side // patch_size) ** 2)
    return ImageRules(
        patch_size,
        1,
        1,
        side**2,
        side**2,
        side,
        mode,
        tokens,
        _tiles(path, settings, processor),
        _tiling(path, settings, processor, side // patch_size),
    )


def read_frame_rules(directory: Path, config: VideoConfig, images: ImageRules) -> VideoRules:
    """LLaVA-OneVision's rules for videos, whose frames are squares as its images are.

    Raises ValueError if the file asks for what we do not do, or `config` for a number of pixels.
    """
    path, side = directory / VIDEO_FILE, images.side
    settings = read_json(path) if path.exists() else {}
    size = settings.get("size") or {"height": side, "width": side}
    frames = settings.get("num_frames")
    for name, given, is_right, wanted in (
        ("size", size, size == {"height": side, "width": side}, f"{side} x {side}"),
        ("resample", settings.get("resample"), settings.get("resample", BICUBIC) == BICUBIC, "3"),
    ):
        if not is_right:
            raise ValueError(f"{path}: {name} must be {wanted}, got {given}; fetch it again")
    for name, given in (("max_pixels", config.max_pixels), ("frame_pixels", config.frame_pixels)):
        if given is not None:
            raise ValueError(
                f"data.video.{name}: must be left out for a model whose frames are all "
                f"{side}x{side} pixels, got {given}; set data.video.max_frames"
            )
    sampling = _TILED_SAMPLING | ({} if frames is None else dict.fromkeys(_COUNTS, frames))
    sampled = _sampling(path, {**sampling, **settings}, config)
    return VideoRules(*images[:5], **sampled, side=side)


def _tiling(
    path: Path, settings: Mapping[str, Any], processor: Mapping[str, Any], side: int
) -> TilingRules | None:
    """How images of any resolution are tiled: by LLaVA-OneVision's processor."""
    names = (settings.get("processor_class"), processor.get("processor_class"))
    if _TILED_PROCESSOR not in names:
        return None
    tile, sizes = settings["size"]["height"], settings.get("image_grid_pinpoints")
    most = _MOST_TILES_A_SIDE * tile
    is_right = isinstance(sizes, list) and all(
        isinstance(size, list)
        and len(size) == 2
        and all(isinstance(n, int) and 0 < n <= most and n % tile == 0 for n in size)
        for size in sizes
    )
    if not is_right or not sizes:
        raise ValueError(
            f"{path}: image_grid_pinpoints must be heights and widths, each a multiple of {tile}, "
            f"got {str(sizes)[:80]}; fetch the file again"
        )
    ratio = processor.get("vision_aspect_ratio", "anyres_max_9")
    found = _RATIO.fullmatch(ratio) if isinstance(ratio, str) else None
    if found is None:
        raise ValueError(
            f"{path.with_name(PROCESSOR_FILE)}: vision_aspect_ratio must be anyres_max_ and a "
            f"number, got {ratio!r}; fetch the file again"
        )
    resolutions = tuple((height, width) for height, width in sizes)
    return TilingRules(tile, side, resolutions, int(found[1]))


def _patch_of_model(path: Path) -> Any:
    """What config.json says of patches, where no file of the processor does: InternVL's."""
    if not path.exists():
        return None
    vision = read_json(path).get("vision_config")
    size = vision.get("patch_size") if isinstance(vision, dict) else None
    return size[0] if isinstance(size, list) and size and len({*map(str, size)}) == 1 else size


def _tiles(
    path: Path, settings: Mapping[str, Any], processor: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Into how many tiles images are cut: by InternVL's processor, whatever else its file says."""
    names = (settings.get("processor_class"), processor.get("processor_class"))
    if "InternVLProcessor" not in names:
        return None
    fewest, most = settings.get("min_patches", 1), settings.get("max_patches", 12)
    numbers = isinstance(fewest, int) and isinstance(most, int)
    if not numbers or not 0 < fewest <= most <= _MOST_TILES:
        raise ValueError(
            f"{path}: min_patches and max_patches must be in order from 1 to {_MOST_TILES}, got "
            f"{fewest} and {most}; fetch the file again"
        )
    return fewest, most


def _image_tokens(path: Path, processor: Mapping[str, Any], patches: int) -> int | None:
    """What an image of one size becomes by processor_config.json; None is a token a patch.

    InternVL's says image_seq_length, LLaVA's what is added to the patches.
    """
    tokens: Any = processor.get("image_seq_length")
    if tokens is None:
        tokens = patches + processor.get("num_additional_image_tokens", 0)
        tokens -= processor.get("vision_feature_select_strategy") == "default"
    if not isinstance(tokens, int) or not 0 < tokens <= patches:
        raise ValueError(
            f"{path}: an image must become 1 to {patches} tokens, got {tokens}; fetch it again"
        )
    return None if tokens == patches else tokens


def _geometry(
    path: Path, settings: Mapping[str, Any], bounds: Mapping[str, int | None]
) -> dict[str, int]:
    """The numbers that images and videos share, checked."""
    if settings.get("resample", BICUBIC) != BICUBIC:
        raise ValueError(
            f"{path}: resample must be {BICUBIC} (bicubic), got {settings['resample']}; "
            "use a model that does"
        )
    size = settings.get("size") or {}
    numbers = {
        name: settings.get(name) for name in ("patch_size", "merge_size", "temporal_patch_size")
    }
    # Older files give the bounds at the top level; there they win, as in transformers.
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        numbers[name] = bounds[name] or settings.get(name) or size.get(edge)
    names = {"min_pixels": "size.shortest_edge", "max_pixels": "size.longest_edge"}
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{path}: {names.get(name, name)} must be a positive integer, got {value!r}; add it"
            )
    return numbers  # type: ignore[return-value]  # checked above


def _check_bounds(path: Path, rules: ImageRules | VideoRules, lowest: str, highest: str) -> None:
    token_area = (rules.patch_size * rules.merge_size) ** 2
    if not rules.min_pixels <= rules.max_pixels or rules.max_pixels < token_area:
        raise ValueError(
            f"{highest}: must be at least min_pixels and one token's {token_area} pixels, "
            f"got min_pixels={rules.min_pixels}, max_pixels={rules.max_pixels}; change "
            f"{lowest} or {highest} (defaults are in {path})"
        )
