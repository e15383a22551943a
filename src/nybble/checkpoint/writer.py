"""Safetensors shards whose layout is fixed before the first tensor is known.

``plan_shards`` decides file names, headers and every tensor's place from names, dtypes and shapes
alone. ``ShardWriter`` then takes the tensors in any order, so the bytes of the files depend on the
plan and the values, never on the order of the work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch

from nybble.checkpoint.dtypes import SAFETENSORS_DTYPES
from nybble.checkpoint.headers import MAX_HEADER_BYTES, METADATA_KEY
from nybble.checkpoint.index import INDEX_NAME
from nybble.checkpoint.ondisk import is_unicode, shown
from nybble.core.atomic import fsync_path, write_bytes_atomic
from nybble.core.errors import CheckpointError, OutputError

_ALIGNMENT = 8
_CHUNK_BYTES = 16 * 2**20
_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written, before its values exist."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file of a layout."""

    file_name: str
    header: bytes
    """The file's first bytes: the header's length, then its JSON."""
    specs: tuple[TensorSpec, ...]
    """In file order."""
    offsets: Mapping[str, int]
    """Where each tensor starts, in bytes from the file's begin."""
    size: int
    """Bytes of the whole file."""


@dataclass(frozen=True)
class ShardLayout:
    """All files of a checkpoint, byte for byte except for the tensors' values."""

    shards: tuple[Shard, ...]
    total_size: int
    """Bytes of all tensors, without headers."""
    weight_map: Mapping[str, str]
    """The file name of each tensor."""


