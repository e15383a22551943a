"""Checkpoints on a web server or the Hugging Face hub, read by ranges: no weight is downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import httpx2
from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # has no __all__

from nybble.checkpoint.index import CONFIG_NAME, INDEX_NAME
from nybble.checkpoint.ondisk import shown
from nybble.core.errors import CheckpointError
from nybble.doctor.ranges import (
    Busy,
    Denied,
    first_line,
    get_range,
    plain_client,
    refusal,
    retried,
    without_secrets,
)
from nybble.doctor.reading import LONE_NAME
from nybble.doctor.snapshot import MAX_JSON_BYTES, OBJECT_NAMES, parsed, weight_map_of
from nybble.doctor.source import Source, Unreachable, is_plain_name

_HUB = "https://huggingface.co"
_REPOSITORY = re.compile(
    r"(?P<repo>(?:[\w.-]+/)?[\w.-]+)"
    r"(?:/tree/(?P<revision>refs/[\w.-]+/[\w.-]+|[^/?#]+))?/?(?:[?#].*)?",
    re.ASCII,
)
_EXTRA_WEIGHTS = ("mtp.safetensors", "model_mtp.safetensors", "model_extra_tensors.safetensors")
_OTHER_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "pytorch_model.bin",
)
_KNOWN_NAMES = (CONFIG_NAME, *OBJECT_NAMES, LONE_NAME, *_EXTRA_WEIGHTS, *_OTHER_NAMES)
"""Files to ask a plain server for, besides those of the index."""
_MAX_LISTED_FILES = 2000
_LOGIN = "log in with 'hf auth login', or set HF_TOKEN"


@dataclass(frozen=True)
class WebSource:
    """Files under one address."""

    label: str
    address: str
    """Without a slash at the end; may have a query, which then is every file's."""
    client: httpx2.Client
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    listing: Mapping[str, int] = field(default_factory=dict, repr=False)
    way_in: str = ""
    """What to do if the server denies access."""
    parallel: ClassVar[int] = 8

    def sizes(self) -> Mapping[str, int]:
        """As listed when the source was opened."""
        return self.listing

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes of a listed file. Raises CheckpointError, Unreachable if the server is at fault."""
        if name not in self.listing:
            raise CheckpointError(f"{shown(name)} is no file of {self.label}")
        size = self.listing[name]
        stop = size if stop is None else min(stop, size)
        try:
            part = get_range(self.client, self.url_of(name), self.headers, start, stop)
        except Denied as denied:
            raise Denied(f"{denied}{self.way_in}") from denied
        if part is None:
            raise CheckpointError(f"{name}: not found at {self.label}, though listed")
        return part.data

    def url_of(self, name: str) -> str:
        """Where a file is."""
        parts = urlsplit(self.address)
        return urlunsplit(parts._replace(path=f"{parts.path}/{quote(name)}"))


def open_address(address: str, revision: str | None = None) -> Source:
    """A repository of the hub, or a folder of any other web server, by its address.

    Raises CheckpointError if the address is none, the hub's is of no model repository, or a
    ``revision`` is given for a plain server's; Unreachable if the server cannot be read.
    """
    for endpoint in dict.fromkeys((constants.ENDPOINT, _HUB)):
        if address.startswith(f"{endpoint}/"):
            return _open_hub_page(address, address.removeprefix(f"{endpoint}/"), endpoint, revision)
    folder = _folder_of(address)
    label = without_secrets(folder)
    if revision is not None:
        raise CheckpointError(f"{label} has no revision {revision!r}")
    return _with_listing(WebSource(label, folder, plain_client()))


def open_repository(
    repo: str, revision: str | None = None, endpoint: str | None = None
) -> WebSource:
    """A model repository of the hub, at the commit that ``revision`` is now.

    ``endpoint`` is the hub's address, that of the environment (HF_ENDPOINT) unless given. Raises
    Unreachable if the hub, the repository or the revision is out of reach.
    """
    endpoint = endpoint or constants.ENDPOINT
    label = repo if revision is None else f"{repo}@{revision}"
    info = retried(lambda: _model_info(repo, revision, endpoint, label))
    commit = quote(info.sha or revision or "main", safe="")
    listing = {
        file.rfilename: file.size
        for file in info.siblings or ()
        if is_plain_name(file.rfilename) and isinstance(file.size, int)
    }
    address = f"{endpoint}/{repo}/resolve/{commit}"
    way_in = f"; accept the terms at {endpoint}/{repo}, if it has any, and {_LOGIN}"
    return WebSource(label, address, get_session(), build_hf_headers(), listing, way_in)


def _folder_of(address: str) -> str:
    try:
        parts = urlsplit(address)
        if not parts.hostname or parts.port == 0:
            raise ValueError("it names no server")
    except ValueError as error:
        raise CheckpointError(f"{shown(address)} is no web address: {error}") from error
    return urlunsplit(parts._replace(path=parts.path.rstrip("/"), fragment=""))


def _open_hub_page(address: str, page: str, endpoint: str, revision: str | None) -> WebSource:
    found = _REPOSITORY.fullmatch(page)
    if found is None:
        raise CheckpointError(
            f"{shown(address)} is not the address of a model repository: give "
            f"{endpoint}/OWNER/NAME or {endpoint}/OWNER/NAME/tree/REVISION"
        )
    named = found["revision"] and unquote(found["revision"])
    if named and revision is not None:
        raise CheckpointError(f"{address} names a revision already: {revision!r} is one too many")
    return open_repository(found["repo"], named or revision, endpoint)


def _model_info(repo: str, revision: str | None, endpoint: str, label: str) -> ModelInfo:
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        return HfApi(endpoint=endpoint).model_info(
            repo, revision=revision, files_metadata=True, timeout=timeout
        )
    except GatedRepoError as error:
        page = f"{endpoint}/{repo}"
        raise Denied(f"{label} is gated: accept its terms at {page}, then {_LOGIN}") from error
    except RevisionNotFoundError as error:
        raise Unreachable(f"{repo} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise Unreachable(
            f"{label} is neither a folder here nor a repository at {endpoint} that you may see: "
            f"check the name; if it is private, {_LOGIN}"
        ) from error
    except OfflineModeIsEnabled as error:
        raise Unreachable(
            f"{label} is no folder here, and HF_HUB_OFFLINE forbids the hub"
        ) from error
    except HfHubHTTPError as error:
        raise refusal(error.response.status_code, endpoint) from error
    except (httpx2.HTTPError, OSError) as error:
        raise Busy(f"{endpoint} cannot be reached ({first_line(error)})") from error
    except (ValueError, KeyError, TypeError) as error:
        # A name that the hub's own rules forbid, or an answer that is none of the hub's.
        raise Unreachable(f"{label}: {endpoint} is of no use ({first_line(error)})") from error


def _with_listing(source: WebSource) -> WebSource:
    """The same with the sizes of what a plain server, which lists nothing, has of a checkpoint."""
    sizes, denied = _found(source, _KNOWN_NAMES)
    if not sizes and denied is not None:
        raise denied
    known = WebSource(source.label, source.address, source.client, listing=sizes)
    others = [name for name in _listed_files(known) if name not in sizes]
    if len(others) > _MAX_LISTED_FILES:
        raise Unreachable(
            f"{source.label}: the index names {len(others)} files, too many to ask for"
        )
    more, _ = _found(source, others)
    return WebSource(source.label, source.address, source.client, listing=sizes | more)


def _listed_files(source: WebSource) -> list[str]:
    """The files that the index names, as far as they have a plain name."""
    size = source.listing.get(INDEX_NAME, 0)
    if not 0 < size <= MAX_JSON_BYTES:
        return []
    try:
        weight_map = weight_map_of(parsed(source.read(INDEX_NAME), INDEX_NAME))
    except Unreachable:
        raise
    except CheckpointError:  # whoever reads the files will say so
        return []
    return sorted(filter(is_plain_name, set((weight_map or {}).values())))


def _found(source: WebSource, names: Iterable[str]) -> tuple[dict[str, int], Denied | None]:
    """Sizes of those files that are there, and the answer to one that may not be seen.

    A range of one byte is asked for: unlike HEAD, every server answers that, and signed addresses
    stay valid.
    """

    def size_of(name: str) -> int | Denied | None:
        try:
            part = get_range(source.client, source.url_of(name), source.headers, 0, 1)
        except Denied as denied:  # what some stores answer for what is not there
            return denied
        if part is not None and part.total is None:
            raise Unreachable(f"{source.label}: the server does not say how long {name} is")
        return None if part is None else part.total

    names = list(names)
    with ThreadPoolExecutor(source.parallel) as pool:
        answers = dict(zip(names, pool.map(size_of, names), strict=True))
    sizes = {name: answer for name, answer in answers.items() if isinstance(answer, int)}
    denied = (answer for answer in answers.values() if isinstance(answer, Denied))
    return sizes, next(denied, None)
