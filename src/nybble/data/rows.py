"""Calibration and evaluation rows: token ids, how many of them are real, and a hash of each."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nybble.core.errors import DataError
from nybble.data.order import apportioned, permuted, shuffled
from nybble.data.sources import open_source
from nybble.data.tokens import end_of_text_id, tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nybble.recipe.schema import Calibration, TextSource

PAD_ID = 0
"""Behind a short row's tokens. Every model has this id, and none of its layers looks ahead."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of token ids, all different; short ones are padded on the right."""

    token_ids: torch.Tensor
    """int64 [rows, seqlen]"""
    lengths: torch.Tensor
    """int64 [rows]: how many of a row's ids are real, from 1 to seqlen"""
    hashes: tuple[str, ...]
    """Of each row's real ids: ``row_hash``."""

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the rows' hashes, joined in their order."""
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()

    def mask(self) -> torch.Tensor:
        """bool [rows, seqlen]: True where an id is real, False where it is padding."""
        positions = torch.arange(self.token_ids.shape[1], device=self.lengths.device)
        return positions < self.lengths[:, None]


def rows_of(id_lists: Sequence[Sequence[int]], seqlen: int) -> Rows:
    """``Rows`` of lists of 1 to ``seqlen`` ids each."""
    token_ids = torch.full((len(id_lists), seqlen), PAD_ID, dtype=torch.int64)
    for row, ids in zip(token_ids, id_lists, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    lengths = torch.tensor([len(ids) for ids in id_lists], dtype=torch.int64)
    return Rows(token_ids, lengths, tuple(map(row_hash, id_lists)))


def row_hash(token_ids: Sequence[int]) -> str:
    """SHA-256 (hexadecimal) of the ids, without padding, as little-endian int64 bytes."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}q", *token_ids)).hexdigest()


def build_rows(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """``calibration.rows`` different rows of ``calibration.seqlen`` tokens.

    A mix's sources give as many rows each as ``apportioned`` says, and all rows are then brought
    into an order that ``calibration.seed`` decides (``permuted``). The documents of a source are
    taken in an order that the seed decides too (``shuffled``) and laid out as its layout says
    (``truncated_rows``, ``packed_rows``, ``padded_rows``). Conversations are rendered with the
    tokenizer's chat template. No more is read than the rows need.

    Raises DataError if a source is not usable, if it gives fewer rows than it should, if it holds
    conversations and the tokenizer has no chat template, or if its layout is ``pack`` and the
    tokenizer has no end-of-text token.
    """
    sources = calibration.sources
    shares = apportioned(calibration.rows, [source.weight for source in sources])
    # All are opened before any is read, so that a wrong name shows at once.
    candidates = [_candidates(source, calibration, tokenizer) for source in sources]
    rows: dict[str, list[int]] = {}
    for source, share, found in zip(sources, shares, candidates, strict=True):
        _add_rows(rows, found, share, source, calibration)
    id_lists = list(rows.values())
    if len(sources) > 1:
        id_lists = permuted(id_lists, calibration.seed)
    return rows_of(id_lists, calibration.seqlen)


def refuse_overlap(rows: Rows, calibration_hashes: Collection[str]) -> None:
    """Raises DataError if a row of ``rows``, meant for evaluation, was used in calibration.

    Rows are equal if their real ids are; how far either is padded makes no difference.
    """
    used = set(calibration_hashes)
    shared = [index for index, digest in enumerate(rows.hashes) if digest in used]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(rows.hashes)} evaluation rows were used in calibration "
            f"(the first is row {shared[0]}): evaluate on other text"
        )


def truncated_rows(token_lists: Iterable[list[int]], seqlen: int) -> Iterator[list[int]]:
    """The first ``seqlen`` ids of each list that has as many; shorter lists give no row."""
    return (ids[:seqlen] for ids in token_lists if len(ids) >= seqlen)


def padded_rows(
    token_lists: Iterable[list[int]], seqlen: int, min_tokens: int
) -> Iterator[list[int]]:
    """The first ids, at most ``seqlen``, of each list that has ``min_tokens`` or fills a row."""
    return (ids[:seqlen] for ids in token_lists if len(ids) >= min(min_tokens, seqlen))


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


def _add_rows(
    rows: dict[str, list[int]],
    candidates: Iterator[list[int]],
    share: int,
    source: TextSource,
    calibration: Calibration,
) -> None:
    """Adds ``share`` rows of one source, under their hashes, that are not among ``rows`` yet."""
    wanted = len(rows) + share
    duplicates = 0
    for row in candidates:
        digest = row_hash(row)
        duplicates += digest in rows
        rows[digest] = row
        if len(rows) == wanted:
            return
    found = share - (wanted - len(rows))
    raise _too_little_text(source, share, found, duplicates, calibration)


def _candidates(
    source: TextSource, calibration: Calibration, tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    documents = shuffled(open_source(source.source), calibration.seed)
    token_lists = (tokenized(document, tokenizer) for document in documents)
    seqlen = calibration.seqlen
    match source.layout:
        case "pack":
            return packed_rows(token_lists, seqlen, end_of_text_id(tokenizer))
        case "pad":
            return padded_rows(token_lists, seqlen, calibration.min_tokens)
        case _:
            return truncated_rows(token_lists, seqlen)


def _too_little_text(
    source: TextSource, share: int, found: int, duplicates: int, calibration: Calibration
) -> DataError:
    dropped = f" (and {duplicates} that were there already)" if duplicates else ""
    ways = ["a longer text", "fewer rows"]
    if calibration.mix:
        ways.append("a smaller weight")
    match source.layout:
        case "pack":
            ways.append("a shorter seqlen")
        case "pad":
            ways.append("a smaller min_tokens")
        case _:
            ways += ["a shorter seqlen", 'layout = "pad"', 'layout = "pack"']
    return DataError(
        f"asked for {share} rows of {calibration.seqlen} tokens; "
        f"{source.source} gave {found}{dropped}; "
        f"use {', '.join(ways[:-1])}, or {ways[-1]}"
    )
