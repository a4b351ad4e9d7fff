"""What must not stand in logs and files: credentials in URLs, settings and the environment.

Secret is what lies under a name such as `hf_token`, `AWS_SECRET_ACCESS_KEY` or `password`: in the
environment (8 characters and more, wherever they turn up; paths of files are none), as a setting,
as an option; and of a URL its user, its password and its query, which holds signatures.
Imports no torch.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

MASK = "***"
SHORTEST = 8  # of the environment: `1` or `true` would be masked everywhere

_ENDINGS = ("token", "key", "secret", "password", "passwd", "passphrase", "credential")
_CREDENTIALS = ("credentials", "connection", "auth", "authorization", "sas")
_USER = re.compile(r"(://)[^/\s'\"<>]*@")
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s?'\"<>]+\?)[^\s'\"<>]+")

Tree = TypeVar("Tree")


def is_secret_name(name: str) -> bool:
    """Whether what has this name is secret: `api_key`, `HF_TOKEN`, `--password`; not `num_keys`."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())
    return any(word.endswith(_ENDINGS) or word in _CREDENTIALS for word in words)


def masked(text: str) -> str:
    """Text with *** for what is secret in it."""
    for value in sorted(_of_environment(), key=len, reverse=True):
        text = text.replace(value, MASK)
    return _QUERY.sub(rf"\1{MASK}", _USER.sub(rf"\1{MASK}@", text))


def masked_tree(tree: Tree) -> Tree:
    """A tree of settings with *** for every secret, also in its keys."""
    masked: Tree = _masked_value(tree)
    return masked


def masked_words(words: Sequence[str]) -> list[str]:
    """A command line: also what follows `--token`, and the right side of `api_key=`."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, _ = word.partition("=")
        if before.startswith("-") and "=" not in before and is_secret_name(before):
            found.append(MASK)
        elif equals and is_secret_name(name):
            found.append(f"{name}={MASK}")
        else:
            found.append(masked(word))
    return found


def mask_tracebacks() -> None:
    """From now on what ends this process, or a thread of it, is told without secrets."""
    sys.excepthook = _tell
    threading.excepthook = lambda args: _tell(args.exc_type, args.exc_value, args.exc_traceback)


def _tell(kind: Any, error: Any, trace: Any) -> None:
    sys.stderr.write(masked("".join(traceback.format_exception(kind, error, trace))))
    sys.stderr.flush()


def _of_environment() -> list[str]:
    named = [value for name, value in os.environ.items() if is_secret_name(name)]
    # Not Path.exists, which raises where a text is too long to be a name.
    return [v for v in named if len(v) >= SHORTEST and not os.path.exists(v)]  # noqa: PTH110


def _masked_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            masked(key) if isinstance(key, str) else key: MASK
            if _is_secret(key, inner)
            else _masked_value(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        words = all(isinstance(each, str) for each in value)
        return masked_words(value) if words else [_masked_value(each) for each in value]
    return masked(value) if isinstance(value, str) else value


def _is_secret(key: Any, value: Any) -> bool:
    """Texts, not numbers: `pad_token_id` is none."""
    return isinstance(key, str) and isinstance(value, str) and value != "" and is_secret_name(key)
