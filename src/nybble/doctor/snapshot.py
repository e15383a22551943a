"""A checkpoint as it is: everything that can be read without reading weights, sound or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from nybble.checkpoint.headers import (
    LENGTH_BYTES,
    TensorInfo,
    check_whole,
    header_length,
    parse_header,
)
from nybble.checkpoint.index import CONFIG_NAME, INDEX_NAME, WEIGHT_SUFFIX
from nybble.checkpoint.ondisk import is_unicode, parse_object, shown
from nybble.core.errors import CheckpointError
from nybble.doctor.engines import Family
from nybble.doctor.reading import MISTRAL_INDEX_NAME, loaded_tensors, weight_files
from nybble.doctor.source import Source, Unreachable, is_plain_name

OBJECT_NAMES = (
    INDEX_NAME,
    MISTRAL_INDEX_NAME,
    "quantize_config.json",
    "hf_quant_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "nybble.json",
)
"""JSON files besides config.json that may matter."""

_START_BYTES = 256 * 1024
"""What is read of a file at first: nearly always all that is needed of it, in one request."""
MAX_JSON_BYTES = 64 * 2**20
_MAX_HEADER_BYTES = 32 * 2**20
_MAX_ALL_HEADERS_BYTES = 256 * 2**20
"""Real ones take 1 MB or less; many thousands of experts, packed one by one, some tens."""
_MAX_PARSED_BYTES = 140 * 2**20
_VALUE_BYTES = 100
"""Of memory, for each comma, colon and opening bracket of a JSON text, at most."""
_MAX_PROBLEMS = 100
"""Of one kind: beyond, one more would tell nothing new."""
_MAX_TOTAL_SIZE = 2**63 - 1
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class ProblemKind(StrEnum):
    """What can be wrong with a file before its content means anything."""

    UNREADABLE_CONFIG = "config.json cannot be read"
    UNREADABLE_INDEX = "the index cannot be read"
    UNREADABLE_JSON = "another JSON file cannot be read"
    UNSAFE_NAME = "a file name in the index leaves the folder"
    BROKEN_HEADER = "a safetensors file is broken"
    MISSING_FILE = "a file that the index names is missing"


@dataclass(frozen=True)
class Problem:
    """A file that could not be read as what it is."""

    kind: ProblemKind
    file: str
    message: str
    """One line."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint's files say. Nothing here has been judged."""

    source: Source
    sizes: Mapping[str, int]
    """Bytes by file name."""
    config: Mapping[str, Any] | None
    """config.json; None: missing or broken."""
    weight_map: Mapping[str, str] | None
    """Of the index, tensor name -> file name; None: no index, or a broken one."""
    total_size: int | None
    """What the index claims."""
    objects: Mapping[str, Mapping[str, Any]]
    """The readable ones of OBJECT_NAMES, by name."""
    headers: Mapping[str, Mapping[str, TensorInfo]]
    """Of every sound safetensors file, listed in the index or not: tensors by name, in file
    order. A tensor's ``file`` is a bare name, to be read through ``source``."""
    problems: tuple[Problem, ...]

    def loaded_by(self, family: Family) -> Mapping[str, TensorInfo]:
        """The tensors an engine would read, in its order: not all look at the index alike."""
        return self._loaded[family]

    def all_tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors of all sound files; of several copies the one that the index means."""
        return self._all

    @cached_property
    def _loaded(self) -> Mapping[Family, Mapping[str, TensorInfo]]:
        mistral_map = weight_map_of(self.objects.get(MISTRAL_INDEX_NAME))
        return {
            family: loaded_tensors(family, self.sizes, self.headers, self.weight_map, mistral_map)
            for family in Family
        }

    @cached_property
    def _all(self) -> Mapping[str, TensorInfo]:
        listed = self.weight_map or {}
        found: dict[str, TensorInfo] = {}
        for file in sorted(self.headers):
            for name, info in self.headers[file].items():
                if name not in found or listed.get(name) == file:
                    found[name] = info
        return found


def take_snapshot(source: Source) -> Snapshot:
    """Reads what a checkpoint's files say: JSON files and headers, no weights.

    What is wrong with a file becomes a Problem. Raises CheckpointError if the source cannot be
    read, or holds neither config.json nor a safetensors file.
    """
    sizes = source.sizes()
    weights = weight_files(sizes)
    if CONFIG_NAME not in sizes and not weights:
        raise CheckpointError(_no_checkpoint(source.label, sizes))
    reader = _Reader(source, sizes)
    objects = reader.objects([name for name in (CONFIG_NAME, *OBJECT_NAMES) if name in sizes])
    config = objects.pop(CONFIG_NAME, None)
    weight_map = reader.weight_map(objects[INDEX_NAME]) if INDEX_NAME in objects else None
    reader.judge_names(weight_map or {})
    headers = reader.headers(weights)
    return Snapshot(
        source=source,
        sizes=sizes,
        config=config,
        weight_map=weight_map,
        total_size=_total_size(objects.get(INDEX_NAME, {})),
        objects=objects,
        headers=headers,
        problems=tuple(reader.problems),
    )


class _Reader:
    """Reads files of a source, and keeps what is wrong with them."""

    def __init__(self, source: Source, sizes: Mapping[str, int]) -> None:
        self.source = source
        self.sizes = sizes
        self.problems: list[Problem] = []

    def add(self, kind: ProblemKind, file: str, message: object) -> None:
        self.problems.append(Problem(kind, file, str(message)))

    def objects(self, names: list[str]) -> dict[str, Mapping[str, Any]]:
        """JSON objects by file name; without those that are none."""
        found: dict[str, Mapping[str, Any]] = {}
        for name, start in self._starts(names):
            try:
                found[name] = self._object(name, start)
            except Unreachable:
                raise
            except CheckpointError as error:
                self.add(_UNREADABLE.get(name, ProblemKind.UNREADABLE_JSON), name, error)
        return found

    def headers(self, names: Iterable[str]) -> dict[str, Mapping[str, TensorInfo]]:
        """The tensors of each sound safetensors file."""
        found: dict[str, Mapping[str, TensorInfo]] = {}
        left = _MAX_ALL_HEADERS_BYTES
        for name, start in self._starts(sorted(names)):
            try:
                header = self._header(name, start, left)
                left -= len(header)
                found[name] = parse_header(header, Path(name), self.sizes[name])
            except Unreachable:
                raise
            except CheckpointError as error:
                self.add(ProblemKind.BROKEN_HEADER, name, error)
        return found

    def weight_map(self, index: Mapping[str, Any]) -> dict[str, str] | None:
        """The index's, if it is one."""
        weight_map = weight_map_of(index)
        if weight_map is None:
            value = index.get("weight_map")
            message = f"{INDEX_NAME}: its weight_map is no object of file names: {shown(value)}"
            self.add(ProblemKind.UNREADABLE_INDEX, INDEX_NAME, message)
        return weight_map

    def judge_names(self, weight_map: Mapping[str, str]) -> None:
        """Finds the files that the index names and that cannot be read."""
        kinds: dict[ProblemKind, list[str]] = {}
        for file in sorted(set(weight_map.values())):
            if not is_plain_name(file):
                kinds.setdefault(ProblemKind.UNSAFE_NAME, []).append(file)
            elif file not in self.sizes:
                kinds.setdefault(ProblemKind.MISSING_FILE, []).append(file)
            elif not file.endswith(WEIGHT_SUFFIX):
                kinds.setdefault(ProblemKind.BROKEN_HEADER, []).append(file)
        for kind, files in kinds.items():
            for file in files[:_MAX_PROBLEMS]:
                count = f" (one of {len(files)} such files)" if len(files) > 1 else ""
                self.add(kind, file, f"{INDEX_NAME} names {shown(file)}, {_WHY[kind]}{count}")

    def _object(self, name: str, start: bytes | CheckpointError) -> dict[str, Any]:
        size = self.sizes[name]
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{name}: {size} bytes is too large for such a file")
        text = self._more(name, start, 0, size)
        return parsed(text, name)

    def _header(self, name: str, start: bytes | CheckpointError, left: int) -> bytes:
        prefix = self._more(name, start, 0, LENGTH_BYTES)
        length = header_length(prefix, Path(name))
        if length > min(_MAX_HEADER_BYTES, left):
            raise CheckpointError(
                f"{name}: its header of {length} bytes is not read: at most {_MAX_HEADER_BYTES} "
                f"in one file and {_MAX_ALL_HEADERS_BYTES} in all are"
            )
        header = self._more(name, start, LENGTH_BYTES, LENGTH_BYTES + length)
        check_whole(header, length, Path(name))
        _check_weight(header, f"{name}: header")
        return header

    def _more(self, name: str, start: bytes | CheckpointError, first: int, stop: int) -> bytes:
        """Bytes of a file of which the start has been read."""
        if isinstance(start, CheckpointError):
            raise start
        if stop <= len(start) or len(start) < _START_BYTES:
            return start[first:stop]
        return start[first:] + self.source.read(name, len(start), stop)

    def _starts(self, names: list[str]) -> Iterator[tuple[str, bytes | CheckpointError]]:
        """The first bytes of each file; a few files at a time, lest all be in memory."""
        width = self.source.parallel
        with ThreadPoolExecutor(width) as pool:
            for at in range(0, len(names), width):
                some = names[at : at + width]
                starts = pool.map(self._start, some) if width > 1 else map(self._start, some)
                yield from zip(some, starts, strict=True)

    def _start(self, name: str) -> bytes | CheckpointError:
        try:
            return self.source.read(name, 0, _START_BYTES)
        except Unreachable:
            raise
        except CheckpointError as error:
            return error


