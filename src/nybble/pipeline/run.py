"""One run: blocks are loaded, quantized, written and forgotten; the rest is copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from nybble.arch.blocks import BlockRunner
from nybble.arch.plan import Quantize, TensorPlan
from nybble.arch.spec import Architecture
from nybble.checkpoint.reader import CheckpointReader
from nybble.checkpoint.writer import ShardWriter
from nybble.core.errors import QuantizationError
from nybble.data.rows import Rows
from nybble.engine.device import compute_dtype
from nybble.packing.format import Format
from nybble.pipeline.algorithms import quantize_block
from nybble.pipeline.assemble import block_parameters, load_block, target_of
from nybble.pipeline.block import Block, Calibrated, Rounded, Target
from nybble.pipeline.events import OnEvent, Step
from nybble.pipeline.heads import enter_mtp_layer, quantize_head
from nybble.pipeline.manifest import TensorRecord
from nybble.pipeline.quant_log import BlockLog, QuantLogRow
from nybble.pipeline.streams import Streams
from nybble.quant.grid import QuantizedWeight
from nybble.quant.metrics import sqnr_db
from nybble.recipe.schema import Recipe

_PIECE = 1 << 22
"""Elements looked at in one go, so that a large table does not become resident."""


@dataclass(frozen=True)
class Run:
    """One run's open files and what it has recorded so far."""

    recipe: Recipe
    format: Format
    reader: CheckpointReader
    arch: Architecture
    plan: TensorPlan
    writer: ShardWriter
    device: torch.device
    records: dict[str, TensorRecord]
    base_sha256: dict[str, str]
    log: list[QuantLogRow]

    def quantize_all(self, rows: Rows | None, on_event: OnEvent) -> None:
        """The trunk's blocks in order, then the output head and the MTP layer if asked for."""
        calibrated = self._calibrated(rows) if rows else None
        for index in range(self.arch.num_blocks):
            self._quantize_block(index, calibrated, on_event)
        head = target_of(self.plan, self.arch.lm_head)
        if head is not None:
            self._quantize_head(head, calibrated)
        if self.plan.quantized(self.arch.num_blocks):
            if calibrated and rows:
                calibrated = self._enter_mtp_layer(calibrated, rows)
            self._quantize_block(self.arch.num_blocks, calibrated, on_event)

    def copy_kept(self) -> None:
        """Copies every kept tensor byte for byte; refuses one that is not finite."""
        for name, fate in self.plan.kept():
            self._refuse_non_finite(name)
            if fate.modules:
                rows = self.reader.view(name).flatten(0, -2).chunk(len(fate.modules))
                for module, part in zip(fate.modules, rows, strict=True):
                    sha256 = self.writer.write(f"{module}.weight", part)
                    self.records[f"{module}.weight"] = TensorRecord("kept", sha256)
                self.reader.release()
            else:
                sha256 = self.writer.write_raw(name, self.reader.raw_chunks(name))
                self.records[name] = TensorRecord("kept", sha256)

    def _calibrated(self, rows: Rows) -> Calibrated:
        dtype = compute_dtype(self.device)
        runner = BlockRunner(self.arch, rows.token_ids.shape[1], self.device, dtype)
        self._refuse_non_finite(self.arch.embedding)
        embedded = self._embedded(rows.token_ids, dtype)
        mask = rows.mask()
        streams = Streams(
            quantized=embedded,
            base=embedded.clone() if self.recipe.trains else None,
            mask=None if bool(mask.all()) else mask,
            device=self.device,
        )
        return Calibrated(runner, streams, dtype)

    def _embedded(self, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As the first block sees them; models round the scale to their own dtype as well."""
        table = self.reader.view(self.arch.embedding)
        embedded = table[token_ids].to(dtype)
        self.reader.release()
        return embedded.mul_(torch.tensor(self.arch.embedding_scale, dtype=dtype))

    def _quantize_block(self, index: int, calibrated: Calibrated | None, on_event: OnEvent) -> None:
        for parameter in block_parameters(self.arch, self.plan, index):
            for name in self.plan.sources[parameter]:
                self._refuse_non_finite(name)
        self._hash_sources(self.plan.quantized(index))
        block = load_block(self.reader, self.arch, self.plan, index, self.device)
        steps = max(1, getattr(self.recipe.algorithm, "iters", 1))
        total = self.arch.num_blocks + bool(self.plan.quantized(self.arch.num_blocks))
        on_step = partial(_tell, on_event, (index, total), steps)
        rounded, log = quantize_block(block, self.recipe, calibrated, on_step)
        for name, result in rounded.items():
            self._store(block, name, result, log)
        self.reader.release()
        on_event(Step(index, total, steps, steps, log.loss))

    def _quantize_head(self, target: Target, calibrated: Calibrated | None) -> None:
        name = self.arch.lm_head
        for read in (name, self.arch.final_norm):
            self._refuse_non_finite(read)
        self._hash_sources({name: None})
        weight = self.reader.view(name).to(self.device)
        norm = self.reader.read(self.arch.final_norm).to(self.device)
        head = Block(self.arch.num_blocks + 1, {name: weight}, {name: target}, ((name,),))
        rounded, log = quantize_head(head, self.recipe, calibrated, norm)
        self._store(head, name, rounded, log)
        self.reader.release()

    def _enter_mtp_layer(self, calibrated: Calibrated, rows: Rows) -> Calibrated:
        mtp = self.arch.mtp
        assert mtp is not None
        own = [name for name in mtp.shapes if not name.startswith(mtp.layer_prefix)]
        for name in (*own, self.arch.final_norm):
            self._refuse_non_finite(name)
        head = {name: self.reader.read(name) for name in own}
        norm = self.reader.read(self.arch.final_norm).to(self.device)
        next_embeds = self._embedded(rows.token_ids[:, 1:], calibrated.dtype)
        return enter_mtp_layer(self.arch, calibrated, head, norm, next_embeds)

    def _hash_sources(self, names: Mapping[str, Quantize | None]) -> None:
        self.base_sha256.update({name: self.reader.sha256(name) for name in names})

    def _store(self, block: Block, name: str, result: Rounded, log: BlockLog) -> None:
        """Writes and records every Linear of a quantized parameter."""
        target, matrix = block.targets[name], block.matrix(name)
        outs = len(matrix) // len(target.modules)
        for number, (module, facts) in enumerate(zip(target.modules, result.facts, strict=True)):
            rows = slice(number * outs, (number + 1) * outs)
            weight = result.weight
            part = QuantizedWeight(weight.codes[rows], weight.scales[rows], weight.grid)
            for stored, tensor in self.format.pack(module, part).items():
                sha256 = self.writer.write(stored, tensor)
                self.records[stored] = TensorRecord("quantized", sha256)
            self.log.append(
                QuantLogRow(
                    module=module,
                    block=block.index,
                    part=target.part,
                    out_features=outs,
                    in_features=matrix.shape[1],
                    bits=weight.grid.bits,
                    group_size=weight.grid.group_size,
                    algorithm=self.recipe.algorithm.name,
                    tokens=facts.tokens,
                    rtn_output_error=facts.rtn_output_error,
                    output_error=facts.output_error,
                    sqnr_db=sqnr_db(matrix[rows], part),
                    damping=facts.damping,
                    damping_increases=facts.damping_increases,
                    dead_channels=facts.dead_channels,
                    too_few_tokens=facts.too_few_tokens,
                    block_loss_start=log.loss_start,
                    block_loss=log.loss,
                    best_iter=log.best_iter,
                    seconds=facts.seconds,
                    block_seconds=log.seconds,
                )
            )

    def _refuse_non_finite(self, name: str) -> None:
        bad = 0
        for piece in self.reader.view(name).reshape(-1).split(_PIECE):
            bad += int((~torch.isfinite(piece)).sum())
            self.reader.release()
        if bad:
            raise QuantizationError(
                f"{name} of the base has {bad} NaN or infinite values: get a sound checkpoint"
            )


def _tell(on_event: OnEvent, place: tuple[int, int], steps: int, step: int, loss: float) -> None:
    if step + 1 < steps:  # the last one is told when the whole block is done
        on_event(Step(*place, step + 1, steps, loss))
