from __future__ import annotations

import pytest

from nybble.cli.tables import human_bytes, human_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (12_345_678, "12.3 MB"),
        (2_500_000_000, "2.50 GB"),
        (54_000_000_000, "54.00 GB"),
    ],
)
def test_bytes_in_powers_of_ten(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59, "59 s"),
        (89.9, "90 s"),
        (120, "2 min"),
        (3599, "60 min"),
        (5400, "1 h 30 min"),
        (7260, "2 h 01 min"),
    ],
)
def test_seconds_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text
