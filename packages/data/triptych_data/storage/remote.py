"""Ranges of remote files: http(s) by urllib3, every other scheme by fsspec; retried, timed out."""

import functools
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.request import getproxies, proxy_bypass

from triptych_data.storage.secrets import masked

T = TypeVar("T")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PIECE = 1 << 18
"""Most bytes taken from a connection at once; after each, the clock is looked at."""
SLOWEST = 100_000
"""Bytes a second that a transfer must reach over all: less is a connection that hangs."""
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
"""HTTP statuses after which the same request may well succeed."""


@dataclass(frozen=True, slots=True)
class Patience:
    """`attempts` requests at most, waiting `backoff`, then twice that, … seconds between them.

    `timeout` is in seconds: for a connection, for any pause in a transfer, and, with SLOWEST, for
    the whole of it.
    """

    attempts: int = 5
    timeout: float = 30.0
    backoff: float = 0.5
    longest_wait: float = 30.0


class Stat(NamedTuple):
    """`version` changes when the content does; "" where the server does not say."""

    size: int | None
    version: str


class Remote(Protocol):
    """A remote file: every method is one attempt, and raises `Transient` for what may pass."""

    @property
    def shown(self) -> str:
        """The URL without what may be secret in it, for messages."""

    def stat(self, patience: Patience) -> Stat: ...

    def range(self, start: int, end: int | None, patience: Patience) -> bytes: ...

    def pieces(self, patience: Patience) -> Iterator[bytes]: ...


