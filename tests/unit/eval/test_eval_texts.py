from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import random_text, tiny_tokenizer, write_json

from nybble.core.errors import CheckpointError, DataError
from nybble.data.rows import Rows
from nybble.eval.texts import (
    Text,
    open_tokenizer,
    refuse_calibration_text,
    tokenizer_sha256,
    windows_of,
)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 170,000 tokens."""
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text(random_text(60_000, seed=3), encoding="utf-8")
    return path


def test_64_windows_of_2048_tokens_are_131008_positions(long_text: Path) -> None:
    text = Text(str(long_text))
    assert (text.windows, text.seqlen) == (64, 2048)
    rows = windows_of(text, tiny_tokenizer())
    assert rows.token_ids[:, 1:].numel() == 131_008
    assert rows.lengths.tolist() == [2048] * 64


def test_windows_follow_one_another(text_file: Path) -> None:
    ids = tiny_tokenizer()(text_file.read_text(), add_special_tokens=False)["input_ids"]
    rows = windows_of(Text(str(text_file), windows=5, seqlen=16), tiny_tokenizer())
    assert rows.token_ids.flatten().tolist() == ids[:80]


def test_too_little_text_is_refused(text_file: Path) -> None:
    with pytest.raises(DataError, match=r"asked for 64 rows of 2048 tokens; .* gave \d\b"):
        windows_of(Text(str(text_file)), tiny_tokenizer())


def test_a_tokenizers_hash_is_of_its_files(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_base / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_sha256(tmp_path) == tokenizer_sha256(tiny_base)
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content + " ")
    assert tokenizer_sha256(tmp_path) != tokenizer_sha256(tiny_base)
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocab.json")
    assert tokenizer_sha256(tmp_path) != tokenizer_sha256(tiny_base)


BROKEN_TOKENIZERS = {
    "none": None,
    "no object": "[]",
    "no JSON": "{",
    "an unknown kind": '{"version": "1.0", "model": {"type": "Magic"}}',
    "of another shape": '{"added_tokens": 3}',
}


@pytest.mark.parametrize("content", BROKEN_TOKENIZERS.values(), ids=BROKEN_TOKENIZERS)
def test_a_tokenizer_that_cannot_be_read_is_one_line(
    tiny_base: Path, tmp_path: Path, content: str | None
) -> None:
    shutil.copy(tiny_base / "config.json", tmp_path)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read") as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def rows(text_file: Path) -> Rows:
    return windows_of(Text(str(text_file), windows=4, seqlen=16), tiny_tokenizer())


def test_a_window_used_in_calibration_is_refused(rows: Rows, tmp_path: Path) -> None:
    write_json(tmp_path / "nybble.json", {"calibration": {"row_sha256": ["0", rows.hashes[2]]}})
    with pytest.raises(DataError, match=r"1 of 4 .* \(the first is row 2\).*--allow-overlap"):
        refuse_calibration_text(tmp_path, rows)


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"calibration": None},
        {"calibration": [1]},
        {"calibration": {}},
        {"calibration": {"row_sha256": "abc"}},
        {"calibration": {"row_sha256": []}},
        {"calibration": {"row_sha256": [1, None, True]}},
        {"calibration": {"row_sha256": [["a"], {"b": 1}]}},
    ],
    ids=json.dumps,
)
def test_a_manifest_without_such_a_window_is_none(
    rows: Rows, tmp_path: Path, manifest: dict[str, Any]
) -> None:
    write_json(tmp_path / "nybble.json", manifest)
    refuse_calibration_text(tmp_path, rows)


def test_without_a_manifest_nothing_is_known(rows: Rows, tmp_path: Path) -> None:
    refuse_calibration_text(tmp_path, rows)
