"""The ``gptq`` format: GPTQ v1 tensors with GPTQModel's configuration block.

Which Linears are quantized stands there twice, since every loader reads another half:
``modules_in_block_to_quantize`` (Transformers: the name ends with an entry; vLLM: it contains one)
and ``dynamic`` (vLLM, SGLang, GPTQModel; ``-:`` dense, ``+:`` another grid; the first that matches
wins). The block holds no facts of the algorithm that made the codes: no loader asks for them.

``g_idx`` says nothing here, but GPTQModel allocates it: without it in the file Transformers runs
on uninitialised memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import torch

from nybble.checkpoint.writer import TensorSpec
from nybble.core.errors import CheckpointError
from nybble.packing import gptq_tensors
from nybble.packing.format import LM_HEAD, Block, Declaration, Format, declared
from nybble.packing.rules import Rules, Unit, common_refusals, refuse
from nybble.quant.grid import IntGrid, QuantizedWeight

_MTP = "mtp"
"""vLLM builds a whole MTP layer dense if any ``-:`` key holds this."""


def packed_specs(module: str, shape: tuple[int, int], grid: IntGrid) -> list[TensorSpec]:
    """Names, types and shapes of a module's stored tensors; shape is [N, K]."""
    index = TensorSpec(f"{module}.{gptq_tensors.GROUP_INDEX}", torch.int32, (shape[1],))
    return [*gptq_tensors.packed_specs(module, shape, grid), index]


def pack(module: str, quantized: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The stored tensors of one module; raises CheckpointError for scales FP16 cannot hold."""
    index = gptq_tensors.group_index(quantized.codes.shape[1], quantized.grid)
    return {
        **gptq_tensors.pack(module, quantized),
        f"{module}.{gptq_tensors.GROUP_INDEX}": index,
    }


def quantization_config(declaration: Declaration) -> dict[str, Any]:
    """The block for config.json; raises CheckpointError for what ``refusals`` lists."""
    refuse(refusals(declaration))
    rules = Rules(declaration)
    mtp_is_quantized = any(name.startswith(f"{_MTP}.") for name in declaration.grids)
    dynamic: dict[str, dict[str, int]] = {}
    for rule in rules.dense:
        if not (mtp_is_quantized and _MTP in rule.pattern):  # not in the list: dense all the same
            dynamic[f"-:{rule.pattern}"] = {}
    for rule in rules.quantized:
        assert rule.grid is not None
        dynamic[f"+:{rule.pattern}"] = _values(rule.grid)
    modules = _listed(rules.units)
    if rules.lm_head is None:
        dynamic[f"-:.*{LM_HEAD}.*"] = {}
    else:
        # Transformers' readers look for the head in `dynamic` alone, vLLM in the list as well.
        dynamic[f"+:.*{LM_HEAD}$"] = _values(rules.lm_head)
        modules.append([LM_HEAD])
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        **_values(declaration.default),
        "sym": True,
        "desc_act": False,
        "lm_head": rules.lm_head is not None,
        "modules_in_block_to_quantize": modules,
        "dynamic": dynamic,
    }


def refusals(declaration: Declaration) -> list[str]:
    """Why engines would not read such a checkpoint in this format, one line each."""
    reasons = common_refusals(declaration, gptq_tensors.BITS, "gptq")
    if reasons:
        return reasons
    units = [unit for unit in Rules(declaration).units if unit.block_list.startswith(f"{_MTP}.")]
    for unit in units:
        if unit.blocks_on(None):
            reasons.append(
                f"gptq cannot say that {unit.block_list} is quantized but for "
                f"{unit.members[0]}: quantize the whole MTP layer or none of it"
            )
    return reasons


def declared_grid(block: Block, module: str) -> IntGrid | None:
    """What the configuration block says a Linear is built as, by vLLM's rules; None: unquantized.

    Raises CheckpointError for a block we cannot read.
    """
    try:
        return _declared(block, module)
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise CheckpointError(f"quantization_config cannot be read: {error!r}") from error


def sidecars(block: Block) -> dict[str, bytes]:
    """GPTQModel looks for the block in a file of its own."""
    return {"quantize_config.json": (json.dumps(block, indent=2) + "\n").encode()}


def _values(grid: IntGrid) -> dict[str, int]:
    return {"bits": grid.bits, "group_size": grid.group_size}


def _listed(units: Sequence[Unit]) -> list[list[str]]:
    """Entries for ``modules_in_block_to_quantize``: the decoder's units, then the MTP head's."""
    trunk = [unit for unit in units if not unit.block_list.startswith(f"{_MTP}.")]
    modules = [entries for unit in trunk if (entries := _entries(unit))]
    listed = {entry for entries in modules for entry in entries}
    for unit in units:
        if unit not in trunk and not listed.issuperset(unit.members):
            blocks = [f"{unit.block_list}.{number}" for number in sorted(unit.grids)]
            modules.append([f"{block}.{m}" for block in blocks for m in unit.members])
    return modules


def _entries(unit: Unit) -> list[str]:
    """Names of a unit's members, with block numbers only where blocks differ."""
    dense = unit.blocks_on(None)
    if not dense:
        return list(unit.members)
    # The list's own name stays out: Transformers' and vLLM's names of it differ.
    layers = unit.block_list.rpartition(".")[2]
    quantized = sorted(set(unit.grids).difference(dense))
    return [f"{layers}.{block}.{member}" for block in quantized for member in unit.members]


def _declared(block: Block, module: str) -> IntGrid | None:
    _refuse_unreadable(block)
    if module == LM_HEAD and not block.get("lm_head", False):
        return None
    listed = []
    for names in block["modules_in_block_to_quantize"]:
        listed += names if isinstance(names, list) else [names]
    values = dict(block)
    for pattern, changes in (block.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
            if pattern.startswith("-:"):
                return None
            values |= changes
            break
    if not any(name in module for name in listed):
        return None
    _refuse_unreadable(values)
    return declared(values["bits"], values["group_size"])


def _refuse_unreadable(block: Block) -> None:
    stored = block.get("checkpoint_format") or block.get("format") or "gptq"
    if stored != "gptq" or block.get("sym") is not True:
        raise CheckpointError(
            f"quantization_config has checkpoint_format {stored!r}, sym {block.get('sym')!r}: "
            "only symmetric 'gptq' (version 1) is read"
        )
    if block.get("desc_act") and block["group_size"] != -1:
        raise CheckpointError(
            "quantization_config has desc_act true: groups of inputs sorted by activation are not "
            "read, as engines dropped them; quantize with static groups"
        )
    if not block.get("modules_in_block_to_quantize"):
        raise CheckpointError(
            "quantization_config lacks modules_in_block_to_quantize: without it engines disagree "
            "about which Linears are quantized; add it"
        )


FORMAT = Format(
    name="gptq",
    bits=gptq_tensors.BITS,
    suffixes=(*gptq_tensors.SUFFIXES, gptq_tensors.GROUP_INDEX),
    idle_suffixes=(),
    dense_experts_apart=True,
    packed_specs=packed_specs,
    pack=pack,
    unpack=gptq_tensors.unpack,
    some_outputs=gptq_tensors.some_outputs,
    quantization_config=quantization_config,
    refusals=refusals,
    declared_grid=declared_grid,
    sidecars=sidecars,
)
