from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from nybble.core.errors import DataError
from nybble.data.documents import Document, PlainText
from nybble.data.order import permuted, shuffled
from nybble.data.rows import (
    PAD_ID,
    Rows,
    build_rows,
    packed_rows,
    padded_rows,
    refuse_overlap,
    row_hash,
    rows_of,
    truncated_rows,
)
from nybble.recipe.schema import Calibration, TextSource

# Computed with printf and sha256sum from the bytes of int64 1, 2, 262143, little end first.
HASH_OF_1_2_262143 = "e714738b7a0ecef26bf60ebb2807dc6bdcc3150c24e8e680351df51362420b7d"
SENTENCE = "quick brown fox jumps over the lazy dog documents are joined end to end"
WORDS = SENTENCE.split()


def _texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(count)]


def _jsonl(path: Path, records: Iterable[object]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def _source(tmp_path: Path, texts: Iterable[str]) -> str:
    return _jsonl(tmp_path / "texts.jsonl", ({"text": text} for text in texts))


def _calibration(source: str, **changes: Any) -> Calibration:
    return Calibration(source=source, **{"rows": 8, "seqlen": 16, **changes})


def _plain(texts: Iterable[str]) -> list[Document]:
    return [PlainText(f"{i}", text) for i, text in enumerate(texts)]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _shuffled_texts(texts: list[str], seed: int) -> list[str]:
    return [d.text for d in shuffled(_plain(texts), seed) if isinstance(d, PlainText)]


# Layouts


def test_truncate_takes_the_start_of_each_long_enough_document(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = _texts(40)
    rows = build_rows(_calibration(_source(tmp_path, texts), rows=20, seed=5), tokenizer)
    all_ids = [_ids(tokenizer, text) for text in _shuffled_texts(texts, 5)]
    expected = [ids[:16] for ids in all_ids if len(ids) >= 16][:20]
    assert rows.token_ids.dtype == torch.int64
    assert rows.token_ids.tolist() == expected
    assert rows.hashes == tuple(row_hash(row) for row in expected)
    assert rows.lengths.tolist() == [16] * 20
    assert bool(rows.mask().all())


def test_truncate_takes_a_document_of_exactly_seqlen_tokens() -> None:
    assert list(truncated_rows([[1, 2], [3, 4, 5], [], [6, 7, 8, 9]], 3)) == [[3, 4, 5], [6, 7, 8]]


def test_pack_is_the_concatenation_with_end_of_text_between(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = _texts(30)
    rows = build_rows(
        _calibration(_source(tmp_path, texts), rows=20, seed=5, layout="pack"), tokenizer
    )
    text = "<|endoftext|>".join(_shuffled_texts(texts, 5))
    assert rows.token_ids.flatten().tolist() == _ids(tokenizer, text)[: 20 * 16]


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12),
    st.integers(min_value=1, max_value=8),
)
def test_packing_loses_no_token(token_lists: list[list[int]], seqlen: int) -> None:
    joined: list[int] = []
    for ids in filter(None, token_lists):
        joined += [99, *ids] if joined else ids
    rows = list(packed_rows(iter(token_lists), seqlen, separator=99))
    assert [len(row) for row in rows] == [seqlen] * (len(joined) // seqlen)
    assert [token for row in rows for token in row] == joined[: len(rows) * seqlen]


def test_packing_reads_no_more_than_it_needs() -> None:
    lists = iter([[1, 2, 3], [4, 5], [6]])
    assert next(packed_rows(lists, 2, separator=0)) == [1, 2]
    assert list(lists) == [[4, 5], [6]]


def test_pad_takes_the_start_of_every_document_and_pads_on_the_right(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = _texts(40)
    rows = build_rows(
        _calibration(_source(tmp_path, texts), rows=25, seed=5, layout="pad", min_tokens=6),
        tokenizer,
    )
    all_ids = [_ids(tokenizer, text) for text in _shuffled_texts(texts, 5)]
    expected = [ids[:16] for ids in all_ids if len(ids) >= 6][:25]
    assert {6 <= len(ids) < 16 for ids in expected} == {True, False}
    assert [_real(row, int(n)) for row, n in zip(rows.token_ids, rows.lengths, strict=True)] == (
        expected
    )
    assert rows.hashes == tuple(row_hash(ids) for ids in expected)
    assert rows.token_ids.shape == (25, 16)
    assert rows.token_ids.dtype == rows.lengths.dtype == torch.int64
    assert rows.token_ids[~rows.mask()].unique().tolist() == [PAD_ID]
    assert torch.equal(rows.mask().sum(1), rows.lengths)


def _real(row: torch.Tensor, length: int) -> list[int]:
    ids: list[int] = row[:length].tolist()
    return ids


def test_pad_leaves_out_what_is_too_short_but_nothing_that_fills_a_row() -> None:
    lists = [[1], [1, 2], [1, 2, 3], [], [1, 2, 3, 4, 5]]
    assert list(padded_rows(lists, 4, min_tokens=2)) == [[1, 2], [1, 2, 3], [1, 2, 3, 4]]
    assert list(padded_rows(lists, 3, min_tokens=32)) == [[1, 2, 3], [1, 2, 3]]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), max_size=9))
