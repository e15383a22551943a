"""Writes a draft into a folder: files that did not change as they are, the others anew."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from nybble.checkpoint.headers import LENGTH_BYTES
from nybble.checkpoint.index import CONFIG_NAME, INDEX_NAME, WEIGHT_SUFFIX, open_index
from nybble.checkpoint.writer import ShardWriter, plan_files
from nybble.core.atomic import write_bytes_atomic
from nybble.core.errors import CheckpointError, OutputError
from nybble.doctor.repair.draft import Draft, Entry
from nybble.doctor.snapshot import Snapshot

MANIFEST = "nybble.json"

_LONE = "model.safetensors"
_ONE_OF_SEVERAL = "model-00001-of-00001.safetensors"
"""In the place of ``_LONE``: loaders prefer a file of that name to any index."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SPARE_BYTES = 64 * 2**20

_Files = dict[str, list[Entry]]


def write_draft(
    draft: Draft, snapshot: Snapshot, folder: Path, target: Path, is_in_place: bool
) -> None:
    """Fills the empty folder ``target`` with the checkpoint in ``folder``, mended.

    In place, files that did not change are linked, not copied. Raises OutputError if there is no
    room or the folder cannot be written, CheckpointError if a source cannot be read.
    """
    files = _files(draft)
    whole = {name: origin for name, es in files.items() if (origin := _untouched(es, snapshot))}
    anew = {name: entries for name, entries in files.items() if name not in whole}
    place = _link if is_in_place else shutil.copyfile
    rest = list(_rest(folder, draft))
    _check_room(target, anew, [] if is_in_place else [folder / n for n in (*whole.values(), *rest)])
    with _output_errors(target):
        for name, origin in whole.items():
            place(folder / origin, target / name)
        for name in rest:
            _place_entry(folder / name, target / name, place)
    if anew:
        _write_anew(anew, target)
    for name, content in {**draft.files, **_json_files(draft, files)}.items():
        write_bytes_atomic(target / name, content)
    _verify(draft, target)


def left_out(folder: Path, draft: Draft) -> list[str]:
    """Files of the checkpoint that the result does not have in any form, sorted.

    Raises OutputError if the folder cannot be listed.
    """
    used = {entry.origin for entry in draft.entries.values()}
    with _output_errors(folder):
        return sorted(
            path.name
            for path in folder.iterdir()
            if _is_dropped(path) or (path.suffix == WEIGHT_SUFFIX and path.name not in used)
        )


def _files(draft: Draft) -> _Files:
    """Tensors by file of the result, under the names that loaders look for."""
    files: _Files = {}
    for entry in draft.entries.values():
        files.setdefault(entry.file, []).append(entry)
    if len(files) == 1:
        return {_LONE: next(iter(files.values()))}
    return {_ONE_OF_SEVERAL if name == _LONE else name: found for name, found in files.items()}


def _untouched(entries: list[Entry], snapshot: Snapshot) -> str | None:
    """The file of the checkpoint that holds exactly these tensors; None: there is none."""
    origins = {entry.origin for entry in entries}
    origin = origins.pop()
    if origins or origin is None:
        return None
    return origin if len(snapshot.headers[origin]) == len(entries) else None


def _write_anew(files: _Files, target: Path) -> None:
    layout = plan_files({name: [e.spec for e in entries] for name, entries in files.items()})
    with ShardWriter(target, layout) as writer:
        for entries in files.values():
            for entry in entries:
                writer.write_raw(entry.info.name, entry.chunks())
        writer.finish()


def _json_files(draft: Draft, files: _Files) -> dict[str, bytes]:
    found = {CONFIG_NAME: _json(draft.config)}
    if len(files) > 1:
        total = sum(entry.info.nbytes for entry in draft.entries.values())
        places = {e.info.name: name for name, entries in files.items() for e in entries}
        weight_map = dict(sorted(places.items()))
        found[INDEX_NAME] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    return found


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _rest(folder: Path, draft: Draft) -> Iterator[str]:
    """What is copied besides weights: all that is not hidden, written anew or dropped."""
    written = (CONFIG_NAME, INDEX_NAME, *draft.files)
    with _output_errors(folder):
        for path in sorted(folder.iterdir()):
            is_hidden = path.name.startswith(".")
            is_written = path.name in written or path.suffix == WEIGHT_SUFFIX
            is_copied = path.is_file() or (path.is_dir() and not path.is_symlink())
            if is_copied and not (is_hidden or is_written or _is_dropped(path)):
                yield path.name


def _is_dropped(path: Path) -> bool:
    """Pickles, which nobody should load; what nybble says of weights that are others now."""
    return path.is_file() and (path.suffix in _PICKLES or path.name == MANIFEST)


def _place_entry(source: Path, target: Path, place: Callable[..., object]) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, copy_function=place, ignore=_no_pipes)
    else:
        place(source, target)


def _no_pipes(folder: str, names: list[str]) -> list[str]:
    paths = [Path(folder, name) for name in names]
    return [p.name for p in paths if not (p.is_symlink() or p.is_file() or p.is_dir())]


def _link(source: Path | str, target: Path | str) -> None:
    try:
        os.link(Path(source).resolve(), target)
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(source, target)


def _check_room(target: Path, anew: _Files, copies: list[Path]) -> None:
    with _output_errors(target):
        needed = sum(entry.info.nbytes for entries in anew.values() for entry in entries)
        needed += sum(path.stat().st_size for path in copies) + _SPARE_BYTES + LENGTH_BYTES
        free = shutil.disk_usage(target).free
    if free < needed:
        raise OutputError(
            f"{target.parent} has {free / 1e9:.1f} GB of room, the result takes "
            f"{needed / 1e9:.1f} GB: make room or give another folder"
        )


def _verify(draft: Draft, target: Path) -> None:
    """Raises CheckpointError unless the folder holds what was planned."""
    written = open_index(target).tensors
    for name in {**draft.entries, **written}:
        planned, found = draft.entries.get(name), written.get(name)
        if planned is None or found is None:
            raise CheckpointError(f"{target}: {name} is not as planned: the result is dropped")
        if (planned.info.dtype, planned.info.shape) != (found.dtype, found.shape):
            raise CheckpointError(f"{target}: {name} is not as planned: the result is dropped")


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
