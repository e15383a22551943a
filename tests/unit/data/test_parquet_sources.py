from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from nybble.core.errors import DataError
from nybble.data.documents import Conversation, PlainText
from nybble.data.sources import open_source

pa = pytest.importorskip("pyarrow", reason="needs the extra 'data'")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra 'data'")


def _error(source: str) -> str:
    with pytest.raises(DataError) as caught:
        list(open_source(source))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_parquet_texts_over_many_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"text {i}" for i in range(700)]
    parquet.write_table(pa.table({"id": list(range(700)), "text": texts}), path, row_group_size=100)
    documents = list(open_source(str(path)))
    assert documents == [PlainText(f"{path}: row {i + 1}", t) for i, t in enumerate(texts)]


def test_parquet_conversations_lose_arrows_nulls_and_nothing_else(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"city": "Rome"}}}
    other = {"function": {"name": "g", "arguments": {"size": 2}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "reasoning_content": "call both", "tool_calls": [call, other]},
        {"role": "tool", "content": "fine"},
    ]
    path = tmp_path / "a.parquet"
    table = pa.table({"messages": [messages], "tools": ['[{"name": "f"}, {"name": "g"}]']})
    parquet.write_table(table, path)
    (document,) = open_source(str(path))
    expected = (messages[0], {**messages[1], "content": None}, messages[2])
    assert document == Conversation(f"{path}: row 1", expected, ({"name": "f"}, {"name": "g"}))


def test_an_empty_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert _error(str(path)) == f"{path}: there is no text in it"


def test_broken_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet at all")
    assert _error(str(path)).startswith(f"{path}: not a usable Parquet file: ")
    path = tmp_path / "b.parquet"
    parquet.write_table(pa.table({"id": [1], "body": ["a"]}), path)
    assert _error(str(path)) == (
        f"{path}: no column text or messages or conversations; the columns are 'id', 'body'"
    )
    path = tmp_path / "c.parquet"
    parquet.write_table(pa.table({"text": [1]}), path)
    assert _error(str(path)) == f"{path}: row 1: text is a number, not a string"
    path = tmp_path / "d.parquet"
    text = pa.array([b"ab", b"\xff"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": text}), path)
    assert _error(str(path)).startswith(f"{path}: not a usable Parquet file: 'utf-8' codec")


def test_parquet_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.parquet"
    assert _error(str(missing)).startswith(f"cannot read {missing}: ")
    folder = tmp_path / "folder.parquet"
    folder.mkdir()
    assert str(folder) in _error(str(folder))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    assert _error(str(path)) == (
        f"{path}: this needs datasets and pyarrow: pip install 'nybble[data]', or give a .txt or "
        ".jsonl file, or 'stdlib'"
    )
