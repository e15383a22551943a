"""Regular expressions that a checkpoint's config brings along, tried without trusting them."""

from __future__ import annotations

import math
import re
import warnings
from time import thread_time
from typing import Any

import regex  # type: ignore[import-untyped]

SECONDS = 3.0
"""Of this thread: what all tries of one ``Patterns`` may take together, a million ordinary ones."""
TIMEOUTS = 5
"""How many patterns may run into a try's end before no other is tried."""
SIZE = 50_000
"""How long all its patterns may be together, counted repeats written out:
0.1 to 0.5 kB a character once compiled."""
_TRY_SECONDS = 0.25
"""On the clock: an ordinary try takes microseconds, but the machine may be busy."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_COUNTS = re.compile(r"\d*,?\d*")


class PatternError(ValueError):
    """A pattern that does not compile: the engines raise ``re.error``, or skip it."""


class UntriedPattern(ValueError):
    """A pattern that may be sound, but would take too long, or uses syntax beyond ``re``'s."""


class Patterns:
    """Compiles each pattern once and tries it within a budget; one per checkpoint.

    Matches as vLLM does, whose ``re`` is the package ``regex``; on what the standard ``re`` accepts
    the two agree. ``regex`` alone can stop a match that backtracks without end, but it writes
    counted repeats out in memory, so these are counted first. The tries raise PatternError or
    UntriedPattern, and nothing else, whatever the pattern.
    """

    def __init__(self, seconds: float = SECONDS, size: int = SIZE) -> None:
        self._seconds = seconds
        self._size = float(size)
        self._timeouts = TIMEOUTS
        self._known: dict[str, Any] = {}

    def search(self, pattern: str, text: str) -> bool:
        """Whether the pattern is found anywhere."""
        return self._tried("search", pattern, text)

    def match(self, pattern: str, text: str) -> bool:
        """Whether it is found at the start."""
        return self._tried("match", pattern, text)

    def fullmatch(self, pattern: str, text: str) -> bool:
        """Whether it is the whole."""
        return self._tried("fullmatch", pattern, text)

    def is_sound(self, pattern: str) -> bool:
        """Whether it compiles, for engines that skip what does not. Raises UntriedPattern."""
        compiled = self._known_as(pattern)
        if isinstance(compiled, UntriedPattern):
            raise compiled.with_traceback(None)
        return not isinstance(compiled, PatternError)

    def _tried(self, how: str, pattern: str, text: str) -> bool:
        start = thread_time()
        compiled = self._known_as(pattern)
        if isinstance(compiled, ValueError):
            raise compiled.with_traceback(None)
        if self._seconds <= 0 or not self._timeouts:
            raise UntriedPattern("the rules' patterns take too long to try")
        try:
            return getattr(compiled, how)(text, timeout=_TRY_SECONDS) is not None
        except (TimeoutError, MemoryError, RecursionError):
            self._timeouts -= 1
            self._known[pattern] = UntriedPattern(f"{_short(pattern)} takes too long to try")
            raise self._known[pattern] from None
        finally:
            self._seconds -= thread_time() - start

    def _known_as(self, pattern: str) -> Any:
        if pattern not in self._known:
            self._known[pattern] = self._compiled(pattern)
        return self._known[pattern]

    def _compiled(self, pattern: str) -> Any:
        """The compiled pattern, or the ValueError to raise instead."""
        size = _written_out(pattern)
        if size > self._size:
            return UntriedPattern(f"{_short(pattern)} is too large to try")
        self._size -= size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                compiled = regex.compile(pattern, cache_pattern=False)
            except (regex.error, ValueError, OverflowError, RecursionError, KeyError) as error:
                return PatternError(f"{_short(pattern)}: {error}")
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError):
                return UntriedPattern(f"{_short(pattern)} is not in the syntax of re")
        return compiled


def _written_out(pattern: str) -> float:
    """At least the length of a pattern with its counted repeats written out; inf: fuzzy ones."""
    size: float = max(len(pattern), 1)
    for braces in _BRACES.finditer(pattern):
        if _COUNTS.fullmatch(braces[1]) is None or len(braces[1]) > 8:
            return math.inf
        size *= max(1, *(int(count) for count in re.findall(r"\d+", braces[1])), 0)
    return size


def _short(pattern: str) -> str:
    shown = pattern if len(pattern) <= 60 else f"{pattern[:57]}..."
    return f"pattern {shown!r}"
