"""The ``compressed-tensors`` format, ``pack-quantized`` and symmetric, as llm-compressor writes it.

On disk, for a weight [N, K] in groups of g (G = K / g) of b bits: ``weight_packed`` int32
[N, K * b / 32], ``weight_scale`` bfloat16 [N, G], ``weight_shape`` int64 [2], which is (N, K).
Codes are stored as ``q + 2^(b-1)``, lowest bits first along K: the words are those of GPTQ,
transposed. There is no zero point. At 3 bits this is the layout of compressed-tensors 0.20 and
the one vLLM makes room for; compressed-tensors 0.17 put ten values into a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from nybble.checkpoint.writer import TensorSpec
from nybble.core.errors import CheckpointError
from nybble.packing.bits import PACKABLE_BITS, pack_codes, unpack_codes
from nybble.packing.format import (
    LM_HEAD,
    Block,
    Declaration,
    Format,
    declared,
    exact_scales,
    no_sidecars,
)
from nybble.packing.rules import Rules, common_refusals, refuse, same
from nybble.quant.grid import IntGrid, QuantizedWeight

BITS = PACKABLE_BITS
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape")

_STORED_AS = "pack-quantized"
_LINEAR = "Linear"
"""As a target: every Linear that no other target names. vLLM's output head is none."""
_REGEX = "re:"


