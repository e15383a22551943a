"""The data sets of the Hugging Face hub that have a short name here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from textwrap import shorten
from types import MappingProxyType
from typing import Any

from nybble.core.errors import DataError
from nybble.data.documents import (
    Document,
    PlainText,
    document_of,
    first_line,
    missing_extra,
    without_nulls,
)

PROBE_SECONDS = 5.0
"""How long the hub may take to answer, before only the local cache is looked at."""


@dataclass(frozen=True)
class HubSet:
    """One split of one data set, at one commit."""

    path: str
    split: str
    revision: str
    """Commit of the data set's repository."""
    config: str | None = None
    is_one_document: bool = False
    """The rows are the lines of one running text: join them with a blank line between."""


_WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"

HUB_SETS: Mapping[str, HubSet] = MappingProxyType(
    {
        "pile-10k": HubSet(
            path="NeelNanda/pile-10k",
            split="train",
            revision="127bfedcd5047750df5ccf3a12979a47bfa0bafa",
        ),
        "ultrachat_200k": HubSet(
            path="HuggingFaceH4/ultrachat_200k",
            split="train_sft",
            revision="8049631c405ae6576f93f445c6b8166f76f5505a",
        ),
        "wikitext-2-raw": HubSet(
            path="Salesforce/wikitext",
            config="wikitext-2-raw-v1",
            split="train",
            revision=_WIKITEXT_REVISION,
            is_one_document=True,
        ),
        "wikitext-2-raw-test": HubSet(
            path="Salesforce/wikitext",
            config="wikitext-2-raw-v1",
            split="test",
            revision=_WIKITEXT_REVISION,
            is_one_document=True,
        ),
    }
)


def hub_documents(name: str) -> Iterator[Document]:
    """The documents of ``HUB_SETS[name]``, downloaded once and then read from the cache.

    Where the hub does not answer, the newest copy in the cache is taken, whatever its commit.
    Raises DataError if there is none, or if the data set is not of the expected form.
    """
    hub_set = HUB_SETS[name]
    records = _load(name, hub_set)
    if hub_set.is_one_document:
        yield PlainText(name, "\n\n".join(record["text"] for record in records))
        return
    for number, record in enumerate(records, start=1):
        yield document_of(without_nulls(record), f"{name}: row {number}")


def _load(name: str, hub_set: HubSet) -> Any:
    try:
        import datasets
        from datasets.utils.file_utils import httpx
    except ImportError as error:
        raise missing_extra(name) from error
    mode: AbstractContextManager[None] = nullcontext() if _is_reachable(hub_set) else _cache_only()
    try:
        with mode:
            return datasets.load_dataset(
                hub_set.path, hub_set.config, split=hub_set.split, revision=hub_set.revision
            )
    except (
        OSError,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        httpx.HTTPError,
    ) as error:
        reason = shorten(f"{type(error).__name__}: {first_line(error)}", 160, placeholder=" ...")
        raise DataError(
            f"{name}: {hub_set.path} is not to be had from the Hugging Face hub or the local "
            f"cache ({reason}): connect once to fill the cache, or give a .txt, .jsonl or "
            ".parquet file, or 'stdlib'"
        ) from error


def _is_reachable(hub_set: HubSet) -> bool:
    """Whether the hub answers one request, sent with the client, and so the proxies, of the hub.

    Without this question ``load_dataset`` retries for half a minute, or for minutes where
    packets are dropped, before it looks into the cache.
    """
    from datasets import config
    from datasets.utils.file_utils import get_session, httpx

    url = f"{config.HF_ENDPOINT}/datasets/{hub_set.path}/resolve/{hub_set.revision}/README.md"
    try:
        return bool(get_session().head(url, timeout=PROBE_SECONDS).status_code < 500)
    except (OSError, httpx.HTTPError):
        return False


@contextmanager
def _cache_only() -> Iterator[None]:
    """Turns the offline mode of ``datasets`` on, which is otherwise read once, at its import."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
