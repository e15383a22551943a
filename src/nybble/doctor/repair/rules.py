"""config.json's ``quantization_config``, written anew from what the headers hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.arch.registry import architecture_in
from nybble.arch.spec import Architecture
from nybble.checkpoint.index import CheckpointIndex
from nybble.core.errors import CheckpointError
from nybble.doctor.repair.configs import BLOCK
from nybble.doctor.repair.dequantize import fits
from nybble.doctor.repair.draft import Draft, Patient
from nybble.doctor.resolve.built import Storage
from nybble.doctor.stored import Stored
from nybble.engine.declare import declaration, linears
from nybble.packing.format import Format
from nybble.packing.formats import FORMATS
from nybble.quant.grid import IntGrid

ACTION = "rules"

_METHODS = {"gptq": "gptq", "auto-round": "auto_round", "auto_round": "auto_round"}
_ORDERED = "desc_act"


def rewrite_rules(patient: Patient, draft: Draft) -> Draft:
    """Declares every Linear as what it is stored as, by rules that all engines read alike.

    A checkpoint without a packed Linear loses its block. Engines would refuse the rest: Linears
    that they fuse but that differ, or a method for which there is no writer here.
    """
    packed = {
        name: stored
        for name, stored in draft.stored().items()
        if stored.schemes and stored.schemes[0].storage is not Storage.DENSE
    }
    config = {key: value for key, value in draft.config.items() if key != BLOCK}
    if not packed:
        text = f"config.json: no {BLOCK}, as nothing is quantized"
        return draft.mended(ACTION, text, config=config) if BLOCK in draft.config else draft
    old = draft.config.get(BLOCK)
    old = old if isinstance(old, dict) else {}
    try:
        file_format = _format(patient, draft, packed, old)
        arch = _architecture(draft)
        made = file_format.quantization_config(declaration(arch, _grids(draft, arch, packed, old)))
    except CheckpointError as error:
        return draft.failed(f"{BLOCK} cannot be written anew: {error}")
    block = _with_symmetry(made, _is_symmetric(packed, old))
    if file_format.name == "gptq" and old.get(_ORDERED) is True:
        block[_ORDERED] = True  # what becomes of it is another action's matter
    sidecars = file_format.sidecars(block)
    known = patient.snapshot.objects
    if block == old and all(known.get(name) == block for name in sidecars):
        return draft
    return draft.mended(
        ACTION,
        f"config.json: {BLOCK} written anew for {file_format.name}, from what is stored",
        config={**draft.config, BLOCK: block},
        files={**draft.files, **sidecars},
    )


def _format(
    patient: Patient, draft: Draft, packed: Mapping[str, Stored], old: Mapping[str, Any]
) -> Format:
    storages = {stored.schemes[0].storage for stored in packed.values()}
    if storages == {Storage.PACKED}:
        return FORMATS["compressed-tensors"]
    if storages != {Storage.GPTQ}:
        names = ", ".join(sorted(storages))
        raise CheckpointError(f"its Linears are stored as {names}, for which there is no writer")
    method = old.get("quant_method")
    if isinstance(method, str) and method in _METHODS:
        return FORMATS[_METHODS[method]]
    # Only GPTQModel writes g_idx, and it cannot do without.
    ordered = all(f"{name}.g_idx" in draft.entries for name in packed)
    alone = "quantize_config.json" in patient.snapshot.objects
    return FORMATS["gptq" if ordered or alone else "auto_round"]


def _architecture(draft: Draft) -> Architecture:
    return architecture_in(draft.config, CheckpointIndex(Path(), draft.tensors))


def _grids(
    draft: Draft, arch: Architecture, packed: Mapping[str, Stored], old: Mapping[str, Any]
) -> dict[str, IntGrid]:
    """The grid of every packed Linear.

    Shapes do not tell one group per output from groups that happen to be as long as a row: the
    size is then one that was declared or that others have, so that few rules are needed.
    """
    known = set(linears(arch))
    unknown = [name for name in packed if name not in known]
    if unknown:
        raise CheckpointError(f"{unknown[0]} is quantized, which engines build dense")
    if not any(name.startswith(f"{arch.blocks_prefix}.") for name in packed):
        raise CheckpointError(f"no Linear of {arch.blocks_prefix} is quantized")
    sizes = [old.get("group_size"), *{s.schemes[0].group_size for s in packed.values()}]
    grids = {}
    for name, stored in packed.items():
        shape, scheme = draft.layout.linears[name].shape, stored.scheme
        if scheme is None or not fits(shape, stored):
            raise CheckpointError(f"the tensors of {name} do not fit each other")
        assert scheme.bits is not None and scheme.group_size is not None
        is_one_group = scheme.group_size == -1 and shape[1] in sizes
        group_size = shape[1] if is_one_group else scheme.group_size
        grids[name] = IntGrid(scheme.bits, group_size, signed_scales=True)
    return grids


def _is_symmetric(packed: Mapping[str, Stored], old: Mapping[str, Any]) -> bool:
    is_stored_so = all(s.schemes[0].symmetric is not False for s in packed.values())
    return is_stored_so and old.get("sym", True) is not False


def _with_symmetry(block: Mapping[str, Any], symmetric: bool) -> dict[str, Any]:
    """The block, with every statement on symmetry as it is to be."""
    result = dict(block)
    for key, value in block.items():
        if key in ("sym", "symmetric"):
            result[key] = symmetric
        elif isinstance(value, dict):
            result[key] = _with_symmetry(value, symmetric)
    return result
