"""Bit packing, once more with Python's integers, one bit at a time."""

from __future__ import annotations

import pytest
import torch

from nybble.packing.bits import pack_words, unpack_words


def twin_words(values: list[int], bits: int) -> list[int]:
    """Bit i of value v lands at bit v * bits + i of the stream; words are signed 32 bits."""
    stream = [(value >> i) & 1 for value in values for i in range(bits)]
    words = []
    for start in range(0, len(stream), 32):
        word = 0
        for place, bit in enumerate(stream[start : start + 32]):
            word += bit * 2**place
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_words(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (5, 3 * 32), generator=generator)
    words = pack_words(values, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [twin_words(row, bits) for row in values.tolist()]
    assert unpack_words(words, bits).tolist() == values.tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_all_ones_fill_the_sign_bit(bits: int) -> None:
    values = [2**bits - 1] * 32
    words = [-1] * bits
    assert twin_words(values, bits) == words
    assert pack_words(torch.tensor([values]), bits).tolist() == [words]
    assert unpack_words(torch.tensor([words], dtype=torch.int32), bits).tolist() == [values]
