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
    if not bool((zeros == offset - 1).all()):
        raise CheckpointError(
            f"{module}.qzeros holds {int(zeros.flatten()[0])} where symmetric weights of this "
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

    The rules, in the order in which vLLM's and AutoRound's loaders apply them: exact key, list of
    blocks, regular expressions, default. Raises CheckpointError for a block we cannot read.
    """
    if config.get("packing_format") != "auto_round:auto_gptq" or config.get("sym") is not True:
        raise CheckpointError(
            f"quantization_config has packing_format {config.get('packing_format')!r}, sym "
            f"{config.get('sym')!r}: only symmetric 'auto_round:auto_gptq' is read"
        )
    extra: Mapping[str, Mapping[str, Any]] = config.get("extra_config", {})
    if module in extra:
        return _grid_of({**extra[module]}, config)
    blocks = config.get("block_name_to_quantize")
    prefixes = blocks.split(",") if isinstance(blocks, str) else blocks
    if prefixes and not any(module.startswith(prefix) for prefix in prefixes):
        return None
    if module == "lm_head":
        return None
    for pattern, override in extra.items():
        if re.search(pattern, module):
            return _grid_of(override, config)
    return _grid_of({}, config)


def _grid_of(override: Mapping[str, Any], config: Mapping[str, Any]) -> IntGrid | None:
    # A key without bits means 16 to vLLM, whatever the default is.
    bits = override.get("bits", 16) if override else config["bits"]
    if bits >= 16:
        return None
    group_size = override.get("group_size", config["group_size"])
    return IntGrid(bits=bits, group_size=group_size, signed_scales=True)
