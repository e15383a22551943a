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
from nybble.data import rows as rows_module
from nybble.data.documents import Conversation, Document, PlainText
from nybble.data.rows import (
    Rows,
    build_rows,
    end_of_text_id,
    packed_rows,
    refuse_overlap,
    row_hash,
    shuffled,
    tokenized,
    truncated_rows,
)
from nybble.recipe.schema import Calibration

# Computed with printf and sha256sum from the bytes of int64 1, 2, 262143, little end first.
HASH_OF_1_2_262143 = "e714738b7a0ecef26bf60ebb2807dc6bdcc3150c24e8e680351df51362420b7d"
SENTENCE = "quick brown fox jumps over the lazy dog documents are joined end to end"
WORDS = SENTENCE.split()
CHAT = [{"role": "user", "content": "the quick fox"}, {"role": "assistant", "content": "jumps"}]


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


def test_documents_are_parted_by_end_of_text_or_else_eos(
    tokenizer: PreTrainedTokenizerBase, bare_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert end_of_text_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    with pytest.raises(DataError, match=r"no <\|endoftext\|> and no eos token"):
        end_of_text_id(bare_tokenizer)
    bare_tokenizer.eos_token = "b"
    assert end_of_text_id(bare_tokenizer) == 1


# Order


def test_the_seed_decides_the_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = _source(tmp_path, _texts(60))
    built = {
        (layout, seed): build_rows(_calibration(source, layout=layout, seed=seed), tokenizer)
        for layout in ("truncate", "pack")
        for seed in (1, 0, 2)
    }
    assert len({rows.digest for rows in built.values()}) == 6
    for (layout, seed), rows in built.items():
        again = build_rows(_calibration(source, layout=layout, seed=seed), tokenizer)
        assert again.hashes == rows.hashes
        assert torch.equal(again.token_ids, rows.token_ids)


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
    monkeypatch.setattr(rows_module, name, bound)
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
    monkeypatch.setattr(rows_module, "BUFFER_CHARACTERS", 50)
    chats = [Conversation(str(i), ({"role": "user", "content": "x" * 60},)) for i in range(4)]
    assert list(shuffled(chats, 0)) == chats


# Tokens


def test_text_longer_than_the_tokenizers_limit_is_no_warning(
    tmp_path: Path, marking_tokenizer: PreTrainedTokenizerBase
) -> None:
    # The tokenizer says it once in its life, so this test takes a new one.
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign,assignment]
    logging.getLogger("transformers").addHandler(handler)
    try:
        source = _source(tmp_path, [" ".join(WORDS * 9)])
        rows = build_rows(_calibration(source, rows=1, seqlen=64), marking_tokenizer)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert rows.token_ids.shape == (1, 64)
    assert marking_tokenizer.model_max_length == 32
    assert not records


def test_plain_text_gets_the_tokenizers_own_special_tokens(
    tokenizer: PreTrainedTokenizerBase, marking_tokenizer: PreTrainedTokenizerBase
) -> None:
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    plain = tokenized(PlainText("", "the fox"), marking_tokenizer)
    assert plain == [start, *_ids(tokenizer, "the fox")]
    chat = Conversation("", tuple(CHAT))
    assert tokenized(chat, marking_tokenizer) == tokenized(chat, tokenizer)


def test_a_conversation_is_rendered_with_thinking_and_tools(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    call = {"function": {"name": "f", "arguments": {"city": "Rome"}}}
    messages = (
        {"role": "user", "content": "weather"},
        {"role": "assistant", "content": None, "reasoning_content": "ask", "tool_calls": [call]},
        {"role": "tool", "content": "fine"},
    )
    ids = tokenized(Conversation("", messages, ({"name": "f"},)), tokenizer)
    assert tokenizer.decode(ids) == (
        '<|im_start|>system\n[{"name": "f"}]<|im_end|>\n'
        "<|im_start|>user\nweather<|im_end|>\n"
        "<|im_start|>assistant\n<think>ask</think>[city=Rome]<|im_end|>\n"
        "<|im_start|>tool\nfine<|im_end|>\n"
    )


def test_rows_of_conversations(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    chats = [[{"role": "user", "content": text}] for text in _texts(20)]
    source = _jsonl(tmp_path / "chats.jsonl", ({"messages": chat} for chat in chats))
    rows = build_rows(_calibration(source, rows=5), tokenizer)
    start = _ids(tokenizer, "<|im_start|>user\n", special=False)
    assert all(row[: len(start)] == start for row in rows.token_ids.tolist())


def _refusal(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    with pytest.raises(DataError) as caught:
        tokenized(document, tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_conversation_needs_a_chat_template(bare_tokenizer: PreTrainedTokenizerBase) -> None:
    assert _refusal(Conversation("a.jsonl: line 3", tuple(CHAT)), bare_tokenizer) == (
        "a.jsonl: line 3: a conversation, and the tokenizer has no chat template: give plain text"
    )


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "narrator", "content": "once"}, "no narrators here"),
        (
            {"role": "user", "content": "", "tool_calls": [{"function": {"arguments": "no"}}]},
            "Can only get item pairs from a mapping.",
        ),
        ({"role": "user", "content": "", "tool_calls": [{}]}, ""),
    ],
)
def test_a_conversation_that_the_template_refuses(
    tokenizer: PreTrainedTokenizerBase, message: dict[str, Any], reason: str
) -> None:
    error = _refusal(Conversation("a.jsonl: line 3", (message,)), tokenizer)
    assert error.startswith(f"a.jsonl: line 3: the tokenizer's chat template refuses it: {reason}")


