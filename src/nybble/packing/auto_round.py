"""The ``auto_round`` format: GPTQ v1 tensors with AutoRound's block (``auto_round:auto_gptq``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nybble.core.errors import CheckpointError
from nybble.packing import gptq_tensors
from nybble.packing.format import LM_HEAD, Block, Declaration, Format, declared, no_sidecars
from nybble.packing.rules import Rules, common_refusals, refuse
from nybble.quant.grid import IntGrid

# Of AutoRound 0.16.1, whose zero-point convention we follow: its loader reads this key.
_AUTOROUND_VERSION = "0.16.1"

# A key without any of these is a name to engines, never a pattern.
_REGEX_SIGNS = frozenset("*+?^$()[]{}|\\")


def quantization_config(declaration: Declaration) -> dict[str, Any]:
    """The block for config.json; raises CheckpointError for what ``refusals`` lists."""
    refuse(refusals(declaration))
    rules = Rules(declaration)
    extra = {rule.pattern: _values(rule.grid) for rule in (*rules.dense, *rules.quantized)}
    if rules.lm_head is not None:
        extra[LM_HEAD] = _values(rules.lm_head)
    lists = declaration.block_lists
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        **_values(declaration.default),
        "autoround_version": _AUTOROUND_VERSION,
        "block_name_to_quantize": lists[0] if len(lists) == 1 else list(lists),
        "extra_config": extra,
    }


def refusals(declaration: Declaration) -> list[str]:
    """Why engines would not read such a checkpoint in this format, one line each."""
    return common_refusals(declaration, gptq_tensors.BITS, "auto_round")


def _values(grid: IntGrid | None) -> dict[str, Any]:
    if grid is None:
        return {"bits": 16, "data_type": "fp"}
    # All four: a key that lacks one takes AutoRound's default here and the block's there.
    return {"bits": grid.bits, "group_size": grid.group_size, "sym": True, "data_type": "int"}


def declared_grid(block: Block, module: str) -> IntGrid | None:
    """What the configuration block says a Linear is built as; None: unquantized.

    The rules, in the order in which vLLM 0.28 and later apply them: a key that is the name or ends
    it; the list of blocks; keys that are regular expressions; the default. Raises CheckpointError
    for a block we cannot read.
    """
    try:
        return _declared(block, module)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"quantization_config cannot be read: {error!r}") from error


def _declared(config: Block, module: str) -> IntGrid | None:
    if config.get("packing_format") != "auto_round:auto_gptq" or config.get("sym") is not True:
        raise CheckpointError(
            f"quantization_config has packing_format {config.get('packing_format')!r}, sym "
            f"{config.get('sym')!r}: only symmetric 'auto_round:auto_gptq' is read"
        )
    extra: Mapping[str, Mapping[str, Any]] = config.get("extra_config") or {}
    for named in (module, *(key for key in extra if module.endswith(f".{key}"))):
        if named in extra:
            # An exact key without bits means 16 to AutoRound and older vLLM: bits are to be given.
            return _grid_of(config, extra[named], bits=16)
    blocks = config.get("block_name_to_quantize") or []
    prefixes = blocks.split(",") if isinstance(blocks, str) else blocks
    outside = bool(prefixes) and not any(module.startswith(prefix) for prefix in prefixes)
    bits = 16 if outside or module == LM_HEAD else config["bits"]
    for pattern, override in extra.items():
        if _REGEX_SIGNS.intersection(pattern) and _found(pattern, module):
            return _grid_of(config, override, bits)
    return _grid_of(config, {}, bits)


def _found(pattern: str, module: str) -> bool:
    try:
        return re.search(pattern, module) is not None
    except re.error:  # engines skip such a key
        return False


def _grid_of(config: Block, override: Mapping[str, Any], bits: int) -> IntGrid | None:
    bits = override.get("bits", bits)
    if bits >= 16:
        return None
    if override.get("sym", True) is not True:
        raise CheckpointError("quantization_config declares asymmetric weights: these are not read")
    group_size = override.get("group_size", config["group_size"])
    return declared(bits, group_size)


FORMAT = Format(
    name="auto_round",
    bits=gptq_tensors.BITS,
    suffixes=gptq_tensors.SUFFIXES,
    idle_suffixes=(gptq_tensors.GROUP_INDEX,),
    dense_experts_apart=True,
    packed_specs=gptq_tensors.packed_specs,
    pack=gptq_tensors.pack,
    unpack=gptq_tensors.unpack,
    some_outputs=gptq_tensors.some_outputs,
    quantization_config=quantization_config,
    refusals=refusals,
    declared_grid=declared_grid,
    sidecars=no_sidecars,
)
