"""Tensors taken from the base, bit for bit: a lost or spoilt MTP head, and whatever else is gone.

Only bytes that are needed are read, so the base may be on the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nybble.checkpoint.headers import TensorInfo
from nybble.core.errors import CheckpointError
from nybble.doctor.findings import Part
from nybble.doctor.layout.spec import Layout
from nybble.doctor.repair.draft import (
    Draft,
    Entry,
    Patient,
    copied,
    is_mtp,
    missing,
    tensors_of,
)
from nybble.doctor.snapshot import Snapshot

ACTION = "graft-mtp"
DTYPE = "dtype"
MTP_FILE = "mtp.safetensors"
BASE_FILE = "from-base.safetensors"

_FLOATS = frozenset({"BF16", "F16", "F32"})
_CLOSE = 2.0**-6
"""Relative; a cast to BF16 moves a value by at most 2^-9, another model's norm is elsewhere."""


def graft_mtp(patient: Patient, draft: Draft) -> Draft:
    """Puts the base's MTP head in the place of whatever is stored of one."""
    assert patient.base is not None
    head = {name: place for name, place in tensors_of(patient.base).items() if is_mtp(name)}
    if not head:
        return draft.failed(
            f"{patient.base.source.label} holds no mtp.* tensors: give another base"
        )
    _refuse_other_shapes(patient.base, draft.layout, head)
    kept = {name: entry for name, entry in draft.entries.items() if not is_mtp(name)}
    grafted = _copies(patient.base, head, MTP_FILE)
    before = len(draft.entries) - len(kept)
    instead = f", in the place of {before}" if before else ""
    return draft.mended(
        ACTION,
        f"mtp.*: {len(grafted)} tensors copied from {patient.base.source.label}{instead}",
        entries={**kept, **grafted},
    )


def graft_missing(patient: Patient, draft: Draft) -> Draft:
    """Copies from the base what is nowhere in the checkpoint, or has the wrong shape.

    Not what is quantized in all likelihood, as the Linears beside it are.
    """
    assert patient.base is not None
    there, layout = tensors_of(patient.base), draft.layout
    wanted = {}
    for owner in missing(draft):
        linear = layout.linears.get(owner)
        if linear is not None and linear.part is Part.TRUNK and owner.startswith(layout.blocks):
            continue
        name = owner if linear is None else f"{owner}.weight"
        if name in there:
            wanted[name] = there[name]
    for name, entry in draft.entries.items():
        if name in there and entry.info.shape != layout.tensors.get(name, entry.info.shape):
            wanted[name] = there[name]
    if not wanted:
        return draft
    _refuse_other_shapes(patient.base, layout, wanted)
    return draft.mended(
        "graft",
        f"{next(iter(wanted))}{_more(wanted)}: copied from {patient.base.source.label}",
        entries={**draft.entries, **_copies(patient.base, wanted, BASE_FILE)},
    )


def restore_dtypes(patient: Patient, draft: Draft) -> Draft:
    """Gives dense tensors that were cast the base's bytes back, and config.json its types."""
    if patient.base is None:
        return _declared_as_stored(draft)
    there = tensors_of(patient.base)
    cast = {
        name: there[name]
        for name, entry in draft.entries.items()
        if name in there
        and {entry.info.dtype, there[name][1].dtype} <= _FLOATS
        and entry.info.dtype != there[name][1].dtype
        and entry.info.shape == there[name][1].shape
    }
    entries = dict(draft.entries)
    for name, (file, info) in cast.items():
        entries[name] = copied(patient.base.source, file, info, entries[name].file, None)
    config = _with_dtypes(draft.config, patient.base.config or {})
    if not cast and config == draft.config:
        return draft
    return draft.mended(
        DTYPE,
        f"{len(cast)} tensors that had been cast, and the dtype of config.json: as in "
        f"{patient.base.source.label}",
        entries=entries,
        config=config,
    )


def refuse_other_base(patient: Patient, draft: Draft) -> None:
    """Raises CheckpointError if the final norm, which quantizers keep, is not the base's.

    Two models of one size have the same shapes, and the MTP head of the wrong one drafts nothing
    of use.
    """
    assert patient.base is not None
    name = f"{draft.layout.blocks.removesuffix('layers')}norm.weight"
    mine, theirs = draft.entries.get(name), tensors_of(patient.base).get(name)
    if mine is None or theirs is None:
        return
    entry = copied(patient.base.source, *theirs, to="", origin=None)
    own, other = mine.read(), entry.read()
    if not own.float().isfinite().all():  # broken, whatever it was made from
        return
    if own.shape == other.shape and torch.allclose(
        own.float(), other.float(), rtol=_CLOSE, atol=_CLOSE / 16
    ):
        return
    raise CheckpointError(
        f"{patient.base.source.label} is not the base of {patient.snapshot.source.label}: "
        f"{name} differs; give the checkpoint it was quantized from"
    )


def _copies(
    base: Snapshot, places: Mapping[str, tuple[str, TensorInfo]], to: str
) -> dict[str, Entry]:
    return {
        name: copied(base.source, file, info, to, None) for name, (file, info) in places.items()
    }


def _refuse_other_shapes(
    base: Snapshot, layout: Layout, places: Mapping[str, tuple[str, TensorInfo]]
) -> None:
    for name, (_, info) in places.items():
        expected = layout.tensors.get(name, info.shape)
        if info.shape != expected or info.dtype not in _FLOATS:
            raise CheckpointError(
                f"{base.source.label} does not fit: {name} is {info.dtype} {list(info.shape)}, "
                f"config.json calls for {list(expected)}"
            )


def _with_dtypes(config: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    keys = [key for key in ("dtype", "torch_dtype") if key in config and key in base]
    result = {**config, **{key: base[key] for key in keys}}
    text, other = config.get("text_config"), base.get("text_config")
    if isinstance(text, dict) and isinstance(other, dict):
        result["text_config"] = _with_dtypes(text, other)
    return result


def _declared_as_stored(draft: Draft) -> Draft:
    """Without a base: config.json may say what the dense tensors are, if they agree."""
    dense = {
        entry.info.dtype
        for name, entry in draft.entries.items()
        if name in draft.layout.tensors and len(entry.info.shape) > 1
    }
    if dense != {"BF16"}:
        return draft.failed(
            f"dense tensors are stored as {', '.join(sorted(dense))}: only the base has what the "
            "cast lost; give it with --base"
        )
    named = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    config = _with_dtypes(draft.config, {**named, "text_config": named})
    if config == draft.config:
        return draft
    return draft.mended(DTYPE, "config.json: dtype is bfloat16, as stored", config=config)


def _more(names: Mapping[str, object]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
