"""Ranges of bytes from web servers, whatever these answer: never more is read than was asked for.

Each request has a time limit and is tried once more if the server is busy or silent.
"""

from __future__ import annotations

import atexit
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx2
from huggingface_hub import constants

from nybble.core.errors import CheckpointError
from nybble.doctor.source import Unreachable

MAX_SKIPPED_BYTES = 64 * 2**20
"""What is read and thrown away, to get at a range, from a server that knows no ranges."""
_CHUNK_BYTES = 64 * 1024
_PAUSE = 0.5
_MAX_PAUSE = 20.0
_PATIENCE = 10
"""A whole answer may take so many times what its first byte may."""
_RANGE = re.compile(r"bytes (?P<start>\d{1,18})-\d{1,18}/(?P<total>\d{1,18}|\*)", re.ASCII)
_NO_RANGE = re.compile(r"bytes \*/(?P<total>\d{1,18})", re.ASCII)
_LENGTH = re.compile(r"\d{1,18}", re.ASCII)
_NOT_FOUND = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)

T = TypeVar("T")


class Denied(Unreachable):
    """The server knows the user too little."""


class Busy(Unreachable):
    """The server did not answer, or asks to come again in ``pause`` seconds."""

    def __init__(self, message: str, pause: float = _PAUSE) -> None:
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True)
class Part:
    """A range of a file."""

    data: bytes
    """Fewer bytes than asked for only where the file ends."""
    total: int | None
    """Bytes of the whole file, if the server says."""


def get_range(
    client: httpx2.Client, url: str, headers: Mapping[str, str], start: int, stop: int
) -> Part | None:
    """Bytes ``start`` to ``stop`` of what ``url`` leads to; None if nothing is there.

    Raises Denied if the server wants to know who asks, CheckpointError for bytes deep in a file
    of a server without ranges, Unreachable for everything else that fails.
    """
    if stop <= start:
        return Part(b"", None)
    return retried(lambda: _get(client, url, headers, start, stop))


def retried(attempt: Callable[[], T]) -> T:
    """What ``attempt`` returns, at the second time if it is Busy at the first."""
    try:
        return attempt()
    except Busy as busy:
        time.sleep(busy.pause)
        return attempt()


@cache
def plain_client() -> httpx2.Client:
    """A client that knows no token, for any server."""
    client = httpx2.Client(follow_redirects=True)
    atexit.register(client.close)
    return client


def refusal(status: int, where: str, pause: float = _PAUSE) -> Unreachable:
    """What a status means that is no success."""
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return Denied(f"{where}: no access (HTTP {status})")
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Busy(f"{where}: the server fails (HTTP {status}); try again later", pause)
    return Unreachable(f"{where}: HTTP {status}")


def without_secrets(url: str) -> str:
    """An address for a message: no password, no signature."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def first_line(error: Exception) -> str:
    """What an error of another package says, on one short line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _get(
    client: httpx2.Client, url: str, headers: Mapping[str, str], start: int, stop: int
) -> Part | None:
    # Compressed ranges are ranges of something else.
    asked = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    where = without_secrets(url)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        with client.stream("GET", url, headers=asked, timeout=timeout) as response:
            return _part(response, where, start, stop)
    except httpx2.TimeoutException as error:
        raise Busy(f"{where}: no answer within {timeout} seconds") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise Busy(f"{where}: cannot be reached ({first_line(error)})") from error


def _part(response: httpx2.Response, where: str, start: int, stop: int) -> Part | None:
    status = response.status_code
    if status in _NOT_FOUND:
        return None
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        found = _NO_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        return Part(b"", int(found["total"]) if found else None)
    if status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        raise refusal(status, where, _pause(response))
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise Unreachable(f"{where}: the server compresses what it was asked not to")
    first, total = _placed(response, where)
    if not start - MAX_SKIPPED_BYTES <= first <= start:
        raise CheckpointError(
            f"{where}: the server does not serve ranges, so byte {start} is out of reach; "
            "download the checkpoint"
        )
    data = _read(response, where, start - first, stop - first)
    if total is not None and len(data) < min(stop, total) - start:
        raise Busy(f"{where}: the answer ends early")
    return Part(data, total)


def _placed(response: httpx2.Response, where: str) -> tuple[int, int | None]:
    """Where in the file the answer begins, and how long the file is."""
    if response.status_code == HTTPStatus.OK:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if _LENGTH.fullmatch(length) else None
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if found is None:
        raise Unreachable(f"{where}: the server does not say which range it sends")
    return int(found["start"]), None if found["total"] == "*" else int(found["total"])


def _read(response: httpx2.Response, where: str, start: int, stop: int) -> bytes:
    """Bytes of an answer; what follows them is left with the server."""
    deadline = time.monotonic() + _PATIENCE * constants.HF_HUB_DOWNLOAD_TIMEOUT
    data = bytearray()
    at = 0
    for chunk in response.iter_raw(_CHUNK_BYTES):
        data += chunk[max(start - at, 0) : max(stop - at, 0)]
        at += len(chunk)
        if at >= stop:
            break
        if time.monotonic() > deadline:
            raise Unreachable(f"{where}: the server is too slow")
    return bytes(data)


def _pause(response: httpx2.Response) -> float:
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), _MAX_PAUSE) if _LENGTH.fullmatch(asked) else _PAUSE