def packed_specs(module: str, shape: tuple[int, int], grid: IntGrid) -> list[TensorSpec]:
    """Names, types and shapes of a module's stored tensors; shape is [N, K]."""
    outs, ins = shape
    return [
        TensorSpec(f"{module}.weight_packed", torch.int32, (outs, ins * grid.bits // 32)),
        TensorSpec(f"{module}.weight_scale", torch.bfloat16, (outs, grid.num_groups(ins))),
        TensorSpec(f"{module}.weight_shape", torch.int64, (2,)),
    ]


def pack(module: str, quantized: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The stored tensors of one module; raises CheckpointError for scales BF16 cannot hold."""
    return {
        f"{module}.weight_packed": pack_codes(quantized.codes, quantized.grid.bits),
        f"{module}.weight_scale": exact_scales(module, quantized.scales, torch.bfloat16),
        f"{module}.weight_shape": torch.tensor(quantized.codes.shape),
    }


def unpack(module: str, tensors: Mapping[str, torch.Tensor], grid: IntGrid) -> QuantizedWeight:
    """The inverse of ``pack``; raises CheckpointError for a shape that is not that of the codes."""
    codes = unpack_codes(tensors[f"{module}.weight_packed"], grid.bits)
    shape = tensors[f"{module}.weight_shape"].tolist()
    if shape != list(codes.shape):
        raise CheckpointError(
            f"{module}.weight_shape holds {shape}, but weight_packed is of {list(codes.shape)}"
        )
    return QuantizedWeight(codes, tensors[f"{module}.weight_scale"].float(), grid)


def some_outputs(
    module: str, tensors: Mapping[str, torch.Tensor], outputs: slice
) -> dict[str, torch.Tensor]:
    """The tensors of a module with some of its outputs alone."""
    packed, scale, shape = (f"{module}.{suffix}" for suffix in SUFFIXES)
    ins = tensors[shape][1:]
    return {
        packed: tensors[packed][outputs],
        scale: tensors[scale][outputs],
        shape: torch.cat([torch.tensor([outputs.stop - outputs.start]), ins]),
    }


def quantization_config(declaration: Declaration) -> dict[str, Any]:
    """The block for config.json; raises CheckpointError for what ``refusals`` lists."""
    refuse(refusals(declaration))
    rules = Rules(declaration)
    targets: list[tuple[IntGrid, list[str]]] = [(declaration.default, [_LINEAR])]
    for rule in rules.quantized:
        assert rule.grid is not None
        _add(targets, rule.grid, _REGEX + rule.pattern)
    if rules.lm_head is not None:
        _add(targets, rules.lm_head, f"{_REGEX}.*{LM_HEAD}$")
    ignored = [] if rules.lm_head is not None else [LM_HEAD]
    return {
        "quant_method": "compressed-tensors",
        "format": _STORED_AS,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": _group(grid, names) for number, (grid, names) in enumerate(targets)
        },
        "ignore": [*ignored, *(_REGEX + rule.pattern for rule in rules.dense)],
    }


def refusals(declaration: Declaration) -> list[str]:
    """Why engines would not read such a checkpoint in this format, one line each."""
    return common_refusals(declaration, BITS, "compressed-tensors")


def declared_grid(block: Block, module: str) -> IntGrid | None:
    """What the configuration block says a Linear is built as; None: unquantized.

    Ignored names first, then targets by name or pattern, then the class. Raises CheckpointError
    for a block we cannot read.
    """
    try:
        return _declared(block, module)
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise CheckpointError(f"quantization_config cannot be read: {error!r}") from error


def _add(targets: list[tuple[IntGrid, list[str]]], grid: IntGrid, name: str) -> None:
    for known, names in targets:
        if same(known, grid):
            names.append(name)
            return
    targets.append((grid, [name]))


def _group(grid: IntGrid, targets: list[str]) -> dict[str, Any]:
    # No key more than these: readers of other versions refuse keys they do not know.
    weights: dict[str, Any] = {"num_bits": grid.bits, "type": "int", "symmetric": True}
    if grid.group_size == -1:
        weights |= {"strategy": "channel", "dynamic": False}
    else:
        weights |= {"strategy": "group", "group_size": grid.group_size, "dynamic": False}
    return {
        "targets": targets,
        "format": _STORED_AS,
        "input_activations": None,
        "output_activations": None,
        "weights": weights,
    }


def _declared(block: Block, module: str) -> IntGrid | None:
    if any(_names(entry, module) for entry in block.get("ignore") or []):
        return None
    targets = [
        (target, group) for group in block["config_groups"].values() for target in group["targets"]
    ]
    for target, group in targets:
        if _names(target, module):
            return _grid_of(block, group)
    for target, group in targets:
        if target == _LINEAR and module != LM_HEAD:
            return _grid_of(block, group)
    return None


def _names(entry: str, module: str) -> bool:
    if entry.startswith(_REGEX):
        return re.match(entry.removeprefix(_REGEX), module) is not None
    return entry == module


def _grid_of(block: Block, group: Block) -> IntGrid:
    weights = group["weights"]
    stored = group.get("format") or block.get("format")
    refused = {
        "format": (stored, (_STORED_AS,)),
        "quantization_status": (block.get("quantization_status"), ("compressed",)),
        "type": (weights["type"], ("int",)),
        "symmetric": (weights["symmetric"], (True,)),
        "strategy": (weights["strategy"], ("group", "channel")),
        "dynamic": (weights.get("dynamic") or False, (False,)),
        "actorder": (weights.get("actorder"), (None, "static", "weight")),
        "input_activations": (group.get("input_activations"), (None,)),
    }
    for key, (found, known) in refused.items():
        if found not in known:
            raise CheckpointError(
                f"quantization_config has {key} {found!r}: only symmetric integer weights, "
                f"{_STORED_AS} in groups or per channel, are read"
            )
    group_size = weights["group_size"] if weights["strategy"] == "group" else -1
    return declared(weights["num_bits"], group_size)


FORMAT = Format(
    name="compressed-tensors",
    bits=BITS,
    suffixes=SUFFIXES,
    idle_suffixes=(),
    # Transformers merges packed experts into its stacks, and chokes on dense ones among them.
    dense_experts_apart=False,
    packed_specs=packed_specs,
    pack=pack,
    unpack=unpack,
    some_outputs=some_outputs,
    quantization_config=quantization_config,
    refusals=refusals,
    declared_grid=declared_grid,
    sidecars=no_sidecars,
)
