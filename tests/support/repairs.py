"""Drives single actions of ``nybble repair`` on folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nybble.checkpoint.staging import staged_folder
from nybble.doctor.repair.draft import Draft, Patient
from nybble.doctor.repair.plan import mended
from nybble.doctor.repair.write import write_draft
from nybble.doctor.snapshot import take_snapshot
from nybble.doctor.source import LocalSource
from nybble.pipeline.quantize import quantize
from nybble.recipe.schema import Format, Recipe, Rtn, Scheme

from .checkpoints import read_json, read_weights, write_json

FORMATS: tuple[Format, ...] = ("auto_round", "gptq", "compressed-tensors")
Tensors = dict[str, torch.Tensor]


class Quantized:
    """A base at 4 bits in every format, each made once; not to be changed."""

    def __init__(self, base: Path, folder: Path) -> None:
        self._base = base
        self._folder = folder

    def __call__(self, form: Format, packed_mtp: bool = False) -> Path:
        """The folder; with a packed MTP layer or not."""
        out = self._folder / f"{form}-{packed_mtp}"
        if not out.exists():
            scheme = Scheme(mtp_bits=4, group_size=32) if packed_mtp else Scheme(group_size=32)
            recipe = Recipe(scheme=scheme, algorithm=Rtn(), format=form)
            quantize(self._base, out, recipe, "cpu")
        return out


def patient(folder: Path, base: Path | None = None) -> Patient:
    """The checkpoint in a folder, with its base."""
    original = take_snapshot(LocalSource(base)) if base else None
    return Patient(take_snapshot(LocalSource(folder)), original)


def mend(folder: Path, *actions: str, base: Path | None = None) -> Draft:
    """What these actions make of a checkpoint."""
    return mended(patient(folder, base), actions)


def write(draft: Draft, folder: Path, out: Path, in_place: bool = False) -> Path:
    """The draft in a new folder; returns it."""
    with staged_folder(out) as staging:
        write_draft(draft, patient(folder).snapshot, folder, staging, in_place)
    return out


def bytes_of(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """All that makes two tensors the same."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), data


def stored_bytes(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Every tensor of a folder's safetensors files."""
    return {name: bytes_of(tensor) for name, tensor in read_weights(folder).items()}


def changed(
    source: Path,
    folder: Path,
    tensors: Callable[[Tensors], object] = lambda _: None,
    config: Callable[[dict[str, Any]], object] = lambda _: None,
) -> Path:
    """A checkpoint with other tensors or another config.json, in a new folder."""
    folder.mkdir()
    weights, values = read_weights(source), read_json(source / "config.json")
    tensors(weights)
    config(values)
    save_file(weights, folder / "model.safetensors")
    write_json(folder / "config.json", values)
    for name in ("quantize_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            (folder / name).write_bytes((source / name).read_bytes())
    return folder


def without(prefix: str) -> Callable[[Tensors], None]:
    """Takes out all tensors whose names begin so."""

    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return drop


def tensors_of(draft: Draft) -> dict[str, object]:
    """The bytes of every tensor of a draft."""
    return {name: bytes_of(entry.read()) for name, entry in draft.entries.items()}
