"""The header of a safetensors file: which tensor lies where.

A file is 8 bytes (little-endian header length), that many bytes of JSON, then the data section.
A header comes from outside, so everything it claims is checked against the file's real size
before it is used, and nothing is allocated by a claimed size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeGuard

from nybble.checkpoint.ondisk import is_unicode, parse_object, regular_size, shown
from nybble.core.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit: the reference reader refuses longer headers, so we never write one."""

METADATA_KEY = "__metadata__"
"""The one header key that is not a tensor."""

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("BOOL", "U8", "I8"), 1),
        **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 1),
        **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
        **dict.fromkeys(("U32", "I32", "F32"), 4),
        **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
    }
)
"""Bytes of one element, by safetensors' names. Sub-byte types are left out: their shapes differ."""

LENGTH_BYTES = 8
"""A file's first bytes: the length of its header."""

_MAX_RANK = 64
_MAX_SIZE = 2**63 - 1
_GIT_LFS_START = b"version "


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. ``start`` and ``stop`` are byte offsets from the file's begin."""

    name: str
    dtype: str
    """Safetensors spelling: 'BF16', 'I32'."""
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Elements; 1 for shape ()."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in file order; no tensor data is read.

    Raises CheckpointError unless the header is sound and its tensors cover the data section
    exactly: no hole, no overlap, nothing missing and nothing left over.
    """
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            header = _header_bytes(file, path, size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return parse_header(header, path, size)


def parse_header(header: bytes, path: Path, size: int) -> dict[str, TensorInfo]:
    """The tensors that a header's JSON describes, in file order.

    ``path`` names the file, of ``size`` bytes, in the results and in errors. Raises
    CheckpointError as ``read_header`` does.
    """
    entries = parse_object(header, f"{path}: header")
    _check_metadata(entries.pop(METADATA_KEY, {}), path)
    data_start = LENGTH_BYTES + len(header)
    infos = [_tensor_info(name, entry, path, data_start) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    _check_coverage(infos, path, data_start, size)
    return {info.name: info for info in infos}


def header_length(prefix: bytes, path: Path) -> int:
    """Bytes of the JSON that follows a file's first ``LENGTH_BYTES``.

    Raises CheckpointError if these are no safetensors file's.
    """
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointError(f"{path}: {len(prefix)} bytes is too short for a safetensors file")
    if prefix == _GIT_LFS_START:
        raise CheckpointError(f"{path}: a git-lfs pointer, not the weights; run 'git lfs pull'")
    length = int.from_bytes(prefix, "little")
    if length == 0 or length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: header length {length} is not in 1..{MAX_HEADER_BYTES}; "
            "not a safetensors file"
        )
    return length


def _header_bytes(file: BinaryIO, path: Path, size: int) -> bytes:
    length = header_length(file.read(LENGTH_BYTES), path)
    header = file.read(min(length, size))
    check_whole(header, length, path)
    return header


def check_whole(header: bytes, length: int, path: Path) -> None:
    """Raises CheckpointError if less than ``length`` bytes of a header could be read."""
    if len(header) < length:
        raise CheckpointError(
            f"{path}: truncated within the header, {length - len(header)} of its {length} bytes "
            "are missing; download the file again"
        )


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: header: {METADATA_KEY} is not an object of strings")


def _tensor_info(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {shown(name)}"
    if not is_unicode(name):
        raise CheckpointError(f"{where}: the name is not valid Unicode")
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: expected an object, found {shown(entry)}")
    dtype, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where}: unknown dtype {shown(dtype)}")
    itemsize = ITEM_BYTES[dtype]
    if not _are_sizes(shape) or not _is_addressable(shape, itemsize):
        raise CheckpointError(f"{where}: not a usable shape: {shown(shape)}")
    if not _are_sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise CheckpointError(f"{where}: not a byte range: {shown(span)}")
    needed = math.prod(shape) * itemsize
    if span[1] - span[0] != needed:
        raise CheckpointError(
            f"{where}: {dtype} {shown(shape)} needs {needed} bytes, "
            f"its range {shown(span)} holds {span[1] - span[0]}"
        )
    start, stop = data_start + span[0], data_start + span[1]
    return TensorInfo(name, dtype, tuple(shape), path, start, stop)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    # type() instead of isinstance(): bool is an int for isinstance().
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number <= _MAX_SIZE for number in value
    )


def _is_addressable(shape: list[int], itemsize: int) -> bool:
    # Zeros do not help: torch computes strides over the other dimensions and must not overflow.
    if len(shape) > _MAX_RANK:
        return False
    return math.prod(max(dim, 1) for dim in shape) * itemsize <= _MAX_SIZE


def _check_coverage(infos: list[TensorInfo], path: Path, data_start: int, size: int) -> None:
    expected = data_start
    previous = "the header"
    for info in infos:
        name = f"tensor {shown(info.name)}"
        if info.start < expected:
            raise CheckpointError(
                f"{path}: {name} overlaps {previous} by {expected - info.start} bytes"
            )
        if info.start > expected:
            raise CheckpointError(
                f"{path}: a hole of {info.start - expected} bytes between {previous} and {name}"
            )
        expected, previous = info.stop, name
    if size < expected:
        raise CheckpointError(
            f"{path}: truncated, {expected - size} of {expected} bytes are missing; "
            "download the file again"
        )
    if size > expected:
        raise CheckpointError(f"{path}: {size - expected} bytes after {previous} have no owner")
