"""Files that form one record by their common stem: `a.jpg` + `a.txt`, in folders and in tars."""

from collections.abc import Iterable
from typing import Any

from triptych_data.sample import load_json
from triptych_data.sources.source import Row

MEDIA = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"), "image"),
    **dict.fromkeys(("mp4", "m4v", "mov", "webm", "mkv", "avi"), "video"),
    **dict.fromkeys(("wav", "flac", "mp3", "ogg", "opus", "m4a", "aac"), "audio"),
}
"""What a suffix promises; the content decides what a member is called, or that it is refused."""
TEXT = ("txt", "text", "caption", "cls")


def split_name(name: str) -> tuple[str, str] | None:
    """Key and suffixes of a member's name, parted at the first dot after the folder.

    So does webdataset; None for what is no part of a sample: `.DS_Store`, `README`.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, suffixes = file.partition(".")
    return (folder + slash + stem, suffixes.lower()) if stem and dot else None


def to_row(members: Iterable[tuple[str, Any, bytes | None]], where: str) -> Row:
    """One row of (suffixes, medium, content): the JSON's keys, `text`, and the media in order.

    `content` is the bytes of text and JSON members, `medium` what the row shall hold of media.
    Media, and texts with several suffixes (`a.prompt.txt`), are also columns under these. Members
    of other kinds are left out: nothing is unpickled. Raises ValueError.
    """
    row: Row = {}
    own: Row = {}
    for suffixes, medium, content in members:
        suffix = suffixes.rpartition(".")[2]
        if suffix in MEDIA:
            row.setdefault(MEDIA[suffix], []).append(medium)
            own[suffixes] = medium
        elif suffix == "json" and content is not None:
            value = load_json(content, f"{where}: member {suffixes}")
            if not isinstance(value, dict):
                raise ValueError(
                    f"{where}: member {suffixes} must be a JSON object, got {repr(value)[:80]}; "
                    "write its values under names"
                )
            own |= value
        elif suffix in TEXT and content is not None:
            text = _text(content, where)
            if suffixes in TEXT:
                row["text"] = text
            else:
                own[suffixes] = text
    return own | row


def holds_text(suffixes: str) -> bool:
    """Whether the content of a member with these suffixes goes into the row itself."""
    return suffixes.rpartition(".")[2] in (*TEXT, "json")


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: text must be UTF-8, got {error}; convert it") from error
