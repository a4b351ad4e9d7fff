"""A model folder's tokenizer and image rules, applied to samples: encode, measure, decode."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from triptych_data.chat import IGNORE_INDEX, ChatTokenizer, ChatTokens, message_text, shift_targets
from triptych_data.images import ImageRules, encode_image, image_grid
from triptych_data.index import MediaColumns
from triptych_data.positions import mrope_positions
from triptych_data.sample import KINDS, RawSample, media_parts

ENCODING_VERSION = 1
"""To be raised whenever the same sample and model folder would give other tokens or patches."""

_BICUBIC = 3  # Pillow's number for it, as preprocessor_config.json writes it


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One document, ready to pack.

    `input_ids (L,)`, `shift_labels (L,)`, `position_ids (3, L)`, `image_grid_thw (num_images, 3)`:
    int64; `pixel_values (num_patches, patch_dim)` uint8, None without images; `num_targets` counts
    the labels that are not -100.
    """

    key: str
    input_ids: Tensor
    shift_labels: Tensor
    position_ids: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor
    num_targets: int


class Measures(NamedTuple):
    """What a sample will take: tokens, targets among them, image patches."""

    num_tokens: int
    num_targets: int
    num_patches: int


class Processor:
    """Samples to model inputs by the rules of a Hugging Face model folder (Qwen3-VL's layout).

    Pickling stores the folder's path, not the tokenizer; unpickling reads it again and raises
    ValueError if the folder has changed meanwhile.
    """

    def __init__(self, directory: Path, rules: ImageRules, settings: dict[str, Any]) -> None:
        template = _read_template(directory)
        self._directory = directory
        self._rules = rules
        self._chat = ChatTokenizer(directory, template)
        self.patch_size = rules.patch_size
        self.merge_size = rules.merge_size
        self.temporal_patch_size = rules.temporal_patch_size
        self.image_mean: tuple[float, ...] = tuple(settings.get("image_mean", (0.5, 0.5, 0.5)))
        self.image_std: tuple[float, ...] = tuple(settings.get("image_std", (0.5, 0.5, 0.5)))
        self.pad_token_id = self._chat.pad_token_id
        self.eos_token_id = self._chat.end_token_id
        self.image_token_id = self._chat.image_token_id
        self.fingerprint = _fingerprint(
            _read(directory / "tokenizer.json"),
            {
                "version": ENCODING_VERSION,
                "template": template,
                "special_ids": [self.pad_token_id, self.eos_token_id, self.image_token_id],
                **rules._asdict(),
            },
        )

    @classmethod
    def from_directory(
        cls,
        path: str | Path,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> "Processor":
        """Read tokenizer, chat template and preprocessor_config.json of a local model folder.

        `min_pixels` and `max_pixels` replace the folder's bounds on an image's size. Raises
        ValueError if a file is missing or asks for what we do not do.
        """
        directory = Path(path)
        settings = _read_json(directory / "preprocessor_config.json")
        return cls(directory, _image_rules(directory, settings, min_pixels, max_pixels), settings)

    def __reduce__(self) -> tuple[Any, ...]:
        bounds = (self._rules.min_pixels, self._rules.max_pixels)
        return _reopen, (str(self._directory.resolve()), *bounds, self.fingerprint)

    @property
    def patch_dim(self) -> int:
        """Values of one patch: 3 * temporal_patch_size * patch_size**2."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def encode(self, raw: RawSample) -> EncodedSample:
        """Encode a whole sample with its targets. Raises ValueError that names the sample."""
        try:
            return self._encode(raw, raw.json["messages"])
        except ValueError as error:
            raise ValueError(f"{raw.where}: {error}") from error

    def encode_prompt(self, raw: RawSample) -> tuple[EncodedSample, str]:
        """Encode what precedes the last assistant turn, generation prompt included, and return
        the text expected there.

        Raises ValueError, naming the sample, if its last message is not the assistant's.
        """
        *prompt, answer = raw.json["messages"]
        try:
            if answer["role"] != "assistant" or not prompt:
                raise ValueError(
                    f"the last message must be an assistant's answer, got {answer['role']!r}; "
                    "leave the sample out of the evaluation"
                )
            return self._encode(raw, prompt, add_generation_prompt=True), message_text(answer)
        except ValueError as error:
            raise ValueError(f"{raw.where}: {error}") from error

    def measure(self, record: dict[str, Any], media: MediaColumns) -> Measures:
        """Return what `encode` would make of a sample, without decoding its media.

        `media` are the index's rows of the sample, in the order in which the text meets them
        (`Shards.media_of`). Raises ValueError as `encode` does, except for damaged media, and
        names no sample.
        """
        for kind in media.kind.tolist():
            self._check_kind(KINDS[kind])
        grids = [image_grid(width, height, self._rules) for width, height in media.size.tolist()]
        tokens = self._tokenize(record["messages"], grids)
        num_targets = int(tokens.trained[1:].sum())
        return Measures(len(tokens.input_ids), num_targets, sum(t * h * w for t, h, w in grids))

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Return the text of token ids, without special tokens."""
        return self._chat.decode(ids.tolist() if isinstance(ids, Tensor) else ids)

    def _encode(
        self,
        raw: RawSample,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
    ) -> EncodedSample:
        images = []
        for kind, index in media_parts({"messages": messages}):
            self._check_kind(kind)
            try:
                images.append(encode_image(raw.media[index], self._rules))
            except ValueError as error:
                raise ValueError(f"image {index}: {error}") from error
        grids = [grid for _, grid in images]
        tokens = self._tokenize(messages, grids, add_generation_prompt)
        labels = np.full_like(tokens.input_ids, IGNORE_INDEX)
        if not add_generation_prompt:
            labels = shift_targets(tokens)
        grid_array = np.array(grids, dtype=np.int64).reshape(-1, 3)
        is_image = tokens.input_ids == self.image_token_id
        return EncodedSample(
            key=raw.key,
            input_ids=torch.from_numpy(tokens.input_ids),
            shift_labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(mrope_positions(is_image, grid_array, self.merge_size)),
            pixel_values=torch.cat([patches for patches, _ in images]) if images else None,
            image_grid_thw=torch.from_numpy(grid_array),
            num_targets=int((labels != IGNORE_INDEX).sum()),
        )

    def _check_kind(self, kind: str) -> None:
        if kind != "image":
            raise ValueError(
                f"{self._directory}: a model must take what its samples hold, got {kind} for a "
                "model of text and images; leave the sample out"
            )

    def _tokenize(
        self,
        messages: list[dict[str, Any]],
        grids: list[tuple[int, int, int]],
        add_generation_prompt: bool = False,
    ) -> ChatTokens:
        lengths = [t * h * w // self.merge_size**2 for t, h, w in grids]
        tokens = self._chat.encode(messages, lengths, add_generation_prompt=add_generation_prompt)
        if not add_generation_prompt and not tokens.trained[1:].any():
            raise ValueError(
                "a sample must hold a target, got no text in any assistant turn; leave it out"
            )
        return tokens


def _reopen(path: str, min_pixels: int, max_pixels: int, fingerprint: str) -> Processor:
    processor = Processor.from_directory(path, min_pixels=min_pixels, max_pixels=max_pixels)
    if processor.fingerprint != fingerprint:
        raise ValueError(
            f"{path}: tokenizer, chat template and image settings must not change during a run, "
            "got other ones than at its start; start the run again"
        )
    return processor


def _image_rules(
    directory: Path, settings: dict[str, Any], min_pixels: int | None, max_pixels: int | None
) -> ImageRules:
    where = f"{directory}/preprocessor_config.json"
    if settings.get("resample", _BICUBIC) != _BICUBIC:
        raise ValueError(
            f"{where}: resample must be {_BICUBIC} (bicubic), got {settings['resample']}"
        )
    size = settings.get("size") or {}
    # Older files give the bounds at the top level; there they win, as in transformers.
    lowest = min_pixels or settings.get("min_pixels") or size.get("shortest_edge")
    highest = max_pixels or settings.get("max_pixels") or size.get("longest_edge")
    numbers: dict[str, Any] = {
        "patch_size": settings.get("patch_size"),
        "merge_size": settings.get("merge_size"),
        "temporal_patch_size": settings.get("temporal_patch_size"),
        "size.shortest_edge": lowest,
        "size.longest_edge": highest,
    }
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {name} must be a positive integer, got {value!r}; add it")
    rules = ImageRules(*numbers.values())
    token_area = (rules.patch_size * rules.merge_size) ** 2
    if not rules.min_pixels <= rules.max_pixels or rules.max_pixels < token_area:
        raise ValueError(
            f"data.max_pixels: must be at least min_pixels and one token's {token_area} pixels, "
            f"got min_pixels={rules.min_pixels}, max_pixels={rules.max_pixels}; change "
            f"data.min_pixels or data.max_pixels (defaults are in {where})"
        )
    return rules


def _fingerprint(tokenizer: bytes, settings: dict[str, Any]) -> str:
    """Hash all that token ids and patches depend on; mean and std act later, on the device."""
    digest = hashlib.sha256(tokenizer)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def _read_template(directory: Path) -> str:
    """Return the chat template from where transformers looks for it, newest place first."""
    if (directory / "chat_template.jinja").exists():
        return _read(directory / "chat_template.jinja").decode()
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (directory / name).exists():
            template = _read_json(directory / name).get("chat_template")
            if isinstance(template, str):
                return template
    raise ValueError(
        f"{directory}: must hold a chat template, got neither chat_template.jinja nor a "
        "chat_template in tokenizer_config.json; copy it from the model's instruct version"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: must be valid JSON, got {error}; fetch the file again"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: must be a readable file, got {error.strerror}; model.path must name a local "
            "Hugging Face model folder"
        ) from error
