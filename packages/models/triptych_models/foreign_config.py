"""config.json from anywhere: what would fetch or run code, or fill the memory, is refused.

Looks at the JSON before transformers does.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Names under which transformers has kept, or keeps, what to fetch and run for a part of the model
# (CVE-2026-4372); of a folder that was saved none has a value with a slash.
_CODE = ("attn_implementation", "experts_implementation", "kernel")
# The most of each that is no mistake; the largest published models are below a tenth of it.
_MOST = {
    "num_hidden_layers": 1 << 12,
    "depth": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_heads": 1 << 12,
    "num_experts": 1 << 14,
    "num_local_experts": 1 << 14,
    "n_routed_experts": 1 << 14,
    "n_shared_experts": 1 << 8,
    "hidden_size": 1 << 18,
    "out_hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
    "patch_size": 1 << 12,
    "temporal_patch_size": 1 << 12,
    "spatial_merge_size": 1 << 8,
}


def read_foreign(file: Path) -> dict[str, Any]:
    """The object in a config.json.

    Raises ValueError for what is none, for keys that name code to fetch, and for sizes that are
    none.
    """
    try:
        config = json.loads(file.read_bytes())
        if not isinstance(config, dict):
            raise TypeError(f"a {type(config).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file}: must be a JSON object, got {error}; download it again"
        ) from error
    for key, value in _entries(config):
        name = key.rpartition(".")[2]
        if any(part in name for part in _CODE) and isinstance(value, str) and "/" in value:
            raise ValueError(
                f"{file}: {key} must name no code to fetch, got {value[:80]!r}; remove it if you "
                "trust the rest"
            )
        most = _MOST.get(name)
        if most is not None and value is not None and not _is_size(name, value, most):
            raise ValueError(
                f"{file}: {key} must be from 1 to {most}, got {str(value)[:80]}; download it again"
            )
    return config


def _is_size(name: str, value: Any, most: int) -> bool:
    """Whether it is a number from 1 on; of a patch also its sides."""
    sides = name == "patch_size" and isinstance(value, list) and len(value) in (2, 3)
    return all(
        isinstance(number, int) and not isinstance(number, bool) and 0 < number <= most
        for number in (value if sides else [value])
    )


def _entries(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a list is a value."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
