"""The formats there are; a new one is a file that makes a ``Format``, and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from nybble.core.errors import CheckpointError
from nybble.packing import auto_round, compressed_tensors, gptq
from nybble.packing.format import Format

FORMATS: Mapping[str, Format] = MappingProxyType(
    {chosen.name: chosen for chosen in (auto_round.FORMAT, gptq.FORMAT, compressed_tensors.FORMAT)}
)
"""By the name a recipe gives."""

_BY_METHOD = MappingProxyType(
    {
        "auto-round": auto_round.FORMAT,
        "gptq": gptq.FORMAT,
        "compressed-tensors": compressed_tensors.FORMAT,
    }
)


def format_of(config: Mapping[str, Any]) -> Format | None:
    """The format that config.json declares; None: the checkpoint is not quantized.

    Raises CheckpointError for one we do not read.
    """
    block = config.get("quantization_config")
    if block is None:
        return None
    method = block.get("quant_method") if isinstance(block, dict) else None
    if not isinstance(method, str) or method not in _BY_METHOD:
        raise CheckpointError(
            f"config.json has a quantization_config of quant_method {method!r}: "
            f"{', '.join(_BY_METHOD)} are read"
        )
    return _BY_METHOD[method]
