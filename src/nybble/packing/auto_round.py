"""The ``auto_round:auto_gptq`` format: GPTQ v1 tensors with AutoRound's configuration block.

On disk, for a weight [N, K] in groups of g (G = K / g) of b bits, p = 32 / b codes a word:
``qweight`` int32 [K/p, N], ``scales`` float16 [G, N], ``qzeros`` int32 [G, N/p]. Codes are stored
as ``q + 2^(b-1)``, lowest bits first along K. ``qzeros`` holds the zero point 2^(b-1) minus one:
vLLM ignores it for symmetric weights, Transformers adds the one back, so a wrong value would show
in one engine only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from nybble.checkpoint.writer import TensorSpec
from nybble.core.errors import CheckpointError
from nybble.packing.bits import pack_words, unpack_words
from nybble.quant.grid import IntGrid, QuantizedWeight

SUFFIXES = ("qweight", "qzeros", "scales")

# Of AutoRound 0.16.1, whose zero-point convention we follow: its loader reads this key.
_AUTOROUND_VERSION = "0.16.1"

# Read by every engine: regex keys, valid for Hugging Face's, vLLM's fused and SGLang's names.
KEPT_PATTERNS = (".*in_proj_(a|b|ba)$", ".*mtp.*", ".*visual.*")

# A key without any of these is a name to engines, never a pattern.
_REGEX_SIGNS = frozenset("*+?^$()[]{}|\\")


def packed_specs(module: str, shape: tuple[int, int], grid: IntGrid) -> list[TensorSpec]:
    """Names, types and shapes of a module's stored tensors; shape is [N, K]."""
    outs, ins = shape
    per_word = 32 // grid.bits
    groups = grid.num_groups(ins)
    return [
        TensorSpec(f"{module}.qweight", torch.int32, (ins // per_word, outs)),
        TensorSpec(f"{module}.qzeros", torch.int32, (groups, outs // per_word)),
        TensorSpec(f"{module}.scales", torch.float16, (groups, outs)),
    ]


def pack(module: str, quantized: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The stored tensors of one module."""
    grid = quantized.grid
    offset = -grid.lowest
    words = pack_words(quantized.codes.to(torch.int32) + offset, grid.bits)
    outs, groups = quantized.scales.shape
    zeros = torch.full((groups, outs), offset - 1, dtype=torch.int32)
    return {
        f"{module}.qweight": words.T.contiguous(),
        f"{module}.qzeros": pack_words(zeros, grid.bits),
        f"{module}.scales": quantized.scales.T.contiguous().half(),
    }


def unpack(module: str, tensors: Mapping[str, torch.Tensor], grid: IntGrid) -> QuantizedWeight:
    """The inverse of ``pack``; raises CheckpointError if the zero points are not symmetric."""
    offset = -grid.lowest
    zeros = unpack_words(tensors[f"{module}.qzeros"], grid.bits)
    wrong = zeros[zeros != offset - 1]
    if len(wrong):
        raise CheckpointError(
            f"{module}.qzeros holds {int(wrong[0])} where symmetric weights of this "
            f"format hold {offset - 1}"
        )
    unsigned = unpack_words(tensors[f"{module}.qweight"].T.contiguous(), grid.bits)
    codes = (unsigned.to(torch.int16) - offset).to(torch.int8)
    scales = tensors[f"{module}.scales"].T.contiguous().float()
    return QuantizedWeight(codes, scales, grid)


def quantization_config(block_prefix: str, grid: IntGrid) -> dict[str, Any]:
    """The block for config.json; ``block_prefix`` names the list of decoder layers."""
    kept = {"bits": 16, "data_type": "fp"}
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": True,
        "data_type": "int",
        "autoround_version": _AUTOROUND_VERSION,
        "block_name_to_quantize": block_prefix,
        "extra_config": {pattern: dict(kept) for pattern in KEPT_PATTERNS},
    }


def declared_grid(config: Mapping[str, Any], module: str) -> IntGrid | None:
    """What the configuration block says a Linear is built as; None: unquantized.

    The rules, in the order in which vLLM 0.28 and later apply them: a key that is the name or ends
    it; the list of blocks; keys that are regular expressions; the default. Raises CheckpointError
    for a block we cannot read.
    """
    try:
        return _declared(config, module)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"quantization_config cannot be read: {error!r}") from error


def _declared(config: Mapping[str, Any], module: str) -> IntGrid | None:
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
    bits = 16 if outside or module == "lm_head" else config["bits"]
    for pattern, override in extra.items():
        if _REGEX_SIGNS.intersection(pattern) and _found(pattern, module):
            return _grid_of(config, override, bits)
    return _grid_of(config, {}, bits)


def _found(pattern: str, module: str) -> bool:
    try:
        return re.search(pattern, module) is not None
    except re.error:  # engines skip such a key
        return False


def _grid_of(config: Mapping[str, Any], override: Mapping[str, Any], bits: int) -> IntGrid | None:
    bits = override.get("bits", bits)
    if bits >= 16:
        return None
    if override.get("sym", True) is not True:
        raise CheckpointError("quantization_config declares asymmetric weights: these are not read")
    group_size = override.get("group_size", config["group_size"])
    return IntGrid(bits=bits, group_size=group_size, signed_scales=True)
