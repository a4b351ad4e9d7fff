"""Which shards the arguments name: files, folders, globs, brace ranges, URLs."""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from triptych_data.storage.open import Location
from triptych_data.storage.remote import filesystem, is_url, shown

MOST_BRACES = 1_000_000
"""Names that one argument may expand to: a slip of the finger must not fill the memory."""
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def find_shards(paths: str | Path | Sequence[str | Path]) -> list[Location]:
    """The tars that `paths` name, local ones as Path and URLs as str.

    A path is a file, a folder (its `*.tar`), a glob, or any of them with braces:
    `shard-{000000..000012}.tar`, `{a,b}/*.tar`. URLs of http(s) name files, those of other schemes
    also folders and globs. Arguments keep their order, what one of them finds is sorted, a file
    named twice counts once. Raises ValueError when an argument finds nothing, and for `pipe:`.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    found: dict[Location, Location] = {}
    for name in itertools.chain.from_iterable(map(_names, paths)):
        tars = _expand_url(name) if isinstance(name, str) else _expand_local(name)
        if not tars:
            raise ValueError(
                f"{name}: must be a shard, a folder with *.tar or a glob, got nothing there; "
                "check the path, or write shards with: triptych-data shard"
            )
        for tar in tars:
            found.setdefault(tar.resolve() if isinstance(tar, Path) else tar, tar)
    if not found:
        raise ValueError("shards: must name at least one shard, got none; add a folder or file")
    return list(found.values())


def expand_braces(text: str) -> Iterator[str]:
    """`a{1..3}b{x,y}` as a shell expands it: numbers keep the width of the first one.

    Raises ValueError for more than MOST_BRACES names. What is no list and no range stays as it is.
    """
    parts = BRACES.split(text)
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
        if count > MOST_BRACES:
            raise ValueError(
                f"{text}: must expand to at most {MOST_BRACES} names, got more; shorten the range"
            )
    return ("".join(chosen) for chosen in itertools.product(*choices))


def _choices(inside: str) -> Sequence[str]:
    if match := RANGE.fullmatch(inside):
        first, last = int(match[1]), int(match[2])
        if abs(last - first) >= MOST_BRACES:
            raise ValueError(
                f"{{{inside}}}: must hold at most {MOST_BRACES} numbers, got more; shorten it"
            )
        step = 1 if last >= first else -1
        return [f"{i:0{len(match[1])}d}" for i in range(first, last + step, step)]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]


def _names(path: str | Path) -> Iterator[Location]:
    """One argument without braces, unless a file is named so."""
    if isinstance(path, str):
        path = path.removeprefix("file://")
    if is_url(path):
        return expand_braces(str(path))
    return iter([Path(path)]) if Path(path).exists() else map(Path, expand_braces(str(path)))


def _expand_local(path: Path) -> list[Location]:
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.is_file():
        return [path]
    anchor = Path(path.anchor or ".")
    matches = anchor.glob(str(path.relative_to(path.anchor)))
    return sorted(match for match in matches if match.suffix == ".tar" and match.is_file())


def _expand_url(url: str) -> list[Location]:
    web = url.lower().startswith(("http://", "https://"))
    name = url.partition("?")[0] if web else url
    if name.endswith(".tar") and not re.search(r"[*?\[]", name):
        return [url]
    if web:
        raise ValueError(
            f"{shown(url)}: a web server lists no files, so a URL must end in .tar, got another; "
            "name ranges with braces: shard-{000000..000012}.tar"
        )
    system, path = filesystem(url)
    pattern = path if re.search(r"[*?\[]", path) else f"{path.rstrip('/')}/*.tar"
    found = sorted(str(match) for match in system.glob(pattern))
    return [system.unstrip_protocol(match) for match in found if match.endswith(".tar")]
