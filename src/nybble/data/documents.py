"""One piece of text, and how it is read from a record of a .jsonl, a .parquet or a data set.

A document is plain text, or a conversation that the model's own chat template will render.
Nothing is taken out of a conversation: thinking, tool calls and tool results stay in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

from nybble.core.errors import DataError

CONTENT_FIELDS = ("text", "messages", "conversations")
"""The fields a document is read from; a record's first one that is not null is taken."""
TOOLS_FIELD = "tools"


@dataclass(frozen=True)
class PlainText:
    """Text to tokenize as it is."""

    where: str
    """File and line, for error messages."""
    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages to render with the model's chat template."""

    where: str
    """File and line, for error messages."""
    messages: tuple[Mapping[str, Any], ...]
    """Each has ``role`` (str) and ``content`` (str, None or text parts), and its other fields."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    """JSON schemas of the functions that the model may call."""


Document: TypeAlias = PlainText | Conversation


def document_of(record: object, where: str) -> Document:
    """Reads ``text``, or ``messages`` or ``conversations`` (and ``tools``), of one record.

    Raises DataError, starting with ``where``, if the record has none of them or a wrong type.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: this is {kind_of(record)}, not an object with fields")
    field = next((name for name in CONTENT_FIELDS if record.get(name) is not None), None)
    if field is None:
        raise DataError(
            f"{where}: no field {' or '.join(CONTENT_FIELDS)} with a value; "
            f"the fields are {', '.join(map(repr, record)) or 'none'}"
        )
    value = record[field]
    if field == "text":
        if not isinstance(value, str):
            raise DataError(f"{where}: text is {kind_of(value)}, not a string")
        return PlainText(where, value)
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {field} is {kind_of(value)}, not a list of messages")
    messages = tuple(_message(item, f"{where}: {field}[{i}]") for i, item in enumerate(value))
    return Conversation(where, messages, _tools(record.get(TOOLS_FIELD), where))


def without_nulls(value: Any) -> Any:
    """``value`` without its null fields, at every depth.

    Arrow gives all messages of a column the same fields and fills the absent ones with nulls;
    a chat template would take ``tool_calls: null`` for a field that was given.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def kind_of(value: object) -> str:
    """A JSON value's kind with its article: ``a string``, ``an empty list``."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list" if value else "an empty list"
        case dict():
            return "an object"
        case _:
            return f"a value of type {type(value).__name__}"


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its class's name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def missing_extra(where: str) -> DataError:
    """The error for a source that an optional dependency would read."""
    return DataError(
        f"{where}: this needs datasets and pyarrow: pip install 'nybble[data]', or give a .txt or "
        ".jsonl file, or 'stdlib'"
    )


def _message(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is {kind_of(value)}, not an object with role and content")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str):
        keys = ", ".join(map(repr, value)) or "none"
        raise DataError(f"{where} has no role (a string); its fields are {keys}")
    if content is None:
        if not any(item for key, item in value.items() if key != "role"):
            raise DataError(f"{where} has a role and nothing else: give it content")
    elif not isinstance(content, str) and not _is_text_parts(content):
        raise DataError(f"{where}: content is {kind_of(content)}, not a string or text parts")
    # A template may read content without asking whether it is there.
    message = {**value, "content": content}
    if message.get("tool_calls") is not None:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    return message


def _is_text_parts(content: object) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    )


def _tool_calls(value: object, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object.

    The OpenAI form has the arguments as JSON text, or none, which many templates cannot iterate
    over.
    """
    if not _is_objects(value):
        raise DataError(f"{where}: tool_calls is {kind_of(value)}, not a list of objects")
    return [_tool_call(call) for call in value]


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _tool_call(call["function"])}
    if call.get("arguments", {}) in (None, ""):
        return {**call, "arguments": {}}
    arguments = _decoded(call.get("arguments"))
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _tools(value: object, where: str) -> tuple[Mapping[str, Any], ...] | None:
    """The functions on offer: a list of objects, or the JSON text of one (as in Parquet)."""
    if value is None:
        return None
    decoded = _decoded(value)
    if not _is_objects(decoded):
        raise DataError(f"{where}: {TOOLS_FIELD} is {kind_of(value)}, not a list of JSON schemas")
    return tuple(decoded) or None


def _decoded(value: object) -> Any:
    """JSON text decoded; any other value, and text that is not JSON, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _is_objects(value: object) -> TypeGuard[Sequence[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