def test_no_real_id_stands_behind_a_rows_length(id_lists: list[list[int]]) -> None:
    rows = rows_of(id_lists, 7)
    assert rows.token_ids.shape == (len(id_lists), 7)
    assert rows.token_ids.tolist() == [ids + [0] * (7 - len(ids)) for ids in id_lists]
    assert rows.mask().tolist() == [[i < len(ids) for i in range(7)] for ids in id_lists]


# Mixes


def _mix(tmp_path: Path, **changes: Any) -> Calibration:
    """Conversations, padded, and one long text, packed: three rows to one."""
    chats = [[{"role": "user", "content": text}] for text in _texts(40)]
    long_text = tmp_path / "long.txt"
    long_text.write_text(" ".join(_texts(60, seed=1)), encoding="utf-8")
    parts = (
        TextSource(
            source=_jsonl(tmp_path / "chats.jsonl", ({"messages": chat} for chat in chats)),
            weight=3,
        ),
        TextSource(source=str(long_text), weight=1, layout="pack"),
    )
    settings: dict[str, Any] = {"rows": 20, "seqlen": 24, "layout": "pad", "min_tokens": 8}
    return Calibration(mix=parts, **{**settings, **changes})


def test_a_mix_is_its_sources_rows_in_a_new_order(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    mix = _mix(tmp_path)
    rows = build_rows(mix, tokenizer)
    settings = {"seqlen": 24, "min_tokens": 8}
    chats, text = mix.mix
    expected = [
        build_rows(Calibration(source=chats.source, rows=15, layout="pad", **settings), tokenizer),
        build_rows(Calibration(source=text.source, rows=5, layout="pack", **settings), tokenizer),
    ]
    hashes = [digest for part in expected for digest in part.hashes]
    assert sorted(rows.hashes) == sorted(hashes)
    assert list(rows.hashes) == permuted(hashes, mix.seed) != hashes
    start = _ids(tokenizer, "<|im_start|>user\n", special=False)
    is_chat = [row[: len(start)] == start for row in rows.token_ids.tolist()]
    assert sum(is_chat) == 15
    assert is_chat[-5:] != [False] * 5, "the sources' rows are not one behind the other"
    real = [_real(row, int(n)) for row, n in zip(rows.token_ids, rows.lengths, strict=True)]
    assert rows.hashes == tuple(map(row_hash, real))
    assert 0 < sum(len(ids) < 24 for ids in real) <= 15
    assert all(len(ids) == 24 for ids, chat in zip(real, is_chat, strict=True) if not chat)


def test_a_mix_is_decided_by_its_seed_and_weights(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    first = build_rows(_mix(tmp_path), tokenizer)
    again = build_rows(_mix(tmp_path), tokenizer)
    assert again.hashes == first.hashes
    assert torch.equal(again.token_ids, first.token_ids)
    assert torch.equal(again.lengths, first.lengths)
    assert build_rows(_mix(tmp_path, seed=1), tokenizer).digest != first.digest
    chats, text = _mix(tmp_path).mix
    even = _mix(tmp_path).model_copy(
        update={"mix": (chats.model_copy(update={"weight": 1.0}), text)}
    )
    assert build_rows(even, tokenizer).digest != first.digest


def test_a_mix_of_one_source_is_that_source(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = _source(tmp_path, _texts(30))
    alone = build_rows(_calibration(source), tokenizer)
    mixed = Calibration(mix=(TextSource(source=source, weight=7),), rows=8, seqlen=16)
    assert build_rows(mixed, tokenizer).hashes == alone.hashes


def test_sources_that_hold_the_same_text_give_different_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    part = TextSource(source=_source(tmp_path, _texts(40)))
    rows = build_rows(Calibration(mix=(part, part), rows=12, seqlen=16), tokenizer)
    assert len(set(rows.hashes)) == 12


def test_a_source_of_a_mix_with_too_little_text_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    mix = _mix(tmp_path, rows=400)
    with pytest.raises(DataError) as caught:
        build_rows(mix, tokenizer)
    assert str(caught.value) == (
        f"asked for 300 rows of 24 tokens; {mix.mix[0].source} gave 40; "
        "use a longer text, fewer rows, a smaller weight, or a smaller min_tokens"
    )
    short = tmp_path / "short.txt"
    short.write_text("the quick fox", encoding="utf-8")
    parts = (mix.mix[0], TextSource(source=str(short), layout="pack"))
    with pytest.raises(DataError) as caught:
        build_rows(mix.model_copy(update={"mix": parts, "rows": 20}), tokenizer)
    assert str(caught.value) == (
        f"asked for 5 rows of 24 tokens; {short} gave 0; "
        "use a longer text, fewer rows, a smaller weight, or a shorter seqlen"
    )


# Order


def test_the_seed_decides_the_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = _source(tmp_path, _texts(60))

    def build(layout: str, seed: int) -> Rows:
        changes = {"seqlen": 40, "layout": layout, "seed": seed, "min_tokens": 4}
        return build_rows(_calibration(source, **changes), tokenizer)

    built = {
        (layout, seed): build(layout, seed)
        for layout in ("truncate", "pack", "pad")
        for seed in (1, 0, 2)
    }
    assert len({rows.digest for rows in built.values()}) == 9
    for (layout, seed), rows in built.items():
        again = build(layout, seed)
        assert again.hashes == rows.hashes
        assert torch.equal(again.token_ids, rows.token_ids)


# Tokens


def test_text_longer_than_the_tokenizers_limit_is_no_warning(
    tmp_path: Path, marking_tokenizer: PreTrainedTokenizerBase
) -> None:
    # The tokenizer says it once in its life, so this test takes a new one.
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        source = _source(tmp_path, [" ".join(WORDS * 9)])
        rows = build_rows(_calibration(source, rows=1, seqlen=64), marking_tokenizer)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert rows.token_ids.shape == (1, 64)
    assert marking_tokenizer.model_max_length == 32
    assert not records


def test_rows_of_conversations(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    chats = [[{"role": "user", "content": text}] for text in _texts(20)]
    source = _jsonl(tmp_path / "chats.jsonl", ({"messages": chat} for chat in chats))
    rows = build_rows(_calibration(source, rows=5), tokenizer)
    start = _ids(tokenizer, "<|im_start|>user\n", special=False)
    assert all(row[: len(start)] == start for row in rows.token_ids.tolist())


# Too little text


def test_too_few_long_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = _source(tmp_path, [f"{n} {' '.join(WORDS)} {n}" for n in range(7)] + ["fox"] * 3)
    with pytest.raises(DataError) as caught:
        build_rows(_calibration(source), tokenizer)
    assert str(caught.value) == (
        f"asked for 8 rows of 16 tokens; {source} gave 7; "
        'use a longer text, fewer rows, a shorter seqlen, layout = "pad", or layout = "pack"'
    )


@pytest.mark.parametrize("layout", ["truncate", "pack", "pad"])
def test_a_text_shorter_than_one_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, layout: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the quick fox", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        build_rows(_calibration(str(path), seqlen=2048, layout=layout), tokenizer)
    ways = {
        "truncate": 'fewer rows, a shorter seqlen, layout = "pad", or layout = "pack"',
        "pack": "fewer rows, or a shorter seqlen",
        "pad": "fewer rows, or a smaller min_tokens",
    }
    assert str(caught.value) == (
        f"asked for 8 rows of 2048 tokens; {path} gave 0; use a longer text, {ways[layout]}"
    )


def test_equal_rows_count_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [" ".join(WORDS), " ".join(WORDS) + " and more", "x " + " ".join(WORDS)]
    source = _source(tmp_path, texts)
    rows = build_rows(_calibration(source, rows=2), tokenizer)
    assert len(set(rows.hashes)) == 2
    with pytest.raises(DataError, match=r"gave 2 \(and 1 that were there already\); use"):
        build_rows(_calibration(source, rows=3), tokenizer)


# Hashes


def test_a_hash_is_that_of_little_endian_int64_bytes() -> None:
    assert row_hash([1, 2, 262143]) == HASH_OF_1_2_262143
    assert row_hash(torch.tensor([1, 2, 262143]).tolist()) == HASH_OF_1_2_262143


def test_a_hash_covers_the_real_ids_alone() -> None:
    ids = [1, 2, 262143]
    padded, full = rows_of([ids], 8), rows_of([ids], 3)
    assert padded.hashes == full.hashes == (HASH_OF_1_2_262143,)
    assert padded.digest == full.digest
    assert rows_of([[*ids, PAD_ID]], 8).digest != padded.digest


def test_the_digest_depends_on_every_row_and_their_order() -> None:
    lists = [[[1, 2], [3, 4]], [[3, 4], [1, 2]], [[1, 2]], [[1, 2, 3, 4]], [[1, 2], [3]]]
    assert len({rows_of(ids, 4).digest for ids in lists}) == 5
    # sha256sum of the one hash's hexadecimal digits
    one = Rows(torch.tensor([[1, 2, 262143]]), torch.tensor([3]), (HASH_OF_1_2_262143,))
    assert one.digest == "f21cb0ab94d0a1abf544442eca23bebe7a2f3e2a87e6a9c2d38ee34547c98736"


def test_evaluation_on_calibration_rows_is_refused() -> None:
    rows = rows_of([[1, 2], [3, 4], [5, 6]], 2)
    refuse_overlap(rows, [])
    refuse_overlap(rows, (row_hash([2, 1]),))
    with pytest.raises(DataError) as caught:
        refuse_overlap(rows, [row_hash([5, 6]), row_hash([3, 4]), "0"])
    assert str(caught.value) == (
        "2 of 3 evaluation rows were used in calibration (the first is row 1): "
        "evaluate on other text"
    )
    with pytest.raises(DataError, match="1 of 2 evaluation rows"):
        refuse_overlap(rows_of([[5, 6], [5]], 9), rows.hashes)
