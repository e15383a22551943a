"""A checkpoint folder: all tensors of all its safetensors files, each exactly once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nybble.checkpoint.headers import TensorInfo, read_header
from nybble.checkpoint.ondisk import read_object, shown
from nybble.core.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
WEIGHT_SUFFIX = ".safetensors"

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class CheckpointIndex:
    """The tensors of a checkpoint, ordered by file name, then by offset."""

    folder: Path
    tensors: Mapping[str, TensorInfo]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors, sorted."""
        return tuple(sorted({info.file for info in self.tensors.values()}))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(info.nbytes for info in self.tensors.values())

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def with_prefix(self, prefix: str) -> list[TensorInfo]:
        """The tensors whose names start with ``prefix``, in index order.

        End the prefix with a dot: 'layers.1' also starts 'layers.10'.
        """
        return [info for name, info in self.tensors.items() if name.startswith(prefix)]


def open_index(folder: Path) -> CheckpointIndex:
    """Reads the headers of a checkpoint's files; no tensor data is read.

    The files are those of ``model.safetensors.index.json``; without one, all ``*.safetensors``
    of the folder. Raises CheckpointError if the folder is no complete safetensors checkpoint,
    or if index and files disagree about any tensor.
    """
    names = _entry_names(folder)
    find = _listed_tensors if INDEX_NAME in names else _all_tensors
    return CheckpointIndex(folder, MappingProxyType(find(folder, names)))


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as a dict. Raises CheckpointError if it is missing or broken."""
    return read_object(folder / CONFIG_NAME)


def _entry_names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"cannot open checkpoint folder {folder}: {error.strerror}"
        ) from error


def _all_tensors(folder: Path, names: list[str]) -> dict[str, TensorInfo]:
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIX)]
    if not weights:
        raise CheckpointError(_no_weights(folder, names))
    tensors: dict[str, TensorInfo] = {}
    for file_name in weights:
        for name, info in read_header(folder / file_name).items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder}: tensor {shown(name)} is in both {tensors[name].file.name} and "
                    f"{file_name}, and there is no {INDEX_NAME} to choose; remove one file"
                )
            tensors[name] = info
    if not tensors:
        raise CheckpointError(f"{folder}: its {len(weights)} safetensors files hold no tensors")
    return tensors


def _no_weights(folder: Path, names: list[str]) -> str:
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"{folder}: only pickle weights ({pickles[0]}); nybble reads safetensors only, "
            "convert the checkpoint first"
        )
    return f"{folder}: no weights, neither {INDEX_NAME} nor any *{WEIGHT_SUFFIX} file"


def _listed_tensors(folder: Path, names: list[str]) -> dict[str, TensorInfo]:
    weight_map = _weight_map(folder / INDEX_NAME)
    shards = sorted(set(weight_map.values()))
    missing = sorted(set(shards).difference(names))
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}; "
            "download the checkpoint again"
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(folder / shard).items():
            _check_listed(name, shard, weight_map, folder)
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{folder}: {INDEX_NAME} lists tensor {shown(name)} in {shard}, "
                "which does not hold it"
            )
    return tensors


def _check_listed(name: str, shard: str, weight_map: Mapping[str, str], folder: Path) -> None:
    listed = weight_map.get(name)
    if listed is None:
        raise CheckpointError(
            f"{folder}: tensor {shown(name)} is in {shard}, but {INDEX_NAME} does not list it"
        )
    if listed != shard:
        raise CheckpointError(
            f"{folder}: tensor {shown(name)} is in {shard}, but {INDEX_NAME} lists it in {listed}"
        )


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: expected a 'weight_map' object, found {shown(weight_map)}")
    if not weight_map:
        raise CheckpointError(f"{path}: its weight_map lists no tensors")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{path}: the file of tensor {shown(name)} is not a string: {shown(shard)}"
            )
        if not _is_plain_file_name(shard):
            raise CheckpointError(
                f"{path}: the file of tensor {shown(name)} must be a plain *{WEIGHT_SUFFIX} name "
                f"in the same folder, found {shown(shard)}"
            )
    return weight_map


def _is_plain_file_name(name: str) -> bool:
    # isprintable() refuses NUL, line breaks and lone surrogates; without separators a name that
    # ends in .safetensors can be neither '..' nor absolute.
    return (
        name.endswith(WEIGHT_SUFFIX)
        and name.isprintable()
        and not {"/", "\\"}.intersection(name)
        and len(name.encode()) <= _MAX_NAME_BYTES
    )