def plan_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> ShardLayout:
    """Fills shards greedily in the given order, up to ``max_shard_bytes`` of tensors each.

    A tensor larger than the limit gets a shard of its own. Within a shard larger item sizes come
    first, otherwise in the given order: so each tensor starts at a multiple of its item size and
    can be used from the mapped file. Raises CheckpointError for a name twice, a name or dtype
    that safetensors cannot hold, no tensors at all, or a limit below 1.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"the shard limit must be at least 1 byte, got {max_shard_bytes}")
    groups = _grouped(specs, max_shard_bytes)
    return plan_files(
        {_file_name(number, len(groups)): group for number, group in enumerate(groups, 1)}
    )


def plan_files(files: Mapping[str, Sequence[TensorSpec]]) -> ShardLayout:
    """A layout of given files and their tensors; each file is laid out as by ``plan_shards``.

    Raises CheckpointError as ``plan_shards`` does.
    """
    specs = [spec for group in files.values() for spec in group]
    _check_specs(specs)
    shards = tuple(_shard(name, group) for name, group in files.items())
    return ShardLayout(
        shards=shards,
        total_size=sum(spec.nbytes for spec in specs),
        weight_map=MappingProxyType(
            {spec.name: shard.file_name for shard in shards for spec in shard.specs}
        ),
    )


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    if not specs:
        raise CheckpointError("a checkpoint without tensors cannot be written")
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise CheckpointError(f"tensor {shown(spec.name)} is planned twice")
        if spec.name == METADATA_KEY or not is_unicode(spec.name):
            raise CheckpointError(f"a tensor cannot be called {shown(spec.name)} in safetensors")
        if spec.dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"tensor {shown(spec.name)}: safetensors has no {spec.dtype} that nybble writes"
            )
        seen.add(spec.name)


def _grouped(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = []
    used = 0
    for spec in specs:
        if not groups or used + spec.nbytes > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(spec)
        used += spec.nbytes
    return groups


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _shard(file_name: str, group: Sequence[TensorSpec]) -> Shard:
    specs = tuple(sorted(group, key=lambda spec: -spec.dtype.itemsize))
    entries: dict[str, object] = {METADATA_KEY: {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for spec in specs:
        starts[spec.name] = end
        end += spec.nbytes
        entries[spec.name] = {
            "dtype": SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end - spec.nbytes, end],
        }
    header = _header(file_name, entries)
    offsets = {name: len(header) + start for name, start in starts.items()}
    return Shard(file_name, header, specs, MappingProxyType(offsets), len(header) + end)


def _header(file_name: str, entries: Mapping[str, object]) -> bytes:
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file_name}: its header of {len(text)} bytes is over the format's limit of "
            f"{MAX_HEADER_BYTES}; use smaller shards"
        )
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Writes the files of a layout into an existing folder; a context manager.

    Until ``finish``, each file is called ``<name>.partial``; leaving the ``with`` block without
    it removes them. Raises OutputError when the folder cannot be written or already holds a file
    of that name, CheckpointError for a tensor that is not as planned.
    """

    def __init__(self, folder: Path, layout: ShardLayout) -> None:
        self._folder = folder
        self._layout = layout
        self._planned = {
            spec.name: (spec, shard) for shard in layout.shards for spec in shard.specs
        }
        self._written: set[str] = set()
        self._partials: list[Path] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self._remove_partials)
            for shard in layout.shards:
                self._create(shard)
            undo.pop_all()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove_partials()

    def write(self, name: str, tensor: torch.Tensor) -> str:
        """Writes one contiguous tensor, on any device, at its place.

        Returns the SHA-256 of its bytes, in hex.
        """
        spec, _ = self._pending(name)
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise CheckpointError(
                f"tensor {shown(name)} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"planned was {spec.dtype} {spec.shape}"
            )
        if not tensor.is_contiguous():
            raise CheckpointError(f"tensor {shown(name)} is not contiguous; pass .contiguous()")
        # A byte view of the tensor's own memory: no copy for a tensor that is on the CPU.
        flat = tensor.detach().cpu().reshape(-1).view(torch.uint8)
        data = flat.numpy().data
        starts = range(0, len(data), _CHUNK_BYTES)
        return self._store(name, (data[start : start + _CHUNK_BYTES] for start in starts))

    def write_raw(self, name: str, chunks: Iterable[memoryview | bytes]) -> str:
        """Writes one tensor's bytes as they are, at its place; they may come in pieces.

        Returns their SHA-256, in hex.
        """
        self._pending(name)
        return self._store(name, chunks)

    def finish(self) -> None:
        """Makes the files final: flushed, renamed, and indexed if there is more than one.

        Raises CheckpointError if planned tensors were not written, OutputError on disk errors.
        """
        missing = [name for name in self._planned if name not in self._written]
        if missing:
            first = ", ".join(shown(name) for name in missing[:_NAMED_AT_MOST])
            raise CheckpointError(
                f"{len(missing)} of {len(self._planned)} planned tensors were not written: {first}"
            )
        for partial in self._partials:
            with _output_errors(partial):
                fsync_path(partial)
                partial.replace(partial.with_suffix(""))
        self._partials.clear()
        if len(self._layout.shards) > 1:
            write_bytes_atomic(self._folder / INDEX_NAME, self._index_json())
        with _output_errors(self._folder):
            fsync_path(self._folder)

    def _create(self, shard: Shard) -> None:
        final = self._folder / shard.file_name
        partial = _partial(final)
        for path in (final, partial):
            if path.exists():
                raise OutputError(f"cannot write {path}: it exists already, remove it first")
        with _output_errors(partial), partial.open("xb") as file:
            self._partials.append(partial)
            file.write(shard.header)
            file.truncate(shard.size)

    def _pending(self, name: str) -> tuple[TensorSpec, Shard]:
        planned = self._planned.get(name)
        if planned is None:
            raise CheckpointError(f"tensor {shown(name)} is not in the plan")
        if name in self._written:
            raise CheckpointError(f"tensor {shown(name)} is written twice")
        return planned

    def _store(self, name: str, chunks: Iterable[memoryview | bytes]) -> str:
        spec, shard = self._planned[name]
        partial = _partial(self._folder / shard.file_name)
        digest = hashlib.sha256()
        offset, written = shard.offsets[name], 0
        # Opened for each tensor: a checkpoint may have more shards than a process open files.
        with _output_errors(partial), partial.open("r+b", buffering=0) as file:
            for chunk in chunks:
                data = memoryview(chunk)
                # A piece too many must not reach the next tensor's place.
                if written + data.nbytes <= spec.nbytes:
                    digest.update(data)
                    # cast() refuses empty views.
                    _write_all(file.fileno(), data.cast("B") if data else data, offset + written)
                written += data.nbytes
        if written != spec.nbytes:
            raise CheckpointError(
                f"tensor {shown(name)} has {written} bytes, planned were {spec.nbytes}"
            )
        self._written.add(name)
        return digest.hexdigest()

    def _index_json(self) -> bytes:
        index = {
            "metadata": {"total_size": self._layout.total_size},
            "weight_map": dict(sorted(self._layout.weight_map.items())),
        }
        return (json.dumps(index, indent=2) + "\n").encode("ascii")

    def _remove_partials(self) -> None:
        for partial in self._partials:
            # Called while another error is on its way: that one is the cause, and it is kept.
            with contextlib.suppress(OSError):
                partial.unlink()
        self._partials.clear()


def _partial(final: Path) -> Path:
    return final.with_name(final.name + ".partial")


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    # The kernel may take less than it was given; the disk that is full says so the next time.
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
