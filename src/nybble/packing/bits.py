"""Small unsigned integers packed into int32 words, lowest bits first. Pure functions.

A row is one stream of bits: value i takes the bits from ``i * bits`` on, and word w holds the
bits from ``32 * w`` on. Widths that do not divide 32 straddle words, so rows are made of whole
blocks, the shortest runs of values that end where a word ends: 32 values in 3 words at 3 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

PACKABLE_BITS = (2, 3, 4, 8)
"""Widths that some engine reads."""

_WORD = 32
_PIECE = 1 << 22
"""Codes converted in one go, so that a large head needs little more memory than its words."""


def pack_codes(codes_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes q, int8 [O, I], as words of q + 2^(bits-1), int32 [O, I * bits / 32]."""
    offset = 1 << (bits - 1)
    pieces = [pack_words(rows.to(torch.int32) + offset, bits) for rows in _pieces(codes_OI)]
    return torch.cat(pieces)


def unpack_codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: int32 [O, W] -> int8 [O, W * 32 / bits]."""
    offset = 1 << (bits - 1)
    return torch.cat(
        [
            (unpack_words(rows, bits).to(torch.int16) - offset).to(torch.int8)
            for rows in _pieces(words)
        ]
    )


def _pieces(matrix: torch.Tensor) -> Iterable[torch.Tensor]:
    pieces: Iterable[torch.Tensor] = matrix.split(max(1, _PIECE // max(1, matrix.shape[1])))
    return pieces


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, C] integers in [0, 2^bits) -> int32 [R, C * bits / 32], along the last axis.

    Raises ValueError for a width nobody reads, a length that does not fill blocks of words, or
    values out of range.
    """
    lanes, words_a_block = _block(bits)
    if values.shape[-1] % lanes:
        raise ValueError(f"{values.shape[-1]} values do not fill words: give a multiple of {lanes}")
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 2**bits):
        raise ValueError(f"a value lies outside [0, {2**bits})")
    blocks = values.to(torch.int32).unflatten(-1, (values.shape[-1] // lanes, lanes))
    words = torch.zeros(*blocks.shape[:-1], words_a_block, dtype=torch.int32, device=values.device)
    for lane in range(lanes):
        word, shift = divmod(lane * bits, _WORD)
        words[..., word] |= blocks[..., lane] << shift
        if shift + bits > _WORD:  # the upper bits go on in the next word
            words[..., word + 1] |= blocks[..., lane] >> (_WORD - shift)
    return words.flatten(-2)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: int32 [R, W] -> uint8 [R, W * 32 / bits].

    Raises ValueError for a width nobody reads, or words that are no whole blocks.
    """
    lanes, words_a_block = _block(bits)
    if words.shape[-1] % words_a_block:
        raise ValueError(f"{words.shape[-1]} words of {bits}-bit values end within a value")
    blocks = words.unflatten(-1, (words.shape[-1] // words_a_block, words_a_block))
    values = torch.empty(*blocks.shape[:-1], lanes, dtype=torch.uint8, device=words.device)
    for lane in range(lanes):
        word, shift = divmod(lane * bits, _WORD)
        value = blocks[..., word] >> shift  # arithmetic: the sign fills the upper bits
        if shift + bits > _WORD:
            value &= (1 << (_WORD - shift)) - 1
            value |= blocks[..., word + 1] << (_WORD - shift)
        values[..., lane] = value & (2**bits - 1)
    return values.flatten(-2)


def _block(bits: int) -> tuple[int, int]:
    """Values and words of the shortest run that ends where a word ends."""
    if bits not in PACKABLE_BITS:
        raise ValueError(f"cannot pack {bits}-bit values: give one of {PACKABLE_BITS}")
    common = math.gcd(bits, _WORD)
    return _WORD // common, bits // common