_UNREADABLE = {
    CONFIG_NAME: ProblemKind.UNREADABLE_CONFIG,
    INDEX_NAME: ProblemKind.UNREADABLE_INDEX,
}
_WHY = {
    ProblemKind.UNSAFE_NAME: "which is no name of a file in the same folder",
    ProblemKind.MISSING_FILE: "which is not there",
    ProblemKind.BROKEN_HEADER: f"which is no *{WEIGHT_SUFFIX} file",
}


def parsed(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``text``. Raises CheckpointError as ``parse_object`` does, and for one
    that would fill the memory."""
    _check_weight(text, where)
    return parse_object(text, where)


def weight_map_of(index: Mapping[str, Any] | None) -> dict[str, str] | None:
    """An index's tensor name -> file name; None unless it is an object of strings."""
    weight_map = None if index is None else index.get("weight_map")
    if not isinstance(weight_map, dict):
        return None
    are_names = all(
        isinstance(file, str) and is_unicode(file) and is_unicode(name)
        for name, file in weight_map.items()
    )
    return weight_map if are_names else None


def _total_size(index: Mapping[str, Any]) -> int | None:
    metadata = index.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(size, float) and size.is_integer():  # some exporters divide
        size = int(size)
    return size if type(size) is int and 0 <= size <= _MAX_TOTAL_SIZE else None


def _check_weight(text: bytes, where: str) -> None:
    """Refuses JSON that could take far more memory as objects than as text.

    Raises CheckpointError.
    """
    values = sum(text.count(mark) for mark in (b",", b":", b"[", b"{"))
    # Of a character; the text is there twice, besides its bytes.
    width = 1 if text.isascii() and b"\\u" not in text else 4
    if len(text) * (1 + 2 * width) + values * _VALUE_BYTES > _MAX_PARSED_BYTES:
        raise CheckpointError(
            f"{where}: {len(text)} bytes of JSON with about {values} values are more than any "
            "checkpoint needs; not read"
        )


def _no_checkpoint(label: str, sizes: Mapping[str, int]) -> str:
    pickles = [name for name in sizes if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"{label}: only pickle weights ({pickles[0]}), which are not read; convert them to "
            "safetensors first"
        )
    return f"{label}: no checkpoint, neither {CONFIG_NAME} nor a *{WEIGHT_SUFFIX} file"