class Transient(Exception):
    """An attempt failed in a way that the next may not; `wait` is what the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class IgnoresRange(Exception):
    """The server answers a request for a range with the whole file."""


def is_url(path: object) -> bool:
    """Whether a path is a URL that is read remotely. Raises ValueError for `pipe:`."""
    text = str(path)
    if text.startswith("pipe:"):
        raise ValueError(
            f"{text[:80]}: must be a file or an object's URL, got a command, which is never run; "
            "download what it prints, or name its URL"
        )
    if "::" in text and URL.search(text):
        raise ValueError(
            f"{shown(text)}: must be one URL, got a chain of them; name the file itself"
        )
    return isinstance(path, str) and bool(URL.match(text)) and not text.startswith("file://")


def shown(location: Path | str) -> str:
    """A path, or a URL as messages show it: without password and query, which may hold secrets."""
    if isinstance(location, Path) or "://" not in location:
        return str(location)
    return re.sub(r"(://)[^/]*@", r"\1", location).partition("?")[0]


@functools.lru_cache(maxsize=4096)
def open_remote(url: str) -> Remote:
    """What reads `url`; nothing is asked of the server yet."""
    if url.lower().startswith(("http://", "https://")):
        return _Http(url, shown(url))
    return _Fsspec(url, shown(url))


def fetch(remote: Remote, start: int, end: int | None, patience: Patience) -> bytes:
    """The bytes from `start` to `end`, or to the end of the file; retried.

    Raises ValueError when the file is not there, refused or shorter, ConnectionError when no
    attempt succeeds, IgnoresRange.
    """

    return _retried(remote, lambda: remote.range(start, end, patience), patience)


def fetch_blocks(remote: Remote, size: int, patience: Patience) -> Iterator[bytes]:
    """The whole file in blocks of `size` bytes; a transfer that breaks off is begun again."""
    done = 0
    for attempt in range(patience.attempts):
        try:
            skip = done
            for block in _blocks(remote.pieces(patience), size):
                if skip:
                    skip -= 1
                    continue
                yield block
                done += 1
            return
        except Transient as error:
            _wait_or_raise(remote, attempt, error, patience)


def retried_stat(remote: Remote, patience: Patience) -> Stat:
    return _retried(remote, lambda: remote.stat(patience), patience)


def _retried(remote: Remote, attempt: Callable[[], T], patience: Patience) -> T:
    for number in range(patience.attempts):
        try:
            return attempt()
        except Transient as error:
            _wait_or_raise(remote, number, error, patience)
    raise AssertionError("the last attempt returns or raises")


def _wait_or_raise(remote: Remote, number: int, error: Transient, patience: Patience) -> None:
    """Sleep before the next attempt; the random part keeps workers from coming back at once."""
    if number + 1 >= patience.attempts:
        raise ConnectionError(
            f"{remote.shown}: the server must answer, got {error} at the last of "
            f"{patience.attempts} attempts; check the network, or copy the shards to a local disk"
        ) from error
    wait = max(error.wait, patience.backoff * 2**number * random.uniform(0.5, 1.0))
    time.sleep(min(wait, patience.longest_wait))


def _blocks(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


@dataclass(frozen=True, slots=True)
class _Http:
    url: str
    shown: str

    def stat(self, patience: Patience) -> Stat:
        response = self._request("HEAD", {}, patience.timeout)
        response.drain_conn()
        if response.status in (403, 405, 501):  # signed URLs and small servers know GET alone
            return Stat(None, "")
        self._check(response)
        size = response.headers.get("Content-Length")
        version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        return Stat(int(size) if size is not None and size.isdigit() else None, version)

    def range(self, start: int, end: int | None, patience: Patience) -> bytes:
        headers = {} if end is None else {"Range": f"bytes={start}-{end - 1}"}
        response = self._request("GET", headers, patience.timeout)
        try:
            self._check(response)
            if end is not None and response.status != 206:
                raise IgnoresRange
            if end is not None and not _answers(response.headers.get("Content-Range"), start):
                got = response.headers.get("Content-Range")
                raise Transient(f"Content-Range {got!r} for bytes {start} to {end}")
            pieces = _timed(self._body(response), patience.timeout)
            data = _joined(pieces, None if end is None else end - start)
        except BaseException:
            response.close()  # the rest of the body must not be taken for the next answer
            raise
        response.release_conn()
        if end is not None and len(data) != end - start:
            raise ValueError(
                f"{self.shown}: must have the {end} bytes of its index, got {start + len(data)}; "
                "the shard is damaged or was replaced: restore it"
            )
        return data

    def pieces(self, patience: Patience) -> Iterator[bytes]:
        response = self._request("GET", {}, patience.timeout)
        try:
            self._check(response)
            yield from _timed(self._body(response), patience.timeout)
        finally:
            response.close()

    def _request(self, method: str, headers: dict[str, str], timeout: float) -> Any:
        from urllib3.exceptions import HTTPError, LocationValueError

        headers = {"Accept-Encoding": "identity", "User-Agent": "triptych-data", **headers}
        try:
            return _pool(os.getpid(), _proxy(self.url)).request(
                method, self.url, headers=headers, preload_content=False, timeout=timeout
            )
        except LocationValueError as error:
            raise ValueError(f"{self.shown}: must be a URL, got {error}; fix it") from error
        except HTTPError as error:
            raise Transient(_reason(error)) from error

    def _check(self, response: Any) -> None:
        status = response.status
        if status in TRANSIENT:
            asked = response.headers.get("Retry-After", "")
            raise Transient(f"HTTP status {status}", float(asked) if asked.isdigit() else 0.0)
        if status == 404:
            raise FileNotFoundError(2, "HTTP status 404", self.shown)
        if status == 416:
            raise ValueError(
                f"{self.shown}: must be as long as its index says, got HTTP status 416; the shard "
                "is damaged or was replaced: restore it"
            )
        if status not in (200, 206):
            raise ValueError(
                f"{self.shown}: the server must hand out the file, got HTTP status {status}; check "
                "the URL and who may read it"
            )

    def _body(self, response: Any) -> Iterator[bytes]:
        from urllib3.exceptions import HTTPError

        try:
            while piece := response.read1(PIECE, decode_content=False):
                yield piece
        except HTTPError as error:  # the body is cut off, stalls, or the connection breaks
            raise Transient(_reason(error)) from error


@dataclass(frozen=True, slots=True)
class _Fsspec:
    url: str
    shown: str

    def stat(self, patience: Patience) -> Stat:
        info = self._call(lambda fs, path: fs.info(path), patience.timeout)
        names = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified")
        version = next((str(info[name]) for name in (*names, "created") if info.get(name)), "")
        return Stat(info.get("size"), version)

    def range(self, start: int, end: int | None, patience: Patience) -> bytes:
        seconds = patience.timeout + (end - start if end else 0) / SLOWEST
        data = self._call(lambda fs, path: fs.cat_file(path, start=start, end=end), seconds)
        if end is not None and len(data) != end - start:
            raise Transient(f"{len(data)} of {end - start} bytes")
        return bytes(data)

    def pieces(self, patience: Patience) -> Iterator[bytes]:
        raise AssertionError("fsspec reads ranges")

    def _call(self, function: Callable[[Any, str], T], timeout: float) -> T:
        """One call in a thread that is left behind when it does not return in time."""
        answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                answers.put((function(*filesystem(self.url)), None))
            except BaseException as error:
                answers.put((None, error))

        threading.Thread(target=work, daemon=True).start()
        try:
            answer, error = answers.get(timeout=timeout)
        except queue.Empty:
            raise Transient(f"no answer in {timeout:.0f} s") from None
        if error is None:
            return answer  # type: ignore[return-value]
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(2, "no such object", self.shown) from error
        if isinstance(error, PermissionError):
            raise ValueError(
                f"{self.shown}: the object must be readable, got {masked(str(error))}; check the "
                "credentials"
            ) from error
        if isinstance(error, ValueError):
            raise ValueError(masked(str(error))) from error
        raise Transient(_reason(error)) from error


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Raises ValueError for what it lacks."""
    import fsspec  # type: ignore[import-untyped]

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(
            f"{shown(url)}: a scheme needs its fsspec package, got {masked(str(error))}; install "
            "it: s3fs for s3://, gcsfs for gs://, adlfs for az://"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{shown(url)}: must be a URL of http, https or a scheme that fsspec knows, got "
            f"{masked(str(error))}; fix it"
        ) from error


