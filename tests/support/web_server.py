"""A small web server for one test: files with ranges, and whatever else a server may answer."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True)
class Answer:
    """What to say instead of sending a file."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay: float = 0.0


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    path: str
    """With its query, decoded."""
    headers: Mapping[str, str]
    """By name in small letters."""


@dataclass
class WebServer:
    """Serves the files under ``root``, and counts."""

    root: Path
    ranges: bool = True
    """Whether it knows ranges; without, each answer is a whole file."""
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    """By path: what to answer, one a request, before the file itself."""
    always: dict[str, Answer] = field(default_factory=dict)
    """By path: what to answer to every request."""
    requests: list[Request] = field(default_factory=list)
    sent: int = 0
    """Bytes of all bodies."""
    most_at_once: int = 0
    """Requests that were being answered at the same time."""
    url: str = ""
    """Without a slash at the end."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _busy: int = 0

    def asked(self, ending: str) -> list[Request]:
        """The requests for paths that end so."""
        return [request for request in self.requests if request.path.endswith(ending)]

    @contextmanager
    def answering(self, request: Request) -> Iterator[Answer | None]:
        """Counts a request; yields what was prepared for it."""
        path = urlsplit(request.path).path
        with self._lock:
            self._busy += 1
            self.most_at_once = max(self.most_at_once, self._busy)
            self.requests.append(request)
            queue = self.answers.get(path)
            answer = queue.pop(0) if queue else self.always.get(path)
        try:
            yield answer
        finally:
            with self._lock:
                self._busy -= 1

    def count(self, size: int) -> None:
        """Counts bytes of a body."""
        with self._lock:
            self.sent += size


@contextmanager
def serving(root: Path, *, ranges: bool = True) -> Iterator[WebServer]:
    """Runs a server on this machine, in a thread."""
    served = WebServer(root, ranges=ranges)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": served}))
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def add_repository(
    server: WebServer, repo: str, folder: Path, commit: str = "c0ffee", revision: str | None = None
) -> None:
    """Makes the server a hub that has one repository, whose files lie in ``folder``."""
    target = server.root / repo / "resolve" / commit
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(folder, target_is_directory=True)
    files = [
        {"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    info: dict[str, Any] = {"id": repo, "modelId": repo, "sha": commit, "siblings": files}
    suffix = "" if revision is None else f"/revision/{revision}"
    server.always[f"/api/models/{repo}{suffix}"] = Answer(200, body=json.dumps(info).encode())


class _Server(ThreadingHTTPServer):
    # Five, the default, are too few: a connection more is answered a second later.
    request_queue_size = 64


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    served: WebServer

    def do_GET(self) -> None:
        request = Request(
            unquote(self.path), {key.lower(): value for key, value in self.headers.items()}
        )
        with self.served.answering(request) as answer:
            try:
                self._answer(urlsplit(request.path).path, answer)
            except ConnectionError:  # the client has seen enough
                self.close_connection = True

    def _answer(self, path: str, answer: Answer | None) -> None:
        if answer is not None:
            time.sleep(answer.delay)
            self._start(answer.status, len(answer.body), answer.headers)
            self._send(answer.body)
            return
        file = self.served.root / path.lstrip("/")
        if file.is_file():
            self._send_file(file)
        else:
            self._start(404, 0, {})

    def _send_file(self, file: Path) -> None:
        size = file.stat().st_size
        asked = _RANGE.fullmatch(self.headers.get("Range", "")) if self.served.ranges else None
        first, stop = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (0, size)
        if asked and first >= size:
            self._start(416, 0, {"Content-Range": f"bytes */{size}"})
            return
        extra = {"Content-Range": f"bytes {first}-{stop - 1}/{size}"} if asked else {}
        self._start(206 if asked else 200, stop - first, extra)
        with file.open("rb") as data:
            data.seek(first)
            while first < stop:
                first += self._send(data.read(min(_CHUNK_BYTES, stop - first)))

    def _start(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def _send(self, data: bytes) -> int:
        self.wfile.write(data)
        self.served.count(len(data))
        return len(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests look at ``requests``."""
