"""The files of a checkpoint that are not weights: tokenizer, templates, processors, licence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from nybble.checkpoint.index import CONFIG_NAME
from nybble.core.atomic import write_bytes_atomic
from nybble.core.errors import CheckpointError, OutputError

_TEMPLATE_FOLDER = "additional_chat_templates"
_SUFFIXES = frozenset({".json", ".txt", ".jinja", ".model", ".tiktoken"})
_PREFIXES = ("tokenizer", "vocab", "merges", "license", "licence", "notice", "copying")
# Never copied, whatever the name starts with.
_NEVER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5"}
_NEVER_PICKLES = {".pkl", ".pickle", ".npy", ".npz", ".msgpack"}
_NEVER_CODE = {".py", ".pyc", ".so", ".sh"}
_NEVER = frozenset(_NEVER_WEIGHTS | _NEVER_PICKLES | _NEVER_CODE)
# config.json is written by write_config; the others describe weights that are not the result's.
_NOT_OURS = frozenset(
    {
        CONFIG_NAME,
        "adapter_config.json",
        "hf_quant_config.json",
        "quantization_config.json",
        "quantize_config.json",
    }
)


def copy_sidecars(source: Path, target: Path) -> list[str]:
    """Copies byte for byte what a checkpoint needs besides weights and config.json.

    The rule: every regular file directly in ``source`` that ends in .json, .txt, .jinja, .model
    or .tiktoken, or whose name starts with tokenizer, vocab, merges, LICENSE, NOTICE or COPYING;
    and additional_chat_templates/*.jinja. Not: hidden files, README*, config.json, *.index.json,
    configs of adapters and of other quantizations, and never weights, pickles or code.

    Returns the names relative to ``target``, sorted. Raises CheckpointError for a file that
    cannot be read (also a link to nowhere), OutputError for one that cannot be written.
    """
    names = [name for name in _file_names(source) if is_sidecar(name)]
    templates = source / _TEMPLATE_FOLDER
    if templates.is_dir():
        found = [name for name in _file_names(templates) if PurePath(name).suffix == ".jinja"]
        names += [f"{_TEMPLATE_FOLDER}/{name}" for name in found]
        _make_folder(target / _TEMPLATE_FOLDER)
    for name in names:
        _copy(source / name, target / name)
    return sorted(names)


def is_sidecar(name: str) -> bool:
    """Whether ``copy_sidecars`` copies a file of this name."""
    lower, suffix = name.lower(), PurePath(name).suffix.lower()
    if lower.startswith((".", "readme")) or lower.endswith(".index.json"):
        return False
    if lower in _NOT_OURS or suffix in _NEVER:
        return False
    return suffix in _SUFFIXES or lower.startswith(_PREFIXES)


def write_config(
    target: Path, config: Mapping[str, Any], quantization_config: Mapping[str, Any]
) -> None:
    """Writes ``target``/config.json: the source's ``config``, keys in its order, and the new key.

    Raises CheckpointError if the source is already quantized, OutputError if it cannot write.
    """
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            "the checkpoint is already quantized: its config.json has a quantization_config; "
            "start from the original weights"
        )
    result = {**config, "quantization_config": dict(quantization_config)}
    write_bytes_atomic(target / CONFIG_NAME, (json.dumps(result, indent=2) + "\n").encode())


def _file_names(folder: Path) -> list[str]:
    try:
        # A link to nowhere stays in: the hub cache is made of links, so the file was meant to be.
        return [
            entry.name
            for entry in folder.iterdir()
            if entry.is_file() or (entry.is_symlink() and not entry.exists())
        ]
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}") from error


def _copy(source: Path, target: Path) -> None:
    try:
        data = source.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {error.strerror}") from error
    write_bytes_atomic(target, data)
