"""Repairs that need values read: zero points by the other convention, activation order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from nybble.checkpoint.writer import TensorSpec
from nybble.doctor.repair.configs import BLOCK
from nybble.doctor.repair.draft import Draft, Entry, Patient, computed
from nybble.doctor.resolve.built import Scheme, Storage
from nybble.doctor.zero_points import BITS, ZeroPoints, zero_point_convention
from nybble.packing.bits import pack_words, unpack_words

ZERO_POINTS = "zero-points"
DESC_ACT = "desc-act"

_FORMAT_KEYS = ("checkpoint_format", "format")
_ACTORDER = "actorder"
_BY_ACTIVATION = ("group", "dynamic")


def convert_zero_points(_patient: Patient, draft: Draft) -> Draft:
    """Stores symmetric zero points less one, as version 1 of GPTQ and AutoRound do."""
    entries = dict(draft.entries)
    changed = []
    for name, stored in draft.stored().items():
        scheme, found = stored.scheme, draft.entries.get(f"{name}.qzeros")
        if scheme is None or scheme.storage is not Storage.GPTQ or found is None:
            continue
        if scheme.bits not in BITS or found.info.dtype != "I32":
            continue
        if zero_point_convention(found.read().numpy(), scheme.bits) is ZeroPoints.V2:
            spec = TensorSpec(found.info.name, torch.int32, found.info.shape)
            compute = partial(_less_one, found, scheme.bits)
            entries[found.info.name] = computed(spec, found.file, compute)
            changed.append(found.info.name)
    config = _with_block(draft.config, _first_version)
    if not changed and config == draft.config:
        return draft
    return draft.mended(
        ZERO_POINTS,
        f"{len(changed)} qzeros: stored less one, as version 1 of the format has them",
        entries=entries,
        config=config,
    )


def drop_activation_order(_patient: Patient, draft: Draft) -> Draft:
    """Takes back the claim that inputs are sorted by activation, if none is."""
    idle = set()
    for name, stored in draft.stored().items():
        for suffix in ("g_idx", "weight_g_idx"):
            index = draft.entries.get(f"{name}.{suffix}")
            if index is None:
                continue
            if not _is_in_order(index, draft.layout.linears[name].shape[1], stored.scheme):
                return draft.failed(
                    f"{index.info.name} sorts inputs into groups by activation: groups of "
                    "neighbours cannot say the same weights, and vLLM from 0.30 on loads no "
                    "others; quantize anew with static groups"
                )
            if suffix == "weight_g_idx":  # without an order no engine has a place for it
                idle.add(index.info.name)
    config = _with_block(draft.config, _declared_in_order)
    if config == draft.config and not idle:
        return draft
    return draft.mended(
        DESC_ACT,
        "config.json: no activation order, as every g_idx that is there is k // group_size",
        config=config,
        entries={name: entry for name, entry in draft.entries.items() if name not in idle},
    )


def _less_one(words: Entry, bits: int) -> torch.Tensor:
    fields = unpack_words(words.read(), bits)
    return pack_words((fields.int() - 1) & ((1 << bits) - 1), bits)


def _is_in_order(entry: Entry, ins: int, scheme: Scheme | None) -> bool:
    if scheme is None or scheme.group_size is None or entry.info.dtype not in ("I32", "I64"):
        return False
    index = entry.read()
    group_size = ins if scheme.group_size == -1 else scheme.group_size
    unset = bool((index < 0).all())  # compressed-tensors' mark
    return unset or torch.equal(index.long(), torch.arange(ins) // group_size)


def _with_block(
    config: Mapping[str, Any], change: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    block = config.get(BLOCK)
    return {**config, BLOCK: change(block)} if isinstance(block, dict) else dict(config)


def _first_version(block: Mapping[str, Any]) -> dict[str, Any]:
    return {**block, **{key: "gptq" for key in _FORMAT_KEYS if block.get(key) == "gptq_v2"}}


def _declared_in_order(block: Mapping[str, Any]) -> dict[str, Any]:
    is_gptq = block.get("quant_method") == "gptq"
    return {**_in_order(block), **({"desc_act": False} if is_gptq else {})}


def _in_order(block: Mapping[str, Any]) -> dict[str, Any]:
    """The block without any statement, at any depth, that inputs are sorted by activation."""
    result: dict[str, Any] = {}
    for key, value in block.items():
        if key == "desc_act" and value is True:
            value = False
        elif key == _ACTORDER and value in _BY_ACTIVATION:
            value = None
        result[key] = _in_order(value) if isinstance(value, dict) else value
    return result
