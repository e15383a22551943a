from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.data import order as order_module
from nybble.data.documents import Conversation, Document, PlainText
from nybble.data.order import apportioned, permuted, shuffled


def _plain(texts: Iterable[str]) -> list[Document]:
    return [PlainText(f"{i}", text) for i, text in enumerate(texts)]


def _shuffled_texts(texts: list[str], seed: int) -> list[str]:
    return [d.text for d in shuffled(_plain(texts), seed) if isinstance(d, PlainText)]


# Shares, worked out by hand


@pytest.mark.parametrize(
    ("rows", "weights", "expected"),
    [
        (512, [3, 1], [384, 128]),
        (128, [1.0], [128]),
        (10, [3, 1], [8, 2]),  # 7.5 and 2.5: equal remainders, the first one wins
        (10, [1, 3], [3, 7]),
        (10, [1, 1, 1], [4, 3, 3]),
        (100, [0.1, 0.2, 0.7], [10, 20, 70]),
        (5, [0.3, 0.1, 0.1], [3, 1, 1]),
        (7, [4, 2, 3], [3, 2, 2]),  # 3.11, 1.56 and 2.33
        (4, [1000, 1, 1], [2, 1, 1]),  # 3.99, 0.004, 0.004: nobody gets nothing
        (6, [100, 60, 1], [3, 2, 1]),  # 3.73, 2.24, 0.04; then 5 rows: 3.13 and 1.88
        # 0.1, 1.1 and 8.8 of 10; then 1, and 9 rows: 1.0 and 8.0.
        (10, [1, 11, 88], [1, 1, 8]),
        (3, [1e9, 1, 1e-9], [1, 1, 1]),
    ],
)
def test_rows_are_shared_by_largest_remainder(
    rows: int, weights: list[float], expected: list[int]
) -> None:
    assert apportioned(rows, weights) == expected


@given(
    st.lists(st.floats(min_value=1e-3, max_value=1e3), min_size=1, max_size=8),
    st.integers(min_value=0, max_value=300),
)
def test_all_rows_are_shared_and_nobody_gets_nothing(weights: list[float], more: int) -> None:
    rows = len(weights) + more
    counts = apportioned(rows, weights)
    assert sum(counts) == rows
    assert min(counts) >= 1
    total = sum(weights)
    if all(rows * weight >= total for weight in weights):  # the quota rule
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - rows * weight / total) < 1 + 1e-6


# Order


def test_a_permutation_is_the_same_on_every_machine() -> None:
    assert "".join(permuted("0123456789", 42)) == "4526039871"


@given(st.lists(st.integers(), max_size=30), st.integers(min_value=0, max_value=2**32 - 1))
def test_a_permutation_loses_nothing(items: list[int], seed: int) -> None:
    before = list(items)
    assert sorted(permuted(items, seed)) == sorted(items)
    assert items == before


def test_the_order_is_the_same_on_every_machine() -> None:
    texts = [str(number) for number in range(10)]
    assert "".join(_shuffled_texts(texts, 42)) == "4526039871"


def test_a_small_source_is_permuted_as_a_whole() -> None:
    texts = [str(number) for number in range(500)]
    out = _shuffled_texts(texts, 0)
    assert sorted(out) == sorted(texts)
    moved = [abs(int(text) - index) for index, text in enumerate(out)]
    assert 120 < sum(moved) / len(moved) < 210  # a uniform permutation: 500 / 3


@pytest.mark.parametrize(("name", "bound"), [("BUFFER_DOCUMENTS", 5), ("BUFFER_CHARACTERS", 15)])
def test_a_large_source_is_shuffled_through_a_bounded_buffer(
    monkeypatch: pytest.MonkeyPatch, name: str, bound: int
) -> None:
    monkeypatch.setattr(order_module, name, bound)
    read = 0

    def counted() -> Iterable[Document]:
        nonlocal read
        for document in _plain(f"{number:03}" for number in range(100)):
            read += 1
            yield document

    out: list[str] = []
    for document in shuffled(counted(), 0):
        assert read - len(out) <= 6
        assert isinstance(document, PlainText)
        out.append(document.text)
    assert sorted(out) == [f"{number:03}" for number in range(100)]
    assert out != sorted(out)


def test_conversations_fill_the_buffer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "BUFFER_CHARACTERS", 50)
    chats = [Conversation(str(i), ({"role": "user", "content": "x" * 60},)) for i in range(4)]
    assert list(shuffled(chats, 0)) == chats
