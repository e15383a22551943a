"""Where text comes from: a local file, a named data set, or the Python standard library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from nybble.core.errors import DataError
from nybble.data import stdlib
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
from nybble.data.hub import HUB_PREFIX, HUB_SETS, hub_documents, hub_set_of

STDLIB_SOURCES: Mapping[str, stdlib.Split] = MappingProxyType(
    {"stdlib": "train", "stdlib-heldout": "heldout"}
)
_PARQUET_BATCH_ROWS = 256


def open_source(source: str) -> Iterator[Document]:
    """The documents of a source, read as they are asked for.

    - ``stdlib``, ``stdlib-heldout``: a document per file of the Python standard library;
    - a name in ``HUB_SETS``: a data set of the Hugging Face hub;
    - ``hf:OWNER/NAME@COMMIT:SPLIT``, ``hf:OWNER/NAME/CONFIG@COMMIT:SPLIT``: any data set of the
      hub with columns as a .parquet file's (``hub_set_of``);
    - ``FILE.txt``: the whole file is one document;
    - ``FILE.jsonl``: a document per line, a JSON object with ``text``, or with ``messages`` or
      ``conversations`` (lists of objects with ``role`` and ``content``) and maybe ``tools``;
    - ``FILE.parquet``: a document per row, with columns of the same names.

    Raises DataError: at once for a source that is none of these; while iterating for a file that
    is missing, unreadable, empty or of the wrong form, and for a data set that is out of reach.
    """
    if source in STDLIB_SOURCES:
        return _or_refuse_empty(_read_stdlib(source), source)
    if source in HUB_SETS:
        return _or_refuse_empty(hub_documents(source, HUB_SETS[source]), source)
    if source.startswith(HUB_PREFIX):
        return _or_refuse_empty(hub_documents(source, hub_set_of(source)), source)
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"unknown source {source!r}: give {', '.join((*HUB_SETS, *STDLIB_SOURCES))}, "
            f"{HUB_PREFIX}OWNER/NAME@COMMIT:SPLIT, or a file ending in {', '.join(_READERS)}"
        )
    return _or_refuse_empty(reader(path), source)


def _or_refuse_empty(documents: Iterator[Document], source: str) -> Iterator[Document]:
    is_empty = True
    for document in documents:
        is_empty = False
        yield document
    if is_empty:
        raise DataError(f"{source}: there is no text in it")


def _read_stdlib(source: str) -> Iterator[Document]:
    for number, text in enumerate(stdlib.documents(STDLIB_SOURCES[source]), start=1):
        yield PlainText(f"{source}: file {number}", text)


def _read_txt(path: Path) -> Iterator[Document]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    text = _decoded(data, str(path))
    if text.strip():
        yield PlainText(str(path), text)


def _read_jsonl(path: Path) -> Iterator[Document]:
    try:
        # Bytes: only they split at line feeds alone. A JSON string may hold other separators.
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}: line {number}"
                    yield document_of(_json(_decoded(line, where), where), where)
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_extra(str(path)) from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if not set(columns).intersection(CONTENT_FIELDS):
                raise DataError(
                    f"{path}: no column {' or '.join(CONTENT_FIELDS)}; "
                    f"the columns are {', '.join(map(repr, columns)) or 'none'}"
                )
            wanted = [name for name in (*CONTENT_FIELDS, TOOLS_FIELD) if name in columns]
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    yield document_of(without_nulls(record), f"{path}: row {number}")
    except OSError as error:
        raise _unreadable(path, error) from error
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a usable Parquet file: {first_line(error)}") from error


_READERS: Mapping[str, Callable[[Path], Iterator[Document]]] = MappingProxyType(
    {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")  # some editors start a file with a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start + 1} is not UTF-8: save the file in that encoding"
        ) from error


def _json(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {first_line(error)}") from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror or first_line(error)}")
