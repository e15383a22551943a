from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import tiny_tokenizer

from nybble.core.errors import DataError
from nybble.data.documents import Conversation, Document
from nybble.data.sources import STDLIB_SOURCES, open_source
from nybble.demo import bundled_model
from nybble.eval.classes import BUNDLED, ClassTexts, bundled_classes, given_classes
from nybble.eval.texts import open_tokenizer

TEXTS = resources.files("nybble") / "assets" / "texts"
FILES = {name: file for name, file in BUNDLED.items() if file not in STDLIB_SOURCES}


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Any]:
    """With a chat template that knows thinking and tools."""
    with bundled_model() as folder:
        yield open_tokenizer(folder)


def documents(file: str) -> list[Document]:
    with resources.as_file(TEXTS / file) as path:
        return list(open_source(str(path)))


@pytest.fixture(scope="module")
def default(tokenizer: Any) -> ClassTexts:
    """What the command line asks for by itself."""
    return bundled_classes(tokenizer, windows=8, seqlen=512)


def test_all_five_classes_fill_the_default(default: ClassTexts) -> None:
    assert [text.name for text in default.texts] == ["code", "prose", "maths", "chat", "tools"]
    assert [text.source for text in default.texts] == list(BUNDLED.values())
    assert all(tuple(text.rows.token_ids.shape) == (8, 512) for text in default.texts)
    assert default.notes == ()


def test_windows_are_what_the_class_is_named_for(tokenizer: Any, default: ClassTexts) -> None:
    shown = {text.name: tokenizer.decode(text.rows.token_ids.flatten()) for text in default.texts}
    assert "def " in shown["code"]
    assert "<tool_call>" in shown["tools"]
    assert "<|im_start|>assistant" in shown["chat"]
    assert "Proof." in shown["maths"]


def test_a_short_text_gives_what_it_has(tokenizer: Any) -> None:
    found = bundled_classes(tokenizer, windows=20, seqlen=512)
    prose = found.texts[1].rows.token_ids
    assert 8 <= len(prose) < 20
    assert prose.shape[1] == 512
    assert f"prose is shorter than asked for: {len(prose)} x 512" in found.notes


def test_a_text_of_less_than_one_window_is_one_window(tokenizer: Any) -> None:
    found = bundled_classes(tokenizer, windows=2, seqlen=30_000)
    shapes = {text.name: tuple(text.rows.token_ids.shape) for text in found.texts}
    assert shapes["code"] == (2, 30_000)
    assert shapes["prose"][0] == 1
    assert 4096 <= shapes["prose"][1] < 30_000
    assert len(found.notes) == 4


def test_what_there_is_counts_separators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"text": "token head state"}\n{"text": ""}\n{"text": "token head state"}\n')
    monkeypatch.setattr("nybble.eval.classes.BUNDLED", {"own": str(own)})
    tokens = 2 * len(tiny_tokenizer()("token head state")["input_ids"])
    assert bundled_classes(tiny_tokenizer(), windows=1, seqlen=tokens + 1).notes == ()
    found = bundled_classes(tiny_tokenizer(), windows=1, seqlen=tokens + 2)
    assert found.notes == (f"own is shorter than asked for: 1 x {tokens + 1}",)


def test_without_a_chat_template_conversations_are_left_out() -> None:
    found = bundled_classes(tiny_tokenizer(), windows=2, seqlen=32)
    assert [text.name for text in found.texts] == ["code", "prose", "maths"]
    assert [note.partition(":")[0] for note in found.notes] == [
        "chat is left out",
        "tools is left out",
    ]
    assert all("no chat template" in note and "/" not in note for note in found.notes)


def test_a_template_that_refuses_tools_costs_that_class_alone(make_tiny: Any) -> None:
    folder = make_tiny()
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    found = bundled_classes(open_tokenizer(folder), windows=2, seqlen=32)
    assert [text.name for text in found.texts] == ["code", "prose", "maths", "chat"]
    assert "no tools" in found.notes[0]


def test_a_tokenizer_that_suits_no_class_is_refused(make_tiny: Any) -> None:
    tokenizer = open_tokenizer(make_tiny())
    tokenizer.eos_token = None
    tokenizer.get_vocab = dict  # nothing to put between documents
    with pytest.raises(DataError, match="no bundled text suits"):
        bundled_classes(tokenizer, windows=2, seqlen=32)


def test_given_classes_keep_their_names_and_order(text_file: Path) -> None:
    sources = {"words": str(text_file), "code": "stdlib-heldout"}
    found = given_classes(sources, tiny_tokenizer(), windows=2, seqlen=32)
    assert [(text.name, text.source) for text in found.texts] == list(sources.items())


def test_a_given_class_is_not_cut_short_without_a_word(text_file: Path) -> None:
    with pytest.raises(DataError, match="asked for 9999 rows of 32 tokens"):
        given_classes({"words": str(text_file)}, tiny_tokenizer(), windows=9999, seqlen=32)


@pytest.mark.parametrize("file", FILES.values())
def test_a_bundled_text_is_small_and_can_be_read(file: str) -> None:
    assert 10_000 < len((TEXTS / file).read_bytes()) < 25_000
    assert documents(file)


def test_conversations_show_what_their_class_is_about() -> None:
    for file, roles in (("chat.jsonl", {"user"}), ("tools.jsonl", {"user", "tool"})):
        found = documents(file)
        messages = [m for d in found if isinstance(d, Conversation) for m in d.messages]
        assert roles <= {m["role"] for m in messages}
        assert any(m.get("reasoning_content") for m in messages)
    tools = documents("tools.jsonl")
    for document in tools:
        assert isinstance(document, Conversation)
        assert document.tools is not None
        offered = {tool["function"]["name"] for tool in document.tools}
        calls = [c["function"] for m in document.messages for c in m.get("tool_calls", ())]
        assert calls
        assert {c["name"] for c in calls} <= offered
        for earlier, later in zip(document.messages, document.messages[1:], strict=False):
            if earlier.get("tool_calls"):
                assert later["role"] == "tool", document.where
