"""Data sets of the Hugging Face hub, each at one commit: a few by a short name, all by address."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from types import MappingProxyType
from typing import Any

from nybble.core.errors import DataError
from nybble.data.documents import (
    CONTENT_FIELDS,
    TOOLS_FIELD,
    Document,
    PlainText,
    document_of,
    first_line,
    missing_extra,
    without_nulls,
)

PROBE_SECONDS = 5.0
"""How long the hub may take to answer, before it is taken to be out of reach."""
HUB_PREFIX = "hf:"
_OTHER_WAYS = "give a .txt, .jsonl or .parquet file, or 'stdlib'"
_ADDRESS = re.compile(
    rf"{HUB_PREFIX}(?P<path>[\w.-]+/[\w.-]+)(?:/(?P<config>[^/@:]+))?"
    r"@(?P<revision>[0-9a-f]{40}):(?P<split>\w+(?:\.\w+)*)"
)


@dataclass(frozen=True)
class HubSet:
    """One split of one data set, at one commit."""

    path: str
    split: str
    revision: str
    """Commit of the data set's repository."""
    config: str = "default"
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


def hub_set_of(source: str) -> HubSet:
    """Reads ``hf:OWNER/NAME@COMMIT:SPLIT`` or ``hf:OWNER/NAME/CONFIG@COMMIT:SPLIT``.

    COMMIT is the full hash of a commit of the data set's repository (40 hexadecimal digits), so
    that the text stays the same. CONFIG (a subset, on the data set's page) is ``default`` unless
    it is given.

    Raises DataError for any other form.
    """
    found = _ADDRESS.fullmatch(source)
    if found is None:
        raise DataError(
            f"{source!r} is not {HUB_PREFIX}OWNER/NAME@COMMIT:SPLIT or "
            f"{HUB_PREFIX}OWNER/NAME/CONFIG@COMMIT:SPLIT, with all 40 digits of a commit of the "
            "data set (a branch or a tag may move)"
        )
    return HubSet(
        path=found["path"],
        split=found["split"],
        revision=found["revision"],
        config=found["config"] or HubSet.config,
    )


def hub_documents(name: str, hub_set: HubSet) -> Iterator[Document]:
    """The documents of a data set, downloaded once and then read from the cache, row by row.

    A copy of its very commit in the cache is taken without asking the hub; no other commit is.
    ``name`` is for error messages.

    Raises DataError if the data set is out of reach, or if it is not of the expected form.
    """
    data_set = _load(name, hub_set)
    wanted = [field for field in (*CONTENT_FIELDS, TOOLS_FIELD) if field in data_set.column_names]
    if not set(wanted).intersection(CONTENT_FIELDS):
        raise DataError(
            f"{name}: no column {' or '.join(CONTENT_FIELDS)}; "
            f"the columns are {', '.join(map(repr, data_set.column_names)) or 'none'}"
        )
    records = data_set.select_columns(wanted)
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
    try:
        builder = _cached_builder(hub_set)
        if builder is None and _is_reachable(hub_set):
            builder = _downloaded_builder(hub_set)
        if builder is not None:
            return builder.as_dataset(split=hub_set.split)
    except (
        OSError,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        httpx.HTTPError,
    ) as error:
        reason = shorten(f"{type(error).__name__}: {first_line(error)}", 160, placeholder=" ...")
        raise DataError(
            f"{name}: cannot load split {hub_set.split} of {hub_set.path} ({hub_set.config}) at "
            f"{hub_set.revision} ({reason}): check these, or {_OTHER_WAYS}"
        ) from error
    raise DataError(
        f"{name}: {hub_set.path} at {hub_set.revision} is not in the local cache, and the Hugging "
        f"Face hub does not answer: connect once to fill the cache, or {_OTHER_WAYS}"
    )


def _cached_builder(hub_set: HubSet) -> Any:
    """The builder of a finished copy of the commit in the local cache, or None.

    ``load_dataset`` alone would ask the hub first, for minutes where packets are dropped, and
    then take the newest copy, of whatever commit.
    """
    from datasets import config
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    owner, name = hub_set.path.split("/")
    cache = Path(config.HF_DATASETS_CACHE).expanduser()
    folder = cache / f"{owner}___{camelcase_to_snakecase(name)}" / hub_set.config
    copies = sorted(folder.glob(f"*/{hub_set.revision}/dataset_info.json"))
    if not copies:
        return None
    return Cache(
        repo_id=hub_set.path,
        dataset_name=name,
        config_name=hub_set.config,
        version=copies[-1].parts[-3],
        hash=hub_set.revision,
    )


def _downloaded_builder(hub_set: HubSet) -> Any:
    """The builder of the data set, downloaded. Raises OSError where its commit is not to be had."""
    from datasets import load_dataset_builder

    builder = load_dataset_builder(hub_set.path, hub_set.config, revision=hub_set.revision)
    if builder.hash != hub_set.revision:  # it takes another copy where the hub fails midway
        raise OSError(f"only {builder.hash} is to be had")
    builder.download_and_prepare()
    return builder


def _is_reachable(hub_set: HubSet) -> bool:
    """Whether the hub answers one request, sent with the client, and so the proxies, of the hub.

    Without this question a download is tried again for half a minute, or for minutes where
    packets are dropped, before it is given up.
    """
    from datasets import config
    from datasets.utils.file_utils import get_session, httpx

    if config.HF_HUB_OFFLINE:
        return False
    url = f"{config.HF_ENDPOINT}/datasets/{hub_set.path}/resolve/{hub_set.revision}/README.md"
    try:
        return bool(get_session().head(url, timeout=PROBE_SECONDS).status_code < 500)
    except (OSError, httpx.HTTPError):
        return False
