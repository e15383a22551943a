"""Which convention stored zero points follow, by the words of real packers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.doctor.zero_points import BITS, ZeroPoints, zero_point_convention
from nybble.packing.bits import pack_words


def words(zeros: list[list[int]], bits: int) -> np.ndarray:
    """The words that hold these zero points, as the packer of weights packs codes."""
    return pack_words(torch.tensor(zeros), bits).to(torch.int32).numpy()


@pytest.mark.parametrize(
    ("bits", "word", "convention"),
    [
        (4, 0x77777777, "v1"),
        (8, 0x7F7F7F7F, "v1"),
        (4, 0x88888888, "v2"),
        (8, 0x80808080, "v2"),
        (4, 0x77777778, "asymmetric"),
        (8, 0x77777777, "asymmetric"),
        (2, 0x55555555, "v1"),
    ],
)
def test_words_of_the_formats(bits: int, word: int, convention: str) -> None:
    stored = np.full((3, 4), word, dtype=np.uint32).view(np.int32)
    assert zero_point_convention(stored, bits) == convention


@pytest.mark.parametrize("bits", BITS)
def test_every_field_counts(bits: int) -> None:
    """Against the packer, which spreads 3-bit fields over three words."""
    middle = 1 << (bits - 1)
    for zero, convention in ((middle - 1, ZeroPoints.V1), (middle, ZeroPoints.V2)):
        rows = [[zero] * 64 for _ in range(3)]
        assert zero_point_convention(words(rows, bits), bits) is convention
        rows[1][63] -= 1
        assert zero_point_convention(words(rows, bits), bits) is ZeroPoints.ASYMMETRIC


@given(st.lists(st.integers(0, 15), min_size=8, max_size=8))
def test_only_one_value_everywhere_is_symmetric(zeros: list[int]) -> None:
    found = zero_point_convention(words([zeros], 4), 4)
    assert (found is ZeroPoints.V1) == (set(zeros) == {7})
    assert (found is ZeroPoints.V2) == (set(zeros) == {8})


def test_nothing_is_no_convention_and_five_bits_are_refused() -> None:
    assert zero_point_convention(np.zeros((0, 4), np.int32), 4) is ZeroPoints.ASYMMETRIC
    assert zero_point_convention(np.zeros((1, 2), np.int32), 3) is ZeroPoints.ASYMMETRIC
    with pytest.raises(ValueError, match="5 bits"):
        zero_point_convention(np.zeros((1, 1), np.int32), 5)