def test_half_a_surrogate_pair_is_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "fox\ud800"
    problem = "character 4 is half of a surrogate pair: repair the text or take it out"
    assert _refusal(PlainText("a.jsonl: line 3", text), tokenizer) == f"a.jsonl: line 3: {problem}"
    chat = Conversation("a.jsonl: line 3", ({"role": "user", "content": text},))
    assert "half of a surrogate pair" in _refusal(chat, tokenizer)


# Too little text


def test_too_few_long_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = _source(tmp_path, [f"{n} {' '.join(WORDS)} {n}" for n in range(7)] + ["fox"] * 3)
    with pytest.raises(DataError) as caught:
        build_rows(_calibration(source), tokenizer)
    assert str(caught.value) == (
        f"asked for 8 rows of 16 tokens; {source} gave 7; "
        'use a longer text, fewer rows, a shorter seqlen, or layout = "pack"'
    )


@pytest.mark.parametrize("layout", ["truncate", "pack"])
def test_a_text_shorter_than_one_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, layout: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the quick fox", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        build_rows(_calibration(str(path), seqlen=2048, layout=layout), tokenizer)
    ways = {
        "truncate": 'fewer rows, a shorter seqlen, or layout = "pack"',
        "pack": "fewer rows, or a shorter seqlen",
    }
    assert str(caught.value) == (
        f"asked for 8 rows of 2048 tokens; {path} gave 0; use a longer text, {ways[layout]}"
    )


def test_equal_rows_count_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [" ".join(WORDS), " ".join(WORDS) + " and more", "x " + " ".join(WORDS)]
    source = _source(tmp_path, texts)
    rows = build_rows(_calibration(source, rows=2), tokenizer)
    assert len(set(rows.hashes)) == 2
    with pytest.raises(DataError, match=r"gave 2 \(and 1 that it had given before\); use"):
        build_rows(_calibration(source, rows=3), tokenizer)


# Hashes


def test_a_hash_is_that_of_little_endian_int64_bytes() -> None:
    assert row_hash([1, 2, 262143]) == HASH_OF_1_2_262143
    assert row_hash(torch.tensor([1, 2, 262143]).tolist()) == HASH_OF_1_2_262143


def test_the_digest_depends_on_every_row_and_their_order() -> None:
    lists = [[[1, 2], [3, 4]], [[3, 4], [1, 2]], [[1, 2]], [[1, 2, 3, 4]]]
    digests = {Rows(torch.tensor(ids), tuple(map(row_hash, ids))).digest for ids in lists}
    assert len(digests) == 4
    # sha256sum of the one hash's hexadecimal digits
    one = Rows(torch.tensor([[1, 2, 262143]]), (HASH_OF_1_2_262143,))
    assert one.digest == "f21cb0ab94d0a1abf544442eca23bebe7a2f3e2a87e6a9c2d38ee34547c98736"


def test_evaluation_on_calibration_rows_is_refused() -> None:
    ids = [[1, 2], [3, 4], [5, 6]]
    rows = Rows(torch.tensor(ids), tuple(map(row_hash, ids)))
    refuse_overlap(rows, [])
    refuse_overlap(rows, (row_hash([2, 1]),))
    with pytest.raises(DataError) as caught:
        refuse_overlap(rows, [row_hash([5, 6]), row_hash([3, 4]), "0"])
    assert str(caught.value) == (
        "2 of 3 evaluation rows were used in calibration (the first is row 1): "
        "evaluate on other text"
    )
