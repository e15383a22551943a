"""Tensors of a checkpoint on disk, copied or as views of the mapped file."""

from __future__ import annotations

import difflib
import hashlib
import heapq
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nybble.checkpoint.dtypes import TORCH_DTYPES
from nybble.checkpoint.headers import TensorInfo
from nybble.checkpoint.index import CheckpointIndex, open_index, read_config
from nybble.checkpoint.ondisk import shown
from nybble.core.errors import CheckpointError

_CANDIDATES = 50
_CHUNK_BYTES = 16 * 2**20


class CheckpointReader:
    """Reads a checkpoint folder; files are mapped when first needed and unmapped by ``close``.

    ``index`` says what there is, ``config`` is config.json. The constructor raises
    CheckpointError if the folder is no usable checkpoint (see ``open_index``), every method with
    a ``name`` raises it for an unknown tensor and for a file that changed since the index was
    read.
    """

    index: CheckpointIndex
    config: dict[str, Any]

    def __init__(self, folder: Path) -> None:
        self.index = open_index(folder)
        self.config = read_config(folder)
        self._maps: dict[Path, mmap.mmap] = {}
        self._closed = False
        # A sound header covers its file exactly, so the last tensor's end is the file's size.
        self._sizes: dict[Path, int] = {}
        for info in self.index.tensors.values():
            self._sizes[info.file] = max(info.stop, self._sizes.get(info.file, 0))

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def read(self, name: str) -> torch.Tensor:
        """A copy of one tensor in memory of its own, on the CPU."""
        info, pages = self._locate(name)
        dtype = TORCH_DTYPES[info.dtype]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        # Copied as bytes: a tensor need not start at a multiple of its item size.
        data = torch.frombuffer(pages, dtype=torch.uint8, count=info.nbytes, offset=info.start)
        return data.clone().view(dtype).reshape(info.shape)

    def view(self, name: str) -> torch.Tensor:
        """One tensor on the mapped file itself, without a copy. Valid until ``close``.

        It must not be written to: the file would not change, but the view would, until
        ``release`` drops the change. A tensor that does not start at a multiple of its item size
        (our writer makes none) is returned as a copy, because torch wants aligned memory.
        """
        info, pages = self._locate(name)
        dtype = TORCH_DTYPES[info.dtype]
        if info.nbytes == 0 or info.start % dtype.itemsize:
            return self.read(name)
        data = torch.frombuffer(pages, dtype=dtype, count=info.numel, offset=info.start)
        return data.reshape(info.shape)

    def raw(self, name: str) -> memoryview:
        """The bytes of one tensor as they are in the file, read-only. Valid until ``close``."""
        info, pages = self._locate(name)
        return memoryview(pages)[info.start : info.stop].toreadonly()

    def raw_chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of one tensor in pieces of at most 16 MiB.

        Each piece leaves the resident memory before the next one enters, so that a tensor of any
        size passes through little memory.
        """
        data = self.raw(name)
        for start in range(0, len(data), _CHUNK_BYTES):
            yield data[start : start + _CHUNK_BYTES]
            self.release()

    def read_prefix(self, prefix: str) -> dict[str, torch.Tensor]:
        """Copies of all tensors whose names start with ``prefix``, keyed by the rest of the name.

        Empty if there are none. End the prefix with a dot: 'layers.1' also starts 'layers.10'.
        """
        infos = self.index.with_prefix(prefix)
        return {info.name.removeprefix(prefix): self.read(info.name) for info in infos}

    def sha256(self, name: str) -> str:
        """The SHA-256 of one tensor's bytes, in hex."""
        digest = hashlib.sha256()
        for chunk in self.raw_chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    def release(self) -> None:
        """Takes the pages read so far out of this process's resident memory.

        Every page touched through a map counts as resident until the kernel is short of memory,
        so reading a checkpoint block by block would look, to a memory limit or to a user, as if
        all of it were loaded. The pages stay in the system's file cache where there is room;
        views stay valid, their next use maps the pages again.
        """
        for pages in self._maps.values():
            pages.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Ends the use of all views; may be called twice."""
        # Dropped, not mmap.close()d: that unmaps even under a live tensor, and a forgotten view
        # would end the process with a segmentation fault. The last view unmaps the file.
        self._maps.clear()
        self._closed = True

    def _locate(self, name: str) -> tuple[TensorInfo, mmap.mmap]:
        if self._closed:
            raise ValueError(f"cannot read {shown(name)}: the reader is closed")
        info = self.index.tensors.get(name)
        if info is None:
            raise CheckpointError(self._unknown(name))
        pages = self._maps.get(info.file)
        if pages is None:
            pages = self._maps[info.file] = _map_file(info.file, self._sizes[info.file])
        # Touching a page beyond the end of a file that shrank kills the process (SIGBUS).
        _check_size(info.file, pages.size(), self._sizes[info.file])
        return info, pages

    def _unknown(self, name: str) -> str:
        # difflib is slow and an expert model has 100 000 names: it sees the likeliest alone.
        likely = heapq.nlargest(
            _CANDIDATES, self.index.tensors, key=lambda other: _shared_ends(name, other)
        )
        near = difflib.get_close_matches(name, likely, n=1)
        hint = f"; did you mean {shown(near[0])}?" if near else ""
        return f"{self.index.folder}: no tensor {shown(name)}{hint}"


def _shared_ends(one: str, other: str) -> int:
    start = _shared_start(one, other)
    return start + _shared_start(one[start:][::-1], other[start:][::-1])


def _shared_start(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _map_file(path: Path, size: int) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            _check_size(path, os.fstat(file.fileno()).st_size, size)
            # Private copy-on-write: torch.frombuffer warns about memory it cannot write to.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _check_size(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise CheckpointError(
            f"{path}: changed while in use, it had {expected} bytes and now has {found}; "
            "start again with a complete file"
        )
