"""A checkpoint as dense weights, one block at a time: base or quantized, in any format we read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

import torch

from nybble.arch.blocks import expected_shapes
from nybble.arch.registry import architecture_in
from nybble.checkpoint.reader import CheckpointReader
from nybble.core.cpu import flush_denormals
from nybble.core.errors import CheckpointError
from nybble.engine.stored import stored_grids, stored_parts
from nybble.packing.format import Format
from nybble.packing.formats import format_of
from nybble.quant.grid import IntGrid, QuantizedWeight


class ModelWeights:
    """An open checkpoint. Quantized weights come as exactly the values that engines compute with.

    ``arch`` is its architecture, ``shapes`` has the dense shape of every parameter by name. The
    constructor raises CheckpointError if the checkpoint is incomplete, or stored otherwise than
    it declares.
    """

    def __init__(self, folder: Path) -> None:
        flush_denormals()
        self.reader = CheckpointReader(folder)
        self.arch = architecture_in(self.reader.config, self.reader.index)
        self.shapes = expected_shapes(self.arch)
        self._grids = stored_grids(self.arch, self.reader.index, self.reader.config)

    def __enter__(self) -> ModelWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.reader.close()

    def parameter(self, name: str) -> torch.Tensor:
        """One parameter, in memory of its own; stacks of experts are put together."""
        grid, shape = self._grids[name], self.shapes[name]
        parts = [part for part, _ in stored_parts(self.arch, self.reader.index, name, shape)]
        if parts == [name]:
            return dense_weight(self.reader, name, grid)
        return torch.cat([dense_weight(self.reader, part, grid) for part in parts]).view(shape)

    def block(
        self, index: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """A block's parameters, by name within it; the MTP layer is the block after the last."""
        return self.under(self.arch.block_prefix(index), device, dtype)

    def under(
        self, prefix: str, device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """All parameters whose names start with ``prefix``, by the rest of the name."""
        weights = {
            name.removeprefix(prefix): self.parameter(name).to(device, dtype)
            for name in self.shapes
            if name.startswith(prefix)
        }
        self.reader.release()
        return weights

    def embedded(self, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the first block sees, [..., D] on the CPU, of token ids of any shape.

        Models round the scale of their embeddings to their own dtype as well. Raises
        CheckpointError for an id beyond the table.
        """
        table = self.reader.view(self.arch.embedding)
        if len(token_ids) and int(token_ids.max()) >= len(table):
            raise CheckpointError(
                f"{self.reader.index.folder}: the text has token {int(token_ids.max())}, but the "
                f"embedding has {len(table)} rows: the tokenizer is another model's"
            )
        embedded = table[token_ids].to(dtype)
        self.reader.release()
        return embedded.mul_(torch.tensor(self.arch.embedding_scale, dtype=dtype))

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output head, [stop - start, D] on the CPU, as stored or de-quantized."""
        name = self.arch.lm_head
        grid = self._grids[name]
        if grid is None:
            rows = self.reader.view(name)[start:stop].clone()
        else:
            rows = _quantized(self.reader, name, grid, slice(start, stop)).dequantize()
        self.reader.release()
        return rows

    def head_sha256(self) -> str | None:
        """Of the output head's bytes; None if it is quantized."""
        name = self.arch.lm_head
        return None if self._grids[name] is not None else self.reader.sha256(name)

    def sha256(self) -> str:
        """One hash, in hex, of all tensors: of the lines ``name sha256``, sorted by name."""
        digest = hashlib.sha256()
        for name in sorted(self.reader.index.tensors):
            digest.update(f"{name} {self.reader.sha256(name)}\n".encode())
        return digest.hexdigest()

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self.shapes[self.arch.lm_head][0]


def dense_weight(reader: CheckpointReader, name: str, grid: IntGrid | None) -> torch.Tensor:
    """One tensor as engines see it: as stored, or de-quantized from its packed form (float32)."""
    return reader.read(name) if grid is None else _quantized(reader, name, grid).dequantize()


def quantized_weight(
    reader: CheckpointReader,
    module: str,
    grid: IntGrid,
    stored_as: Format,
    outputs: slice | None = None,
) -> QuantizedWeight:
    """Codes and scales of one Linear, or of some of its outputs (see ``Format.some_outputs``).

    Raises CheckpointError if its tensors do not mean any.
    """
    idle = [suffix for suffix in stored_as.idle_suffixes if f"{module}.{suffix}" in reader.index]
    names = [f"{module}.{suffix}" for suffix in (*stored_as.suffixes, *idle)]
    if outputs is None:
        return stored_as.unpack(module, {name: reader.read(name) for name in names}, grid)
    tensors = {name: reader.view(name) for name in names}
    return stored_as.unpack(module, stored_as.some_outputs(module, tensors, outputs), grid)


def _quantized(
    reader: CheckpointReader, name: str, grid: IntGrid, outputs: slice | None = None
) -> QuantizedWeight:
    stored_as = format_of(reader.config)
    assert stored_as is not None
    return quantized_weight(reader, name.removesuffix(".weight"), grid, stored_as, outputs)
