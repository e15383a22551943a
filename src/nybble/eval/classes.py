"""Text classes to count drafts on: how many are right depends most on the kind of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nybble.core.errors import DataError
from nybble.data.rows import Rows
from nybble.data.sources import STDLIB_SOURCES, open_source
from nybble.data.tokens import tokenized
from nybble.eval.texts import Text, windows_of

BUNDLED: Mapping[str, str] = MappingProxyType(
    {
        "code": "stdlib-heldout",
        "prose": "prose.txt",
        "maths": "maths.txt",
        "chat": "chat.jsonl",
        "tools": "tools.jsonl",
    }
)
"""Class to source: a name that ``open_source`` knows, or a file that comes with nybble."""


@dataclass(frozen=True)
class ClassText:
    """One class and its windows."""

    name: str
    source: str
    """For people: a bundled file without its folder."""
    rows: Rows


@dataclass(frozen=True)
class ClassTexts:
    """What is measured, and what could not be."""

    texts: tuple[ClassText, ...]
    notes: tuple[str, ...]
    """A line for each class that is left out or shorter than asked for."""


def bundled_classes(tokenizer: Any, windows: int, seqlen: int) -> ClassTexts:
    """The classes that come with nybble, as much of each as there is.

    A class that the tokenizer cannot take is left out (chats need a chat template, which may not
    know tools). Raises DataError if that leaves none.
    """
    texts, notes = [], []
    with _texts_folder() as folder:
        for name, file in BUNDLED.items():
            source = file if file in STDLIB_SOURCES else str(folder / file)
            try:
                text = _what_there_is(Text(source, windows, seqlen), tokenizer)
                texts.append(ClassText(name, file, windows_of(text, tokenizer)))
            except DataError as error:
                reason = str(error).replace(f"{folder}/", "")
                notes.append(f"{name} is left out: {reason}")
                continue
            if (text.windows, text.seqlen) != (windows, seqlen):
                notes.append(f"{name} is shorter than asked for: {text.windows} x {text.seqlen}")
    if not texts:
        raise DataError(f"no bundled text suits this tokenizer: {notes[0]}")
    return ClassTexts(tuple(texts), tuple(notes))


def given_classes(
    sources: Mapping[str, str], tokenizer: Any, windows: int, seqlen: int
) -> ClassTexts:
    """The classes of these sources. Raises DataError if one is not usable, or too short."""
    texts = [
        ClassText(name, source, windows_of(Text(source, windows, seqlen), tokenizer))
        for name, source in sources.items()
    ]
    return ClassTexts(tuple(texts), ())


@contextmanager
def _texts_folder() -> Iterator[Path]:
    with resources.as_file(resources.files("nybble") / "assets" / "texts") as folder:
        yield folder


def _what_there_is(text: Text, tokenizer: Any) -> Text:
    """``text`` with no more windows than its source fills; or one, shorter than asked for.

    Counts as ``packed_rows`` joins: with a separator between documents.
    """
    there = 0
    for document in open_source(text.source):
        count = len(tokenized(document, tokenizer))
        there += count + (there > 0 and count > 0)
        if there >= text.windows * text.seqlen:
            return text
    if there < text.seqlen:
        return replace(text, windows=1, seqlen=there)
    return replace(text, windows=there // text.seqlen)
