"""Credentials of the environment, which a storage library's error may quote, are not printed.

The names are those of triptych_core.secrets; neither package imports the other, a test holds them
together.
"""

import os
import re

SHORTEST = 8  # characters: `1` or `true` would be masked everywhere
_NAME = re.compile(
    r"(secret|password|passwd|passphrase|credential|apikey|authtoken)(?![a-z0-9])"
    r"|(?<![a-z0-9])(token|key|credentials|connection|auth|authorization|sas)(?![a-z0-9])"
)


def is_secret_name(name: str) -> bool:
    """Whether what has this name is secret: `HF_TOKEN`, `api_key`; not `tiktoken`."""
    return bool(_NAME.search(re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()))


def masked(text: str) -> str:
    """Text with *** for what the environment holds under such a name; paths of files are none."""
    values = [value for name, value in os.environ.items() if is_secret_name(name)]
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= SHORTEST and not os.path.exists(value):  # noqa: PTH110
            text = text.replace(value, "***")
    return text
