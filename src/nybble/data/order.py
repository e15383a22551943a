"""Which rows come from which source, and in what order: decided by weights and a seed alone."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

from nybble.data.documents import Document, PlainText

BUFFER_DOCUMENTS = 16_384
BUFFER_CHARACTERS = 2**28
"""Most that the shuffle holds: a source within both bounds is permuted as a whole."""

_Item = TypeVar("_Item")


def apportioned(rows: int, weights: Sequence[float]) -> list[int]:
    """How many of ``rows`` each weight gets: by largest remainder, and none gets nothing.

    Each gets the whole part of its exact share, and those with the largest remainders one more,
    the earlier first where remainders are equal. Weights that this leaves without a row get one
    each, and the others share the rest in the same way.

    ``weights`` are positive, and not more than ``rows``.
    """
    # By their decimal digits: 0.1, 0.2 and 0.7 are to be one, two and seven parts of ten.
    parts = [Fraction(repr(weight)) for weight in weights]
    counts = [0] * len(parts)
    sharing = list(range(len(parts)))
    while True:
        shares = _largest_remainder(rows, [parts[index] for index in sharing])
        for index, share in zip(sharing, shares, strict=True):
            counts[index] = max(share, 1)
        starved = shares.count(0)
        if not starved:
            return counts
        rows -= starved
        sharing = [index for index, share in zip(sharing, shares, strict=True) if share]


def permuted(items: Sequence[_Item], seed: int) -> list[_Item]:
    """The items in an order that depends on ``seed`` and on their own order alone."""
    draw = _random_numbers(seed)
    left = list(items)
    return [_taken(left, next(draw)) for _ in items]


def shuffled(documents: Iterable[Document], seed: int) -> Iterator[Document]:
    """The documents in an order that depends on ``seed`` and on their own order alone.

    At most BUFFER_DOCUMENTS documents and BUFFER_CHARACTERS characters are held; whenever there
    are more, one of those held, drawn at random, goes out. So a small source is permuted as a
    whole, and of a large one little more than the buffer's first filling need be read.
    """
    draw = _random_numbers(seed)
    held: list[Document] = []
    characters = 0
    for document in documents:
        held.append(document)
        characters += _characters(document)
        while len(held) > BUFFER_DOCUMENTS or characters > BUFFER_CHARACTERS:
            out = _taken(held, next(draw))
            characters -= _characters(out)
            yield out
    while held:
        yield _taken(held, next(draw))


def _largest_remainder(rows: int, parts: Sequence[Fraction]) -> list[int]:
    shares = [rows * part / sum(parts) for part in parts]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - shares[i])
    for index in by_remainder[: rows - sum(counts)]:
        counts[index] += 1
    return counts


def _random_numbers(seed: int) -> Iterator[float]:
    # A string, as an int seeds by its absolute value. Of Random's methods, only random() is
    # promised to stay the same from one Python to the next.
    draw = random.Random(str(seed)).random
    while True:
        yield draw()


def _taken(held: list[_Item], number: float) -> _Item:
    """Takes out one item, by a number from 0 to 1; the last one moves to its place."""
    index = int(number * len(held))
    held[index], held[-1] = held[-1], held[index]
    return held.pop()


def _characters(document: Document) -> int:
    if isinstance(document, PlainText):
        return len(document.text)
    return sum(len(repr(message)) for message in document.messages)
