"""Calibration and evaluation rows: token ids of fixed length, and a hash of each."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nybble.core.errors import DataError
from nybble.data.documents import Conversation, Document, PlainText, first_line
from nybble.data.sources import open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nybble.recipe.schema import Calibration

BUFFER_DOCUMENTS = 16_384
BUFFER_CHARACTERS = 2**28
"""Most that the shuffle holds: a source within both bounds is permuted as a whole."""
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of token ids, all different."""

    token_ids: torch.Tensor
    """int64 [rows, seqlen]"""
    hashes: tuple[str, ...]
    """Of each row: ``row_hash``."""

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the rows' hashes, joined in their order."""
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()


def row_hash(token_ids: Sequence[int]) -> str:
    """SHA-256 (hexadecimal) of the ids as little-endian int64 bytes."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}q", *token_ids)).hexdigest()


def build_rows(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """``calibration.rows`` different rows of ``calibration.seqlen`` tokens.

    The documents are taken in an order that ``calibration.seed`` decides (``shuffled``) and laid
    out as ``calibration.layout`` says (``truncated_rows``, ``packed_rows``). Conversations are
    rendered with the tokenizer's chat template. No more is read than the rows need.

    Raises DataError if the source is not usable, if it gives fewer rows, if it holds
    conversations and the tokenizer has no chat template, or if layout is ``pack`` and the
    tokenizer has no end-of-text token.
    """
    documents = shuffled(open_source(calibration.source), calibration.seed)
    token_lists = (tokenized(document, tokenizer) for document in documents)
    if calibration.layout == "pack":
        candidates = packed_rows(token_lists, calibration.seqlen, end_of_text_id(tokenizer))
    else:
        candidates = truncated_rows(token_lists, calibration.seqlen)
    rows: dict[str, list[int]] = {}
    duplicates = 0
    for row in candidates:
        digest = row_hash(row)
        duplicates += digest in rows
        rows[digest] = row
        if len(rows) == calibration.rows:
            return Rows(torch.tensor(list(rows.values()), dtype=torch.int64), tuple(rows))
    raise _too_little_text(calibration, len(rows), duplicates)


def refuse_overlap(rows: Rows, calibration_hashes: Collection[str]) -> None:
    """Raises DataError if a row of ``rows``, meant for evaluation, was used in calibration."""
    used = set(calibration_hashes)
    shared = [index for index, digest in enumerate(rows.hashes) if digest in used]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(rows.hashes)} evaluation rows were used in calibration "
            f"(the first is row {shared[0]}): evaluate on other text"
        )


def shuffled(documents: Iterable[Document], seed: int) -> Iterator[Document]:
    """The documents in an order that depends on ``seed`` and on their own order alone.

    At most BUFFER_DOCUMENTS documents and BUFFER_CHARACTERS characters are held; whenever there
    are more, one of those held, drawn at random, goes out. So a small source is permuted as a
    whole, and of a large one little more than the buffer's first filling need be read.
    """
    # A string, as an int seeds by its absolute value. Of Random's methods, only random() is
    # promised to stay the same from one Python to the next.
    draw = random.Random(str(seed)).random
    held: list[Document] = []
    characters = 0

    def taken() -> Document:
        index = int(draw() * len(held))
        held[index], held[-1] = held[-1], held[index]
        return held.pop()

    for document in documents:
        held.append(document)
        characters += _characters(document)
        while len(held) > BUFFER_DOCUMENTS or characters > BUFFER_CHARACTERS:
            out = taken()
            characters -= _characters(out)
            yield out
    while held:
        yield taken()


def truncated_rows(token_lists: Iterable[list[int]], seqlen: int) -> Iterator[list[int]]:
    """The first ``seqlen`` ids of each list that has as many; shorter lists give no row."""
    return (ids[:seqlen] for ids in token_lists if len(ids) >= seqlen)


def packed_rows(
    token_lists: Iterable[list[int]], seqlen: int, separator: int
) -> Iterator[list[int]]:
    """The lists joined, with ``separator`` between two, and cut into rows of ``seqlen`` ids.

    Lists without ids are skipped; what is left at the end and fills no row is dropped.
    """
    pending: list[int] = []
    is_first = True
    for ids in token_lists:
        if not ids:
            continue
        if not is_first:
            pending.append(separator)
        is_first = False
        pending += ids
        whole = len(pending) - len(pending) % seqlen
        for start in range(0, whole, seqlen):
            yield pending[start : start + seqlen]
        del pending[:whole]


def tokenized(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A document's token ids: all of them, however long the tokenizer's model_max_length.

    Plain text gets the special tokens that the tokenizer adds by itself; a rendered conversation
    does not, as its template writes them.

    Raises DataError if a conversation cannot be rendered, or for text that UTF-8 cannot hold.
    """
    is_plain = isinstance(document, PlainText)
    text = document.text if isinstance(document, PlainText) else _rendered(document, tokenizer)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{document.where}: character {error.start + 1} is half of a surrogate pair: "
            "repair the text or take it out"
        ) from error
    # verbose=False: a text longer than model_max_length is no news here, rows are cut from it.
    encoding = tokenizer(text, add_special_tokens=is_plain, verbose=False)
    ids: list[int] = encoding["input_ids"]
    return ids


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that parts documents: of ``<|endoftext|>``, or else of the eos token.

    Raises DataError if the tokenizer has neither.
    """
    found: int | None = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    if found is None:
        raise DataError(
            f"the tokenizer has no {END_OF_TEXT} and no eos token to put between documents: "
            'use layout = "truncate"'
        )
    return found


def _rendered(document: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            f"{document.where}: a conversation, and the tokenizer has no chat template: "
            "give plain text"
        )
    tools: list[dict[str, Any] | Callable[..., Any]] | None = None
    if document.tools is not None:
        tools = [dict(tool) for tool in document.tools]
    messages = [dict(message) for message in document.messages]
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise DataError(
            f"{document.where}: the tokenizer's chat template refuses it: {first_line(error)}"
        ) from error


def _characters(document: Document) -> int:
    if isinstance(document, PlainText):
        return len(document.text)
    return sum(len(repr(message)) for message in document.messages)


def _too_little_text(calibration: Calibration, found: int, duplicates: int) -> DataError:
    dropped = f" (and {duplicates} that it had given before)" if duplicates else ""
    ways = ["a longer text", "fewer rows", "a shorter seqlen"]
    if calibration.layout == "truncate":
        ways.append('layout = "pack"')
    return DataError(
        f"asked for {calibration.rows} rows of {calibration.seqlen} tokens; "
        f"{calibration.source} gave {found}{dropped}; "
        f"use {', '.join(ways[:-1])}, or {ways[-1]}"
    )
