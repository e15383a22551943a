"""A whole checkpoint in memory as dense torch modules, base or quantized.

For models that fit: the bundled tiny one, tests, small models. Quantized weights are de-quantized
to exactly the values the engines compute with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nybble.arch.blocks import expected_shapes
from nybble.arch.registry import architecture_in
from nybble.arch.spec import Architecture
from nybble.checkpoint.reader import CheckpointReader
from nybble.core.cpu import flush_denormals
from nybble.engine.stored import stored_grids, stored_parts
from nybble.packing.format import Format
from nybble.packing.formats import format_of
from nybble.quant.grid import IntGrid, QuantizedWeight


@dataclass(frozen=True)
class LoadedModel:
    """Trunk, head and MTP head of one checkpoint, sharing device and dtype."""

    arch: Architecture
    trunk: Any  # transformers' text model: its forward is looked up at run time
    lm_head: torch.Tensor
    """[V, D]"""
    mtp: nn.Module | None

    @torch.no_grad()
    def hidden(self, token_ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Trunk output after the final norm, [B, T, D]; token_ids int64 [B, T]."""
        output = self.trunk(
            input_ids=token_ids, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state
        assert isinstance(output, torch.Tensor)
        return output

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [..., V] of hidden states [..., D] (of the trunk or of the MTP head)."""
        return (hidden @ self.lm_head.T).float()

    @torch.no_grad()
    def drafted(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """MTP output for each position but the last, [B, T-1, D], teacher-forced.

        Position t combines ``hidden[:, t]`` with token t+1; its logits predict token t+2.
        """
        assert self.mtp is not None
        length = token_ids.shape[1] - 1
        positions = torch.arange(length, device=token_ids.device)[None]
        rotary = self.trunk.rotary_emb(hidden, positions)
        next_embeds = self.trunk.embed_tokens(token_ids[:, 1:])
        output = self.mtp(hidden[:, :-1], next_embeds, rotary, None)
        assert isinstance(output, torch.Tensor)
        return output


def load_model(
    folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Loads a checkpoint of any format we write, or a base.

    Raises CheckpointError if it is incomplete, or stored otherwise than it declares.
    """
    flush_denormals()
    with CheckpointReader(folder) as reader:
        arch = architecture_in(reader.config, reader.index)
        grids = stored_grids(arch, reader.index, reader.config)
        weights = {
            name: _parameter(reader, arch, name, shape, grids[name]).to(device, dtype)
            for name, shape in expected_shapes(arch).items()
        }
    with torch.device("meta"):
        trunk = arch.build_text_model().eval()
        mtp = arch.mtp.build().eval() if arch.mtp else None
    # Buffers (inverse frequencies) are computed, not stored.
    trunk.rotary_emb = type(trunk.rotary_emb)(config=arch.text_config).to(device)
    trunk.load_state_dict(_under(weights, arch.text_prefix), assign=True)
    if mtp is not None and arch.mtp is not None:
        mtp.load_state_dict(_under(weights, arch.mtp.prefix), assign=True)
    return LoadedModel(arch, trunk.requires_grad_(False), weights[arch.lm_head], mtp)


def dense_weight(reader: CheckpointReader, name: str, grid: IntGrid | None) -> torch.Tensor:
    """One tensor as engines see it: as stored, or de-quantized from its packed form (float32)."""
    if grid is None:
        return reader.read(name)
    stored_as = format_of(reader.config)
    assert stored_as is not None
    return quantized_weight(reader, name.removesuffix(".weight"), grid, stored_as).dequantize()


def quantized_weight(
    reader: CheckpointReader, module: str, grid: IntGrid, stored_as: Format
) -> QuantizedWeight:
    """Codes and scales of one Linear; raises CheckpointError if its tensors do not mean any."""
    idle = [suffix for suffix in stored_as.idle_suffixes if f"{module}.{suffix}" in reader.index]
    names = [f"{module}.{suffix}" for suffix in (*stored_as.suffixes, *idle)]
    return stored_as.unpack(module, {name: reader.read(name) for name in names}, grid)


def _parameter(
    reader: CheckpointReader,
    arch: Architecture,
    name: str,
    shape: tuple[int, ...],
    grid: IntGrid | None,
) -> torch.Tensor:
    parts = [part for part, _ in stored_parts(arch, reader.index, name, shape)]
    if parts == [name]:
        return dense_weight(reader, name, grid)
    return torch.cat([dense_weight(reader, part, grid) for part in parts]).view(shape)


def _under(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }
