"""What data depended on when a run was saved, and what it depends on now."""

from typing import Any


def differences(was: dict[str, Any], now: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what two plans depend on differently, by name."""
    return {
        name: {"was": was.get(name), "is": now.get(name)}
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    }


def in_words(changed: dict[str, dict[str, Any]]) -> str:
    """The differences as part of an error message."""
    return ", and ".join(
        f"{name} must be {values['was']!r} as when it was saved, got {values['is']!r}"
        for name, values in changed.items()
    )
