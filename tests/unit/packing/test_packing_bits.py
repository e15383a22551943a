from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.packing import bits as bit_packing
from nybble.packing.bits import (
    PACKABLE_BITS,
    pack_codes,
    pack_words,
    unpack_codes,
    unpack_words,
)


def test_the_first_value_takes_the_lowest_bits() -> None:
    assert pack_words(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]]), 4).tolist() == [[0x07654321]]
    assert pack_words(torch.tensor([[1, 2, 3, 4]]), 8).tolist() == [[0x04030201]]
    values = torch.tensor([[1, 2, 3] + [0] * 13])
    assert pack_words(values, 2).tolist() == [[0b111001]]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), bits=st.sampled_from(PACKABLE_BITS))
def test_round_trip(data: st.DataObject, bits: int) -> None:
    rows, blocks = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 4))
    lanes, words = {2: (16, 1), 3: (32, 3), 4: (8, 1), 8: (4, 1)}[bits]
    columns = blocks * lanes
    flat = data.draw(
        st.lists(st.integers(0, 2**bits - 1), min_size=rows * columns, max_size=rows * columns)
    )
    values = torch.tensor(flat, dtype=torch.int32).view(rows, columns)
    packed = pack_words(values, bits)
    assert (packed.dtype, packed.shape) == (torch.int32, (rows, blocks * words))
    unpacked = unpack_words(packed, bits)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked.int(), values)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_values_out_of_range(bits: int) -> None:
    for bad in (-1, 2**bits):
        values = torch.zeros(2, 32, dtype=torch.int32)
        values[1, 31] = bad
        with pytest.raises(ValueError, match="outside"):
            pack_words(values, bits)


def test_a_length_that_does_not_fill_words() -> None:
    with pytest.raises(ValueError, match="12 values do not fill words: give a multiple of 8"):
        pack_words(torch.zeros(1, 12, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="give a multiple of 32"):
        pack_words(torch.zeros(1, 48, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match="4 words of 3-bit values end within a value"):
        unpack_words(torch.zeros(1, 4, dtype=torch.int32), 3)


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 16, 32])
def test_other_widths(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits}-bit"):
        pack_words(torch.zeros(1, 32, dtype=torch.int32), bits)
    with pytest.raises(ValueError, match=f"{bits}-bit"):
        unpack_words(torch.zeros(1, 1, dtype=torch.int32), bits)


def test_values_are_left_alone() -> None:
    values = torch.arange(8, dtype=torch.int32)[None]
    pack_words(values, 4)
    assert values.tolist() == [list(range(8))]


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_codes_in_pieces_are_codes_at_once(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    half = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-half, half, (7, 64), generator=generator).to(torch.int8)
    words = pack_words(codes.int() + half, bits)
    for piece in (1, 130, 1 << 20):
        monkeypatch.setattr(bit_packing, "_PIECE", piece)
        assert torch.equal(pack_codes(codes, bits), words)
        back = unpack_codes(words, bits)
        assert back.dtype == torch.int8
        assert torch.equal(back, codes)
