"""The sound tensors of a checkpoint, each once: what its index should have said."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from nybble.checkpoint.headers import TensorInfo
from nybble.checkpoint.index import INDEX_NAME
from nybble.core.errors import CheckpointError, UnsupportedArchitecture
from nybble.doctor.layout.registry import layout_of
from nybble.doctor.layout.spec import Layout
from nybble.doctor.repair.configs import ACTION as CONFIG
from nybble.doctor.repair.configs import BLOCK, restored
from nybble.doctor.repair.draft import (
    Draft,
    Patient,
    copied,
    is_mtp,
    owner_of,
    packed_names,
)
from nybble.doctor.resolve.built import Storage
from nybble.doctor.snapshot import Snapshot
from nybble.doctor.stored import Stored

ACTION = "index"

_WHOLE = ({"weight"}, {"qweight", "scales"}, {"weight_packed", "weight_scale"})
"""Suffixes that make up a Linear, with which a file that is not listed has nothing to add."""
_Found = dict[str, tuple[str, TensorInfo]]


def settled(patient: Patient) -> Draft:
    """The draft to start from: the tensors that the index lists, and what else is needed.

    Of a tensor that is there more than once, the one in the listed file counts; a file that is
    not listed gives what the model needs and no listed file holds. Raises CheckpointError if
    config.json cannot be used, UnsupportedArchitecture for a model nobody here knows.
    """
    snapshot = patient.snapshot
    config, differed = restored(patient)
    layout = layout_of(config)
    if layout is None:
        raise UnsupportedArchitecture(
            f"{snapshot.source.label}: its architecture is unknown, so nothing can be mended"
        )
    found = _chosen(snapshot, layout)
    if not found:
        raise CheckpointError(
            f"{snapshot.source.label}: no sound safetensors file, nothing to mend"
        )
    entries = {
        name: copied(snapshot.source, file, info, file, file)
        for name, (file, info) in _in_file_order(snapshot, found)
    }
    draft = Draft(entries, config, layout)
    if differed and patient.base is not None:
        text = f"config.json: {', '.join(differed)} as in {patient.base.source.label}"
        draft = draft.mended(CONFIG, text)
    for text in _differences(snapshot, found):
        draft = draft.mended(ACTION, text)
    return _once_each(_renamed_head(draft))


def _renamed_head(draft: Draft) -> Draft:
    """Calls the MTP head by the names it has in every engine, if it stands under others."""
    heads = {name: f"mtp.{name.partition('.mtp.')[2]}" for name in draft.entries if ".mtp." in name}
    if not heads or any(map(is_mtp, draft.entries)):
        return draft
    entries = {}
    for name, entry in draft.entries.items():
        info = dataclasses.replace(entry.info, name=heads.get(name, name))
        origin = None if name in heads else entry.origin
        entries[info.name] = dataclasses.replace(entry, info=info, origin=origin)
    first = next(iter(heads))
    return draft.mended(
        ACTION, f"{first}: now {heads[first]}, as all {len(heads)} of the head", entries=entries
    )


def _chosen(snapshot: Snapshot, layout: Layout) -> _Found:
    headers, listed = snapshot.headers, snapshot.weight_map
    if listed is None:
        files = sorted(headers, key=lambda file: (file != "model.safetensors", file))
        return _first_of(headers, files)
    found: _Found = {
        name: (file, headers[file][name])
        for name, file in listed.items()
        if name in headers.get(file, {})
    }
    files = [file for file in dict.fromkeys(listed.values()) if file in headers]
    found = {**_first_of(headers, files), **found}
    parts: dict[str, set[str]] = {}
    for name in found:
        parts.setdefault(owner_of(layout, name), set()).add(name.rpartition(".")[2])
    rest = _first_of(headers, sorted(headers.keys() - files))
    return found | {
        name: place
        for name, place in rest.items()
        if name not in found and _is_needed(layout, name, parts)
    }


def _first_of(headers: Mapping[str, Mapping[str, TensorInfo]], files: list[str]) -> _Found:
    found: _Found = {}
    for file in files:
        found = {name: (file, info) for name, info in headers[file].items()} | found
    return found


def _is_needed(layout: Layout, name: str, parts: Mapping[str, set[str]]) -> bool:
    owner = owner_of(layout, name)
    if owner == name:
        return name in layout.tensors
    there = parts.get(owner, set())
    return not any(whole <= there for whole in _WHOLE)


def _in_file_order(
    snapshot: Snapshot, found: _Found
) -> Iterator[tuple[str, tuple[str, TensorInfo]]]:
    for file, header in snapshot.headers.items():
        for name in header:
            if name in found and found[name][0] == file:
                yield name, found[name]


def _differences(snapshot: Snapshot, found: _Found) -> Iterator[str]:
    """What the index said otherwise."""
    used = {file for file, _ in found.values()}
    for file in sorted(snapshot.headers.keys() - used):
        yield f"{file}: left out, none of its tensors is needed"
    listed = snapshot.weight_map
    if listed is None:
        if len(used) > 1:
            yield f"{INDEX_NAME}: written, for {len(used)} files"
        return
    wrong = [name for name in {**found, **listed} if _place(found, name) != listed.get(name)]
    if wrong:
        yield (
            f"{INDEX_NAME}: {len(wrong)} of {len(found)} tensors were not listed where they are, "
            f"first {wrong[0]}"
        )
    size = sum(info.nbytes for _, info in found.values())
    if snapshot.total_size not in (None, size):
        yield f"{INDEX_NAME}: total_size was {snapshot.total_size}, is {size}"


def _place(found: _Found, name: str) -> str | None:
    place = found.get(name)
    return place[0] if place else None


def _once_each(draft: Draft) -> Draft:
    """Without the second form of Linears that are stored both dense and packed.

    In the MTP head the dense form stays, which is exact; elsewhere the one that config.json is
    for.
    """
    is_quantized = isinstance(draft.config.get(BLOCK), dict)
    twice = [name for name, stored in draft.stored().items() if _is_twice(stored)]
    dropped = set()
    for name in twice:
        keeps_dense = not is_quantized or is_mtp(name)
        dropped |= packed_names(name) if keeps_dense else {f"{name}.weight"}
    if not twice:
        return draft
    return draft.mended(
        ACTION,
        f"{twice[0]}: was stored both dense and packed, as {len(twice)} in all; packed ones stay, "
        "but for the MTP head",
        entries={name: entry for name, entry in draft.entries.items() if name not in dropped},
    )


def _is_twice(stored: Stored) -> bool:
    forms = {scheme.storage for scheme in stored.schemes}
    return Storage.DENSE in forms and bool(forms & {Storage.GPTQ, Storage.AWQ, Storage.PACKED})
