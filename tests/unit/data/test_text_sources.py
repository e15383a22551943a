from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nybble.core.errors import DataError
from nybble.data.documents import Conversation, PlainText
from nybble.data.sources import open_source

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def _write(path: Path, data: bytes | str) -> str:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def _lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _error(source: str) -> str:
    with pytest.raises(DataError) as caught:
        list(open_source(source))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_txt_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.TXT", b"\xef\xbb\xbfone\r\n\r\ntwo \xc3\xa4\n")
    assert list(open_source(source)) == [PlainText(source, "one\r\n\r\ntwo \xe4\n")]


def test_jsonl_texts_and_conversations(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    source = _write(
        tmp_path / "a.jsonl",
        _lines({"text": "one\u2028two", "id": 3}, {"text": None, "messages": CHAT})
        + "\n"
        + _lines({"conversations": CHAT, "tools": tools})[:-1],
    )
    assert list(open_source(source)) == [
        PlainText(f"{source}: line 1", "one\u2028two"),
        Conversation(f"{source}: line 2", tuple(CHAT)),
        Conversation(f"{source}: line 4", tuple(CHAT), tuple(tools)),
    ]


def test_jsonl_splits_at_line_feeds_alone(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x0bd"
    line = json.dumps({"text": text}, ensure_ascii=False)
    source = _write(tmp_path / "a.jsonl", "\ufeff" + line + "\r\n")
    assert list(open_source(source)) == [PlainText(f"{source}: line 1", text)]


def test_a_source_is_read_lazily(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", _lines({"text": "fine"}) + "broken\n")
    documents = open_source(source)
    assert next(documents) == PlainText(f"{source}: line 1", "fine")
    with pytest.raises(DataError, match="line 2: not JSON"):
        next(documents)
    missing = open_source(str(tmp_path / "missing.txt"))
    assert isinstance(missing, Iterator)


@pytest.mark.parametrize("name", ["stdlib", "stdlib-heldout"])
def test_the_standard_library_is_a_source(name: str) -> None:
    document = next(open_source(name))
    assert isinstance(document, PlainText)
    assert document.where == f"{name}: file 1"


def test_the_stdlib_sources_are_different_text() -> None:
    train = {d.text for d in open_source("stdlib") if isinstance(d, PlainText)}
    heldout = {d.text for d in open_source("stdlib-heldout") if isinstance(d, PlainText)}
    assert len(train) > len(heldout) > 10
    # Some packages begin with the same empty or one-line file.
    shared = sum(map(len, train & heldout))
    assert shared < sum(map(len, heldout)) / 1000


@pytest.mark.parametrize("source", ["pile_10k", "data.csv", "a.jsonl.gz", ""])
def test_an_unknown_source_is_refused_at_once(source: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(source)
    assert str(caught.value) == (
        f"unknown source {source!r}: give pile-10k, ultrachat_200k, wikitext-2-raw, "
        "wikitext-2-raw-test, stdlib, stdlib-heldout, hf:OWNER/NAME@COMMIT:SPLIT, "
        "or a file ending in .txt, .jsonl, .parquet"
    )


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_files_that_cannot_be_read(tmp_path: Path, ending: str) -> None:
    missing = tmp_path / f"missing.{ending}"
    assert _error(str(missing)).startswith(f"cannot read {missing}: ")
    folder = tmp_path / f"folder.{ending}"
    folder.mkdir()
    assert _error(str(folder)).startswith(f"cannot read {folder}: ")


@pytest.mark.parametrize(
    ("name", "data"), [("a.txt", ""), ("a.txt", " \n"), ("a.jsonl", ""), ("a.jsonl", "\n \n")]
)
def test_empty_files(tmp_path: Path, name: str, data: str) -> None:
    source = _write(tmp_path / name, data)
    assert _error(source) == f"{source}: there is no text in it"


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.txt", b"ab\xff")
    assert _error(source) == f"{source}: byte 3 is not UTF-8: save the file in that encoding"
    source = _write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n')
    assert _error(source).startswith(f"{source}: line 2: byte 11 is not UTF-8")


def test_broken_json(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": \n')
    assert _error(source).startswith(f"{source}: line 2: not JSON: ")
    deep = _write(tmp_path / "deep.jsonl", '{"text": ' + "[" * 200_000 + "\n")
    assert _error(deep).startswith(f"{deep}: line 1: ")


ASSISTANT = {"role": "assistant"}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ([1], "this is a list, not an object with fields"),
        ("text", "this is a string, not an object with fields"),
        (
            {"body": "a", "text": None},
            "no field text or messages or conversations with a value; "
            "the fields are 'body', 'text'",
        ),
        ({"text": 3.5}, "text is a number, not a string"),
        ({"text": True}, "text is a boolean, not a string"),
        ({"messages": "hi"}, "messages is a string, not a list of messages"),
        ({"messages": []}, "messages is an empty list, not a list of messages"),
        ({"messages": [None]}, "messages[0] is null, not an object with role and content"),
        (
            {"conversations": [{"from": "human", "value": "hi"}]},
            "conversations[0] has no role (a string); its fields are 'from', 'value'",
        ),
        (
            {"messages": [*CHAT, ASSISTANT]},
            "messages[2] has a role and nothing else: give it content",
        ),
        (
            {"messages": [{**ASSISTANT, "content": {"a": 1}}]},
            "messages[0]: content is an object, not a string or text parts",
        ),
        (
            {"messages": [{**ASSISTANT, "content": [{"type": "image", "url": "x"}]}]},
            "messages[0]: content is a list, not a string or text parts",
        ),
        (
            {"messages": [{**ASSISTANT, "tool_calls": "f()"}]},
            "messages[0]: tool_calls is a string, not a list of objects",
        ),
        ({"messages": CHAT, "tools": 1}, "tools is a number, not a list of JSON schemas"),
        ({"messages": CHAT, "tools": "f"}, "tools is a string, not a list of JSON schemas"),
    ],
)
def test_records_of_the_wrong_form(tmp_path: Path, record: object, problem: str) -> None:
    source = _write(tmp_path / "a.jsonl", _lines({"text": "fine"}, record))
    assert _error(source) == f"{source}: line 2: {problem}"


def _messages(tmp_path: Path, *messages: dict[str, Any]) -> tuple[Any, ...]:
    source = _write(tmp_path / "a.jsonl", _lines({"messages": messages, "tools": []}))
    (document,) = open_source(source)
    assert isinstance(document, Conversation)
    assert document.tools is None
    return document.messages


def test_tool_call_arguments_become_objects(tmp_path: Path) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": '{"city": "Rome"}'}}
    flat = {"name": "f", "arguments": '{"size": 2}'}
    kept = [{"function": {"name": "f", "arguments": text}} for text in ("[1]", "no json")]
    (message,) = _messages(tmp_path, {**ASSISTANT, "tool_calls": [call, flat, *kept]})
    assert message["tool_calls"] == [
        {"id": "1", "function": {"name": "f", "arguments": {"city": "Rome"}}},
        {"name": "f", "arguments": {"size": 2}},
        *kept,
    ]
    assert message["content"] is None


def test_text_parts_and_unknown_fields_are_kept(tmp_path: Path) -> None:
    message = {**ASSISTANT, "content": [{"type": "text", "text": "a"}], "weight": None, "x": [0]}
    assert _messages(tmp_path, message) == (message,)
