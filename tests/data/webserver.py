"""A real HTTP server on the loopback that hands out a folder, well or badly."""

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Server:
    """What a server does, and what it was asked; `fault` is met by the next `faults` GETs."""

    folder: Path
    url: str = ""
    fault: str = ""
    faults: int = 0
    ranges: bool = True
    etags: bool = True
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range)"""

    def gets(self, suffix: str = "") -> int:
        return sum(method == "GET" and path.endswith(suffix) for method, path, _ in self.requests)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    handler = type("Handler", (_Handler,), {"state": server})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.daemon_threads = True
    server.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def do_HEAD(self) -> None:
        self.answer(b"", head=True)

    def do_GET(self) -> None:
        self.answer(None, head=False)

    def answer(self, body: bytes | None, *, head: bool) -> None:
        path = self.path.partition("?")[0]
        wanted = self.headers.get("Range", "")
        self.state.requests.append((self.command, path, wanted))
        if not head and self.state.faults > 0:
            self.state.faults -= 1
            if getattr(self, self.state.fault)():
                return
        file = self.state.folder / path.removeprefix("/moved").lstrip("/")
        if path.startswith("/moved"):
            self.respond(302, b"", [("Location", path.removeprefix("/moved"))], head=head)
        elif not file.is_file():
            self.respond(404, b"", head=head)
        else:
            self.send_file(file.read_bytes(), wanted if self.state.ranges else "", head=head)

    def send_file(self, data: bytes, wanted: str, *, head: bool) -> None:
        extra = [("ETag", f'"{hash(data)}"')] if self.state.etags else []
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        if not match:
            self.respond(200, data, extra, head=head)
            return
        start, end = int(match[1]), min(int(match[2]) + 1, len(data))
        if start >= len(data):
            self.respond(416, b"", head=head)
            return
        extra.append(("Content-Range", f"bytes {start}-{end - 1}/{len(data)}"))
        self.respond(206, data[start:end], extra, head=head)

    def respond(
        self, status: int, body: bytes, extra: Sequence[tuple[str, str]] = (), *, head: bool = False
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in extra:
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def unavailable(self) -> bool:
        self.respond(503, b"busy", [("Retry-After", "0")])
        return True

    def forbidden(self) -> bool:
        self.respond(403, b"no")
        return True

    def stall(self) -> bool:
        time.sleep(1.0)
        self.close_connection = True
        return True

    def trickle(self) -> bool:
        self.send_response(206)
        self.send_header("Content-Length", "100000")
        self.send_header("Content-Range", self.headers["Range"].replace("=", " ") + "/*")
        self.end_headers()
        for _ in range(40):
            self.wfile.write(b"x" * 10)
            self.wfile.flush()
            time.sleep(0.05)
        self.close_connection = True
        return True

    def cut(self) -> bool:
        self.send_response(206 if self.headers.get("Range") else 200)
        self.send_header("Content-Length", "100000")
        self.send_header("Content-Range", self.headers.get("Range", "").replace("=", " ") + "/*")
        self.end_headers()
        self.wfile.write(b"x" * 999)
        self.close_connection = True
        return True

    def cut_whole(self) -> bool:
        """Cut what is asked for without a range."""
        if self.headers.get("Range"):
            self.state.faults += 1
            return False
        return self.cut()

    def hang_up(self) -> bool:
        self.close_connection = True
        return True

    def endless(self) -> bool:
        """More bytes than were asked for, and ever more."""
        self.send_response(206)
        self.send_header("Content-Range", self.headers["Range"].replace("=", " ") + "/*")
        self.end_headers()
        self.close_connection = True
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            return True

    def elsewhere(self) -> bool:
        """The bytes of another range than the one asked for."""
        self.respond(206, b"x" * 100, [("Content-Range", "bytes 7-106/1000")])
        return True

    def log_message(self, *_: object) -> None:
        pass
