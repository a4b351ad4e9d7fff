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

_ENDINGS = ("secret", "password", "passwd", "passphrase", "credential", "apikey", "authtoken")
_WORDS = ("token", "key", "credentials", "connection", "auth", "authorization", "sas")
_USER = re.compile(r"(://)[^/\s'\"<>]*@")
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s?'\"<>]+\?)[^\s'\"<>]+")

Tree = TypeVar("Tree")


def is_secret_name(name: str) -> bool:
    """Whether what has this name is secret: `api_key`, `HF_TOKEN`, `--password`; not `tiktoken`."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())
    return any(word.endswith(_ENDINGS) or word in _WORDS for word in words)


def masked(text: str) -> str:
    """Text with *** for what is secret in it."""
    return _masked_text(text, _of_environment())


def masked_tree(tree: Tree) -> Tree:
    """A tree of settings with *** for every secret, also in its keys."""
    masked: Tree = _masked_value(tree, _of_environment())
    return masked


def masked_words(words: Sequence[str]) -> list[str]:
    """A command line: also what follows `--token`, and the right side of `api_key=`."""
    return _masked_words(words, _of_environment())


def mask_tracebacks() -> None:
    """From now on what ends this process, or a thread of it, is told without secrets."""
    sys.excepthook = _tell
    threading.excepthook = lambda args: _tell(args.exc_type, args.exc_value, args.exc_traceback)


def _tell(kind: Any, error: Any, trace: Any) -> None:
    sys.stderr.write(masked("".join(traceback.format_exception(kind, error, trace))))
    sys.stderr.flush()


def _of_environment() -> list[str]:
    """Secrets of the environment, longest first; looked for once a tree: paths are asked for."""
    named = [value for name, value in os.environ.items() if is_secret_name(name)]
    # Not Path.exists, which raises where a text is too long to be a name.
    found = [v for v in named if len(v) >= SHORTEST and not os.path.exists(v)]  # noqa: PTH110
    return sorted(found, key=len, reverse=True)


def _masked_text(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    return _QUERY.sub(rf"\1{MASK}", _USER.sub(rf"\1{MASK}@", text))


def _masked_words(words: Sequence[str], secrets: Sequence[str]) -> list[str]:
    found = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, _ = word.partition("=")
        if before.startswith("-") and "=" not in before and is_secret_name(before):
            found.append(MASK)
        elif equals and is_secret_name(name):
            found.append(f"{name}={MASK}")
        else:
            found.append(_masked_text(word, secrets))
    return found


def _masked_value(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            _masked_text(key, secrets) if isinstance(key, str) else key: MASK
            if _is_secret(key, inner)
            else _masked_value(inner, secrets)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        if all(isinstance(each, str) for each in value):
            return _masked_words(value, secrets)
        return [_masked_value(each, secrets) for each in value]
    return _masked_text(value, secrets) if isinstance(value, str) else value


def _is_secret(key: Any, value: Any) -> bool:
    """Texts, not numbers: `pad_token_id` is none."""
    return isinstance(key, str) and isinstance(value, str) and value != "" and is_secret_name(key)