@functools.lru_cache(maxsize=4)
def _pool(_process: int, proxy: str | None) -> Any:
    """urllib3's connections, kept alive; never shared with a forked child, hence the process."""
    import urllib3

    # Redirects are followed here, all else is retried by `_retried`, which looks at the clock.
    retries = urllib3.Retry(total=None, connect=0, read=0, other=0, status=0, redirect=5)
    options: dict[str, Any] = {"num_pools": 16, "maxsize": 16, "retries": retries}
    return urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL."""
    scheme, _, rest = url.partition("://")
    host = rest.partition("/")[0].rpartition("@")[2]
    return None if proxy_bypass(host) else getproxies().get(scheme.lower())


def _answers(content_range: str | None, start: int) -> bool:
    """Whether a Content-Range header says that the body begins at `start`."""
    match = re.match(r"bytes (\d+)-", content_range or "")
    return match is not None and int(match[1]) == start


def _timed(pieces: Iterator[bytes], timeout: float) -> Iterator[bytes]:
    """The pieces, unless they trickle: a pause is noticed by the socket, not one byte a second."""
    start, size = time.monotonic(), 0
    for piece in pieces:
        yield piece
        size += len(piece)
        if time.monotonic() > start + timeout + size / SLOWEST:
            raise Transient(f"{size} bytes in {time.monotonic() - start:.0f} s")


def _joined(pieces: Iterator[bytes], wanted: int | None) -> bytes:
    """The pieces as one, no more of them than go beyond `wanted` bytes: a body may never end."""
    data = bytearray()
    for piece in pieces:
        data += piece
        if wanted is not None and len(data) > wanted:
            raise Transient(f"more than the {wanted} bytes that were asked for")
    return bytes(data)


def _reason(error: BaseException) -> str:
    """One line, no secrets; urllib3 wraps what happened in objects whose repr has addresses."""
    inner = getattr(error, "reason", None) or error
    told = masked(re.sub(r"<[^>]*>: ?", "", str(inner)))
    return f"{type(inner).__name__} ({told[:200]})"
