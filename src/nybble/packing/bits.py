"""Small unsigned integers packed into int32 words, lowest bits first. Pure functions."""

from __future__ import annotations

import torch

PACKABLE_BITS = (2, 4, 8)
"""Widths that fill a 32-bit word without a remainder."""


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, C] integers in [0, 2^bits) -> int32 [R, C * bits / 32], along the last axis.

    Raises ValueError for a width that does not divide 32, a length that does not fill words, or
    values out of range.
    """
    per_word = _per_word(bits)
    if values.shape[-1] % per_word:
        raise ValueError(f"{values.shape[-1]} values do not fill words of {per_word}")
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 2**bits):
        raise ValueError(f"a value lies outside [0, {2**bits})")
    lanes = values.to(torch.int32).reshape(
        *values.shape[:-1], values.shape[-1] // per_word, per_word
    )
    words = torch.zeros(lanes.shape[:-1], dtype=torch.int32, device=values.device)
    for lane in range(per_word):
        words |= lanes[..., lane] << (bits * lane)
    return words


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: int32 [R, W] -> uint8 [R, W * 32 / bits]."""
    per_word = _per_word(bits)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    lanes: torch.Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    assert lanes.shape[-1] == per_word
    return lanes.flatten(-2).to(torch.uint8)


def _per_word(bits: int) -> int:
    if bits not in PACKABLE_BITS:
        raise ValueError(f"cannot pack {bits}-bit values: give one of {PACKABLE_BITS}")
    return 32 // bits
