from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nybble.checkpoint.sidecar import copy_sidecars, write_config
from nybble.core.errors import CheckpointError, OutputError

COPIED = [
    "LICENSE",
    "NOTICE.md",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.bpe",
    "vocab.json",
]
LEFT = [
    ".hidden.json",
    "README.md",
    "README.txt",
    "adapter_config.json",
    "config.json",
    "figure.png",
    "hf_quant_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "modeling_x.py",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "quantization_config.json",
    "quantize_config.json",
    "tokenizer.pkl",
    "tokenizer.py",
    "vocab.pt",
]


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    return source, target


def test_copies_what_the_rule_says(folders: tuple[Path, Path]) -> None:
    source, target = folders
    for name in COPIED + LEFT:
        (source / name).write_bytes(b"\xff\r\n\0" + name.encode())
    (source / "tokenizer.json.d").mkdir()
    (source / "folder.json").mkdir()
    os.mkfifo(source / "pipe.json")
    assert copy_sidecars(source, target) == COPIED
    assert sorted(path.name for path in target.iterdir()) == COPIED
    for name in COPIED:
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_additional_templates(folders: tuple[Path, Path]) -> None:
    source, target = folders
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ x }}")
    (templates / "evil.py").write_text("")
    assert copy_sidecars(source, target) == ["additional_chat_templates/tool_use.jinja"]
    assert [path.name for path in target.rglob("*.*")] == ["tool_use.jinja"]


def test_links_are_copied_as_files(folders: tuple[Path, Path]) -> None:
    source, target = folders
    blob = source.parent / "blob"
    blob.write_text("{}")
    (source / "tokenizer.json").symlink_to(blob)
    assert copy_sidecars(source, target) == ["tokenizer.json"]
    assert not (target / "tokenizer.json").is_symlink()
    assert (target / "tokenizer.json").read_text() == "{}"


def test_a_link_to_nowhere(folders: tuple[Path, Path]) -> None:
    source, target = folders
    (source / "tokenizer.json").symlink_to(source / "gone")
    message = refusal(lambda: copy_sidecars(source, target))
    assert "tokenizer.json: No such file" in message


def test_missing_source(folders: tuple[Path, Path]) -> None:
    message = refusal(lambda: copy_sidecars(folders[0] / "gone", folders[1]))
    assert "gone: No such file" in message


def test_target_that_cannot_be_written(folders: tuple[Path, Path]) -> None:
    source, target = folders
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(OutputError, match=r"^cannot write [^\n]*tokenizer.json: No such[^\n]*\Z"):
        copy_sidecars(source, target / "gone")
    (source / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates").write_text("")
    with pytest.raises(OutputError, match=r"^cannot write [^\n]*templates: File exists\Z"):
        copy_sidecars(source, target)


def test_write_config(tmp_path: Path) -> None:
    config = {"z": 1, "a": {"y": float("inf"), "b": "\u00e9"}}
    write_config(tmp_path, config, {"bits": 4})
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert text.startswith('{\n  "z": 1,\n')
    written = json.loads(text)
    assert list(written) == ["z", "a", "quantization_config"]
    assert written == {**config, "quantization_config": {"bits": 4}}
    assert "quantization_config" not in config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_null_quantization_config_is_none(tmp_path: Path) -> None:
    write_config(tmp_path, {"quantization_config": None, "a": 1}, {"bits": 4})
    written = json.loads((tmp_path / "config.json").read_text())
    assert list(written.items()) == [("quantization_config", {"bits": 4}), ("a", 1)]


@pytest.mark.parametrize("existing", [{}, {"bits": 8}, "awq"])
def test_already_quantized(tmp_path: Path, existing: object) -> None:
    config = {"quantization_config": existing}
    assert "already quantized" in refusal(lambda: write_config(tmp_path, config, {}))
    assert not list(tmp_path.iterdir())


def test_config_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"^cannot write [^\n]*config.json: No such[^\n]*\Z"):
        write_config(tmp_path / "gone", {}, {})
