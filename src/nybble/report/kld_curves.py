"""What figures of divergences show, as numbers: shares, quantiles, means with their errors.

Knows nothing of how they were measured: an array per checkpoint, windows by positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SMALLEST, LARGEST = 1e-30, 1e30
"""Beyond them, logarithmic axes overflow."""
_MOST_BINS = 60


@dataclass(frozen=True, eq=False)
class Divergence:
    """One checkpoint's."""

    name: str
    weight_bytes: int
    kld: Array
    """[windows, positions], nats; a position that is not a number or infinite is left out."""

    @cached_property
    def known(self) -> Array:
        """Like ``kld``, NaN where it is not finite."""
        return np.where(np.isfinite(self.kld), self.kld, np.nan)

    @property
    def mean(self) -> tuple[float, float]:
        """And its standard error."""
        return mean_by_window(self.known)


@dataclass(frozen=True)
class Floor:
    """The base against itself, computed in another way."""

    how: str
    mean: float
    median: float
    p99: float


def mean_by_window(values: Array) -> tuple[float, float]:
    """Mean over [windows, positions], and its standard error, from the means of the windows.

    The error is NaN with one window, and both are where a value is.
    """
    means = values.mean(axis=1)
    spread = float(means.std(ddof=1)) if len(means) > 1 else math.nan
    return float(means.mean()), spread / math.sqrt(len(means))


def histogram_bins(found: Sequence[Divergence]) -> Array | None:
    """Edges, evenly spaced in the logarithm; None if nothing is above zero.

    The lowest half percent of any checkpoint does not stretch them: rounding decides how low it
    is.
    """
    above = [one.known[drawable(one.known) > 0] for one in found]
    above = [values for values in above if len(values)]
    if not above:
        return None
    low = min(float(np.quantile(values, 0.005)) for values in above)
    high = max(float(values.max()) for values in above)
    count = min(_MOST_BINS, 5 + math.isqrt(max(map(len, above))))
    return np.geomspace(*wide(low, high), count + 1)


def shares(one: Divergence, bins: Array) -> Array:
    """Percent of all positions in each bin; the first holds all that is lower, too."""
    values = one.known[~np.isnan(one.known)]
    counts, _ = np.histogram(values.clip(min=bins[0]), bins)
    return np.asarray(100 * counts / one.kld.size)


def quantiles(one: Divergence, at: Array) -> Array:
    """By linear interpolation; positions that are not finite count as the largest."""
    ordered = np.sort(one.known, axis=None)  # NaN last
    return np.interp(at * (len(ordered) - 1), np.arange(len(ordered)), ordered)


@dataclass(frozen=True, eq=False)
class Depths:
    """Means over stretches of a window, each 1.4 times as long as the one before it."""

    tokens: Array
    """How many the models were given, mean of each stretch."""
    means: Array
    errors: Array


def by_depth(one: Divergence) -> Depths:
    """How the divergence changes with what the models have read."""
    count = one.kld.shape[1]
    steps = (round(2 ** (step / 2)) for step in range(2 * count.bit_length() + 1))
    edges = sorted({edge for edge in steps if edge <= count} | {count + 1})
    found = [mean_by_window(one.known[:, first - 1 : last - 1]) for first, last in pairwise(edges)]
    return Depths(
        tokens=np.array([(first + last - 1) / 2 for first, last in pairwise(edges)]),
        means=np.array([mean for mean, _ in found]),
        errors=np.array([error for _, error in found]),
    )


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that are lower than every smaller one."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def wide(low: float, high: float) -> tuple[float, float]:
    """At least a range in which two ticks lie."""
    stretch = max(1.0, math.sqrt(8 * low / high))
    return low / stretch, high * stretch


def drawable(values: Array) -> Array:
    return np.where((values >= SMALLEST) & (values <= LARGEST), values, np.nan)
