"""What it takes to break a checkpoint: kinds of damage by name, and ways to edit a folder.

A broken checkpoint is a folder of hard links to the sound one. So no file may be changed in place:
all functions here replace files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .checkpoints import read_json
from .good_checkpoints import FORMATS

INDEX = "model.safetensors.index.json"
MODEL = "model.safetensors"
BLOCKS = "model.language_model.layers"
W4 = tuple(f"{form}-w4" for form in FORMATS)
AUTO_ROUND, GPTQ, COMPRESSED = ((name,) for name in W4)
SHARDS = tuple(f"{form}-shards" for form in FORMATS)
GROUP = 128

Tensors = dict[str, torch.Tensor]
Break = Callable[[Path], None]


@dataclass(frozen=True)
class Kind:
    """One way in which a checkpoint is broken."""

    name: str
    code: str
    """Of the check that is to find it."""
    starts: tuple[str, ...]
    """The sound checkpoints that it is done to."""
    apply: Break
    """Breaks a folder."""
    deep: bool = False
    """It shows in values only."""
    with_base: bool = False
    """It shows against the base only."""
    tensor_parallel: int = 1
    """The number of devices on which it shows."""
    is_note: bool = False
    """It harms nobody, but is worth a word."""


KINDS: dict[str, Kind] = {}


def broken(code: str, *starts: str, **options: Any) -> Callable[[Break], Break]:
    """Enters a function in KINDS, under its own name with dashes."""

    def enter(apply: Break) -> Break:
        name = apply.__name__.replace("_", "-")
        assert name not in KINDS
        KINDS[name] = Kind(name, code, starts, apply, **options)
        return apply

    return enter


def linked_copy(folder: Path, copy: Path) -> Path:
    """A copy of a folder that costs no bytes."""
    shutil.copytree(folder, copy, copy_function=os.link)
    return copy


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file anew, never into what other folders share."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a JSON object."""
    value = read_json(path)
    change(value)
    replace_file(path, json.dumps(value, indent=2).encode())


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes config.json."""
    edit_json(folder / "config.json", change)


def edit_block(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the quantization block, in quantize_config.json too if there is one."""
    edit_config(folder, lambda config: change(config["quantization_config"]))
    if (folder / "quantize_config.json").exists():
        edit_json(folder / "quantize_config.json", change)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the index."""
    edit_json(folder / INDEX, change)


def edit_tensors(folder: Path, change: Callable[[Tensors], object], file: str = MODEL) -> None:
    """Changes the tensors of one file."""
    tensors = load_file(folder / file)
    change(tensors)
    write_tensors(folder / file, tensors)


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Writes a safetensors file anew."""
    path.unlink(missing_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})


def drop(tensors: Tensors, pattern: str) -> None:
    """Removes all tensors in whose names the pattern is found; there must be one."""
    found = [name for name in tensors if re.search(pattern, name)]
    assert found, pattern
    for name in found:
        del tensors[name]


def method_of(folder: Path) -> str:
    """'auto-round', 'gptq' or 'compressed-tensors'."""
    name = read_json(folder / "config.json")["quantization_config"]["quant_method"]
    assert isinstance(name, str)
    return name


def drop_rules(folder: Path, word: str) -> None:
    """Takes out all rules that keep something dense and hold the word."""

    def change(block: dict[str, Any]) -> None:
        rules = block.get("extra_config") or block.get("dynamic") or block["ignore"]
        found = [rule for rule in rules if word in rule]
        assert found, word
        for rule in found:
            rules.remove(rule) if isinstance(rules, list) else rules.pop(rule)

    edit_block(folder, change)


def add_rule(folder: Path, name: str) -> None:
    """Declares one Linear dense by its full name."""

    def change(block: dict[str, Any]) -> None:
        if block["quant_method"] == "auto-round":
            dense = {"bits": 16, "group_size": GROUP, "sym": True, "data_type": "fp"}
            block["extra_config"][name] = dense
        elif block["quant_method"] == "gptq":
            block["dynamic"][f"-:.*{re.escape(name.removeprefix(BLOCKS))}$"] = {}
        else:
            block["ignore"].append(name)

    edit_block(folder, change)


def packed(name: str, weight: torch.Tensor, method: str, bits: int = 4) -> Tensors:
    """A Linear's tensors in a format: round to nearest, symmetric; made without nybble."""
    outputs, inputs = weight.shape
    group = min(GROUP, inputs)
    grouped = weight.double().numpy().reshape(outputs, -1, group)
    top = 2 ** (bits - 1)
    scales = np.abs(grouped).max(-1).clip(2.0**-10) / (top - 1)
    scales = torch.from_numpy(scales).to(torch.bfloat16)
    codes = np.rint(grouped / scales.double().numpy()[..., None]).clip(-top, top - 1) + top
    words = pack_words(codes.reshape(outputs, inputs), bits)
    if method == "compressed-tensors":
        return {
            f"{name}.weight_packed": words,
            f"{name}.weight_scale": scales,
            f"{name}.weight_shape": torch.tensor([outputs, inputs]),
        }
    zeros = np.full((inputs // group, outputs), top - 1)
    tensors = {
        f"{name}.qweight": words.T.contiguous(),
        f"{name}.qzeros": pack_words(zeros, bits),
        f"{name}.scales": scales.T.half().contiguous(),
    }
    if method == "gptq":
        tensors[f"{name}.g_idx"] = torch.arange(inputs, dtype=torch.int32) // group
    return tensors


def pack_words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Codes [rows, n] as 32-bit words [rows, n * bits / 32], the first in the lowest bits."""
    per_word = 32 // bits
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    digits = codes.astype(np.uint64).reshape(len(codes), -1, per_word)
    return torch.from_numpy((digits << shifts).sum(-1).astype(np.uint32).view(np.int32))
