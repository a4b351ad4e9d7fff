"""The data part of a stage's YAML for the commands: what they show is what that stage sees."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from triptych_data.config import DataConfig

if TYPE_CHECKING:
    from triptych_data.processor import Processor  # which imports torch

MOST_YAML = 1 << 18  # bytes: reading a megabyte takes seconds
SEQ_LEN = 8192
"""Stands in where nothing that is shown depends on it."""


class StageConfig(NamedTuple):
    data: DataConfig
    model: str | None
    """the model folder that the file names"""


def read_stage(path: Path, **changes: Any) -> StageConfig:
    """The data section and model of a stage's YAML file, or of a data section alone.

    `changes` replace keys of data. Raises ValueError that names the wrong key.
    """
    import yaml

    try:
        if path.stat().st_size > MOST_YAML:
            raise ValueError(f"more than {MOST_YAML} bytes")
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: must be readable YAML, got {message}; check the file") from error
    section = tree.get("data", tree) if isinstance(tree, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{path}: must hold a data section, got none; write data.sources")
    model = tree["model"].get("path") if isinstance(tree.get("model"), dict) else None
    return StageConfig(build_data(section | changes, str(path)), model)


def build_data(section: dict[str, Any], where: str) -> DataConfig:
    """A data configuration with a default seq_len. Raises ValueError that names the wrong key."""
    try:
        return DataConfig(**{"seq_len": SEQ_LEN, **section})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("data", *first["loc"])))
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"{where}: {message if 'data.' in message else f'{key}: {message}'}"
        ) from (error)


def open_processor(model: str, data: DataConfig) -> "Processor":
    """The processor that a stage with this data section makes of the model folder."""
    from triptych_data.processor import Processor

    return Processor.from_directory(
        model,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        video=data.video,
        jpeg=data.jpeg,
        chat=data.chat,
    )
