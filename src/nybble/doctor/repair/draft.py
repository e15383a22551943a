"""A checkpoint as it is to become: what ``repair`` plans before it writes a byte."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nybble.checkpoint.dtypes import SAFETENSORS_DTYPES, TORCH_DTYPES
from nybble.checkpoint.headers import TensorInfo
from nybble.checkpoint.writer import TensorSpec
from nybble.core.errors import CheckpointError
from nybble.doctor.findings import Part
from nybble.doctor.layout.spec import LM_HEAD, Layout, part_of
from nybble.doctor.snapshot import Snapshot
from nybble.doctor.source import Source
from nybble.doctor.stored import Stored, stored_linears

_CHUNK_BYTES = 16 * 2**20

PACKED_SUFFIXES = frozenset(
    {
        *("qweight", "qzeros", "scales", "g_idx"),
        *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    }
)
"""What follows a Linear's name in those of the tensors that GPTQ, AWQ and compressed-tensors
hold it in."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the result."""

    info: TensorInfo
    """Its name, type and shape; of a copied one also where its bytes lie."""
    file: str
    """Of the result."""
    chunks: Callable[[], Iterable[bytes | memoryview]]
    """Its bytes, in pieces; reads or computes them anew each time."""
    origin: str | None = None
    """The checkpoint's own file that it is copied from; None: it comes from elsewhere."""

    @property
    def spec(self) -> TensorSpec:
        """For the writer."""
        return TensorSpec(self.info.name, TORCH_DTYPES[self.info.dtype], self.info.shape)

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        data = bytearray(b"".join(self.chunks()))
        spec = self.spec
        if not data:
            return torch.empty(spec.shape, dtype=spec.dtype)
        return torch.frombuffer(data, dtype=spec.dtype).reshape(spec.shape)


@dataclass(frozen=True)
class Done:
    """One thing that was mended."""

    action: str
    """As findings name it: 'graft-mtp'."""
    text: str
    """One line."""


@dataclass(frozen=True)
class Draft:
    """The result so far; every action makes a new one of it."""

    entries: Mapping[str, Entry]
    """By tensor name, in the order of files."""
    config: Mapping[str, Any]
    layout: Layout
    """Of ``config``."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Further files to write, by name."""
    done: tuple[Done, ...] = ()
    unmended: tuple[str, ...] = ()
    """What could not be mended and why, one line each."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """As headers will say."""
        return {name: entry.info for name, entry in self.entries.items()}

    def stored(self) -> Mapping[str, Stored]:
        """How each Linear is to be stored."""
        return stored_linears(self.layout, self.tensors)

    def mended(self, action: str, text: str, **changes: Any) -> Draft:
        """With other fields, and a line on what was done."""
        return replace(self, done=(*self.done, Done(action, text)), **changes)

    def failed(self, text: str) -> Draft:
        """With a line on what could not be done."""
        return replace(self, unmended=(*self.unmended, text))


@dataclass(frozen=True)
class Patient:
    """The checkpoint as it is, and what it was made from."""

    snapshot: Snapshot
    base: Snapshot | None


Action = Callable[[Patient, Draft], Draft]
"""Mends one kind of fault, or says why it cannot; leaves a draft without the fault as it is.
Raises CheckpointError if bytes it needs cannot be read."""


def copied(source: Source, file: str, info: TensorInfo, to: str, origin: str | None) -> Entry:
    """A tensor whose bytes are those in ``file`` of a source."""
    return Entry(info, to, partial(_read_chunks, source, file, info), origin)


def computed(spec: TensorSpec, file: str, compute: Callable[[], torch.Tensor]) -> Entry:
    """A tensor whose bytes are made when they are written."""
    dtype = SAFETENSORS_DTYPES[spec.dtype]
    info = TensorInfo(spec.name, dtype, spec.shape, Path(file), 0, spec.nbytes)
    return Entry(info, file, partial(_tensor_bytes, compute))


def tensors_of(snapshot: Snapshot) -> dict[str, tuple[str, TensorInfo]]:
    """File and header entry of every tensor that a sound checkpoint lists."""
    listed = snapshot.weight_map or {}
    return {
        name: (file, info)
        for file, header in snapshot.headers.items()
        for name, info in header.items()
        if listed.get(name, file) == file
    }


def is_mtp(name: str) -> bool:
    """Whether a tensor or Linear belongs to the MTP head."""
    return part_of(name) is Part.MTP


def owner_of(layout: Layout, tensor: str) -> str:
    """The Linear whose weights a tensor holds or helps to hold, else the tensor itself."""
    linear, _, suffix = tensor.rpartition(".")
    return linear if linear in layout.linears and suffix != "bias" else tensor


def packed_names(linear: str) -> set[str]:
    """What the tensors that hold a packed Linear may be called."""
    return {f"{linear}.{suffix}" for suffix in PACKED_SUFFIXES}


def missing(draft: Draft) -> list[str]:
    """Names of the model's Linears and other tensors of which nothing is there."""
    layout = draft.layout
    linears = [
        name
        for name, stored in draft.stored().items()
        if not stored.schemes and not (layout.tied and name == LM_HEAD)
    ]
    others = [
        name
        for name in layout.tensors
        if name not in draft.entries
        and name not in layout.stacks
        and owner_of(layout, name) == name
    ]
    return linears + others


def _read_chunks(source: Source, file: str, info: TensorInfo) -> Iterator[bytes]:
    for start in range(info.start, info.stop, _CHUNK_BYTES):
        stop = min(start + _CHUNK_BYTES, info.stop)
        data = source.read(file, start, stop)
        if len(data) < stop - start:
            raise CheckpointError(f"{source.label}: {file} ends within {info.name}")
        yield data


def _tensor_bytes(compute: Callable[[], torch.Tensor]) -> Iterator[memoryview]:
    yield compute().contiguous().reshape(-1).view(torch.uint8).numpy().data
