"""Which of two conventions the zero points of a GPTQ checkpoint follow, by what is stored.

Version 1 of the format, and AutoRound, store the zero point less one; version 2 stores it as it
is. Nothing but the values tells them apart: both are written under the same names, and a config
that names the wrong one shifts all weights of a module by one step of its grid.
"""

from __future__ import annotations

import math
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

BITS = (2, 3, 4, 8)
"""Those that GPTQ's layout packs."""

_WORD_BITS = 32


class ZeroPoints(StrEnum):
    """What is stored for every output and group."""

    V1 = "v1"
    """The middle of the grid less one: symmetric weights in version 1."""
    V2 = "v2"
    """The middle of the grid: symmetric weights in version 2."""
    ASYMMETRIC = "asymmetric"
    """Anything else: no symmetric weights, or a mixture, or no zero points at all."""


def zero_point_convention(words: NDArray[np.int32], bits: int) -> ZeroPoints:
    """The convention of some rows of ``qzeros``, shape [G, N * bits / 32].

    Raises ValueError unless ``bits`` is in ``BITS``. Source of the layout: GPTQModel's packer
    (fields from the lowest bit on, across words at 3 bits).
    """
    if bits not in BITS:
        raise ValueError(f"zero points of {bits} bits: only {BITS} are packed")
    middle = 1 << (bits - 1)
    for convention, field in ((ZeroPoints.V1, middle - 1), (ZeroPoints.V2, middle)):
        if words.size and _is_filled(words, _filled_words(field, bits)):
            return convention
    return ZeroPoints.ASYMMETRIC


def _filled_words(field: int, bits: int) -> NDArray[np.uint32]:
    """The shortest run of words in which every field is ``field``."""
    length = math.lcm(bits, _WORD_BITS)
    stream = sum(field << shift for shift in range(0, length, bits))
    return np.frombuffer(stream.to_bytes(length // 8, "little"), dtype="<u4")


def _is_filled(words: NDArray[np.int32], run: NDArray[np.uint32]) -> bool:
    if words.shape[-1] % run.size:
        return False
    return bool((words.view(np.uint32).reshape(-1, run.size) == run).all())
