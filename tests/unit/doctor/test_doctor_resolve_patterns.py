"""Patterns of a config: the same answers as re, and an end to every try."""

from __future__ import annotations

import re
from contextlib import suppress
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.doctor.resolve.patterns import TIMEOUTS, PatternError, Patterns, UntriedPattern

NAMES = (
    "model.language_model.layers.12.linear_attn.in_proj_ba",
    "mtp.fc",
    "lm_head",
    "",
)
ORDINARY = (
    ".*mtp.*",
    r".*in_proj_(a|b|ba)$",
    r"^model\.language_model\.layers\.(1[0-5])\.",
    r".*layers\.\d{1,3}\.(?!self_attn)",
    "(?i)LM_HEAD",
    "lm_head",
    "[[]",
    "",
)


@pytest.mark.parametrize("pattern", ORDINARY)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_ordinary_patterns_are_answered_as_by_re(pattern: str) -> None:
    patterns = Patterns()
    for name in NAMES:
        assert patterns.search(pattern, name) is bool(re.search(pattern, name))
        assert patterns.match(pattern, name) is bool(re.match(pattern, name))
        assert patterns.fullmatch(pattern, name) is bool(re.fullmatch(pattern, name))


@pytest.mark.parametrize("pattern", ["(", "*x", "[a", r"\1", "(?P<a>x)(?P<a>"])
def test_a_broken_pattern_is_told_apart(pattern: str) -> None:
    patterns = Patterns()
    assert patterns.is_sound(pattern) is False
    for _ in range(2):
        with pytest.raises(PatternError):
            patterns.search(pattern, "x")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a|aa)+$",
        "(?:(?:(?:a?){1000}){1000}){1000}b",
        "(?:a{65535}){65535}",
        "a{99999999999999999999}",
        "(?R)",
        "(a|(?R)b)+",
        "a{e<=2}",
        "x" * 60_000,
    ],
)
def test_what_would_take_too_long_is_left_untried(pattern: str) -> None:
    patterns = Patterns()
    start = perf_counter()
    with pytest.raises(UntriedPattern) as caught:
        patterns.match(pattern, "a" * 80 + "!")
    assert len(str(caught.value)) < 200
    assert perf_counter() - start < 5
    assert patterns.search("fc$", "mtp.fc")


def test_all_tries_together_have_an_end() -> None:
    patterns = Patterns(seconds=0.0)
    with pytest.raises(UntriedPattern, match="too long"):
        patterns.search("fc", "mtp.fc")


def test_after_a_few_that_do_not_end_no_other_is_tried() -> None:
    patterns = Patterns()
    for number in range(TIMEOUTS):
        with pytest.raises(UntriedPattern):
            patterns.match(f"(a|aa)+{number}$", "a" * 80)
    with pytest.raises(UntriedPattern, match="rules' patterns"):
        patterns.search("fc", "mtp.fc")


def test_all_patterns_together_have_a_size() -> None:
    patterns = Patterns(size=10)
    assert patterns.search("mtp", "mtp.fc")
    with pytest.raises(UntriedPattern, match="too large"):
        patterns.search("language_model", "mtp.fc")


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="ab.*+?()[]{}|\\^$0123,:!=<>PRiLdw-", max_size=24),
    st.text(alphabet="ab.0", max_size=40),
)
def test_nothing_else_is_raised(pattern: str, name: str) -> None:
    with suppress(PatternError, UntriedPattern):
        assert Patterns().search(pattern, name) in (True, False)
