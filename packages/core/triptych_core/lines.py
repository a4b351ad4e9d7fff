"""Files of a run that are replaced in one move, never half there; JSON lines, one a step."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All objects of the file; a last line that a killed run left unfinished is dropped."""
    objects = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return objects


def write_lines(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Replace the file by these objects, in one move."""
    write_whole(path, "".join(json.dumps(item) + "\n" for item in objects))


def write_whole(path: Path, text: str) -> None:
    """Replace the file by this text, UTF-8: a kill leaves the old one, or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def keep_steps_until(path: Path, step: int) -> None:
    """Forget what a resumed run will do again, so that every step stands in the file once."""
    if path.exists():
        write_lines(path, [item for item in read_lines(path) if item["step"] <= step])
