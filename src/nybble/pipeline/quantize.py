"""The main path: a base checkpoint becomes a quantized one, block by block.

Peak memory: one block (its weights, and what the algorithm needs to train them), the
calibration rows' two activation streams, and nothing of the rest of the model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nybble.arch.blocks import BlockRunner
from nybble.arch.plan import Quantize, TensorPlan, plan_tensors
from nybble.arch.registry import architecture_of
from nybble.arch.spec import Architecture
from nybble.checkpoint.headers import TORCH_DTYPES
from nybble.checkpoint.reader import CheckpointReader
from nybble.checkpoint.sidecar import copy_sidecars, write_config
from nybble.checkpoint.writer import ShardWriter, TensorSpec, plan_shards
from nybble.core.errors import CheckpointError, QuantizationError, RecipeError
from nybble.data.rows import Rows, build_rows
from nybble.packing import auto_round
from nybble.pipeline.block import (
    Block,
    BlockResult,
    Calibrated,
    quantize_block,
    quantize_block_data_free,
)
from nybble.pipeline.device import compute_dtype, resolve_device
from nybble.pipeline.events import OnEvent, Step, ignore
from nybble.pipeline.manifest import (
    Cost,
    RunFacts,
    TensorRecord,
    job_fingerprint,
    peak_rss_bytes,
    write_manifest,
)
from nybble.pipeline.output import MANIFEST, is_finished, staged_folder
from nybble.pipeline.quant_log import QuantLogRow, write_quant_log
from nybble.pipeline.streams import Streams
from nybble.pipeline.verify import verify_result
from nybble.quant.grid import IntGrid
from nybble.recipe.schema import Recipe, Rtn

QUANT_LOG = "quant_log.csv"
_PIECE = 1 << 22
"""Elements looked at in one go, so that a large table does not become resident."""


@dataclass(frozen=True)
class QuantizeResult:
    """Where the checkpoint is, and whether this call made it or found it finished."""

    out: Path
    already_finished: bool


def quantize(
    model: Path, out: Path, recipe: Recipe, device: str = "auto", on_event: OnEvent = ignore
) -> QuantizeResult:
    """Quantizes the base checkpoint in folder ``model`` to a new folder ``out``.

    ``out`` appears whole or not at all. Raises a NybbleError for anything wrong with the input.
    """
    began = time.monotonic()
    where = resolve_device(device)
    with CheckpointReader(model) as reader:
        arch, plan = planned(reader, recipe)
        rows = calibration_rows(recipe, model, arch)
        job = job_fingerprint(recipe, reader, rows)
        if is_finished(out, job):
            return QuantizeResult(out, already_finished=True)
        layout = plan_shards(output_specs(plan), int(recipe.max_shard_gb * 1e9))
        with staged_folder(out) as staging:
            with ShardWriter(staging, layout) as writer:
                run = _Run(recipe, reader, arch, plan, writer, {}, {}, [])
                run.quantize_blocks(rows, where, on_event)
                run.copy_kept()
                writer.finish()
            grid = grid_of(recipe)
            write_config(
                staging, reader.config, auto_round.quantization_config(arch.blocks_prefix, grid)
            )
            copy_sidecars(model, staging)
            write_quant_log(staging / QUANT_LOG, run.log)
            verify_result(staging, reader, plan)
            facts = RunFacts(
                job=job,
                base=model.resolve().name,
                base_sha256=run.base_sha256,
                recipe=recipe,
                rows=rows,
                device=str(where),
                compute_dtype=str(compute_dtype(where)).removeprefix("torch."),
                tensors=run.records,
                cost=Cost(time.monotonic() - began, peak_rss_bytes()),
            )
            write_manifest(staging / MANIFEST, facts)
    return QuantizeResult(out, already_finished=False)


def planned(reader: CheckpointReader, recipe: Recipe) -> tuple[Architecture, TensorPlan]:
    """The architecture and every tensor's fate; raises PlanError and friends."""
    if "quantization_config" in reader.config:
        raise CheckpointError(f"{reader.index.folder} is quantized already: give a BF16 base")
    arch = architecture_of(reader.config)
    return arch, plan_tensors(arch, reader.index, grid_of(recipe))


def grid_of(recipe: Recipe) -> IntGrid:
    """The recipe's scheme as the quantizers' grid."""
    scheme = recipe.scheme
    return IntGrid(scheme.bits, scheme.group_size, scheme.signed_scales)


def needs_text(recipe: Recipe) -> bool:
    """Whether the algorithm looks at calibration text at all."""
    return not (isinstance(recipe.algorithm, Rtn) and recipe.algorithm.scale_init != "importance")


def calibration_rows(recipe: Recipe, model: Path, arch: Architecture) -> Rows | None:
    """The calibration rows, tokenized by the model's own tokenizer; None if none are needed."""
    if not needs_text(recipe):
        return None
    longest = arch.text_config.max_position_embeddings
    if recipe.calibration.seqlen > longest:
        raise RecipeError(
            f"calibration.seqlen is {recipe.calibration.seqlen}, but the model knows only "
            f"{longest} positions (max_position_embeddings)"
        )
    rows = build_rows(recipe.calibration, load_tokenizer(model))
    vocab = arch.text_config.vocab_size
    if int(rows.token_ids.max()) >= vocab:
        raise CheckpointError(
            f"the tokenizer of {model} yields id {int(rows.token_ids.max())}, but the model's "
            f"vocabulary has {vocab} entries: tokenizer and model do not belong together"
        )
    return rows


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint folder; raises CheckpointError if there is no usable one."""
    # Without these, transformers makes up an empty tokenizer from config.json.
    if not any((model / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise CheckpointError(f"{model} has no usable tokenizer: there is no tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # foreign files: transformers raises anything
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{model} has no usable tokenizer: {reason}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def output_specs(plan: TensorPlan) -> list[TensorSpec]:
    """Every tensor of the result, in the base's order; a quantized weight's parts in its place."""
    specs = []
    for name, fate in plan.fates.items():
        info = plan.infos[name]
        if isinstance(fate, Quantize):
            shape = (info.shape[0], info.shape[1])
            specs += auto_round.packed_specs(fate.module, shape, fate.grid)
        else:
            specs.append(TensorSpec(name, TORCH_DTYPES[info.dtype], info.shape))
    return specs


@dataclass(frozen=True)
class _Run:
    """One run's open files and what it has recorded so far."""

    recipe: Recipe
    reader: CheckpointReader
    arch: Architecture
    plan: TensorPlan
    writer: ShardWriter
    records: dict[str, TensorRecord]
    base_sha256: dict[str, str]
    log: list[QuantLogRow]

    def quantize_blocks(self, rows: Rows | None, device: torch.device, on_event: OnEvent) -> None:
        calibrated = self._calibrated(rows, device) if rows else None
        steps = getattr(self.recipe.algorithm, "iters", 1)
        for index in range(self.arch.num_blocks):
            block = self._load(index, device)
            if calibrated is None:
                result = quantize_block_data_free(block, self.recipe)
            else:
                on_step = partial(self._tell, on_event, index, steps)
                result = quantize_block(block, self.recipe, calibrated, on_step)
            self._write(result)
            self.reader.release()
            on_event(Step(index, self.arch.num_blocks, steps, steps, result.log[0].block_loss))

    def copy_kept(self) -> None:
        """Copies every kept tensor byte for byte; refuses one that is not finite."""
        for name, _ in self.plan.kept():
            self._refuse_non_finite(name)
            sha256 = self.writer.write_raw(name, self.reader.raw_chunks(name))
            self.records[name] = TensorRecord("kept", sha256)

    def _calibrated(self, rows: Rows, device: torch.device) -> Calibrated:
        dtype = compute_dtype(device)
        runner = BlockRunner(self.arch, rows.token_ids.shape[1], device, dtype)
        self._refuse_non_finite(self.arch.embedding)
        table = self.reader.view(self.arch.embedding)
        embedded = table[rows.token_ids].to(dtype)
        self.reader.release()
        return Calibrated(runner, Streams.begin(embedded, device), dtype)

    def _load(self, index: int, device: torch.device) -> Block:
        prefix = self.arch.block_prefix(index)
        fates = self.plan.quantized(index)
        for info in self.reader.index.with_prefix(prefix):
            self._refuse_non_finite(info.name)
        self.base_sha256.update({name: self.reader.sha256(name) for name in fates})
        weights = {n: t.to(device) for n, t in self.reader.read_prefix(prefix).items()}
        return Block(index, weights, {n.removeprefix(prefix): f for n, f in fates.items()})

    def _write(self, result: BlockResult) -> None:
        for module, quantized in result.quantized.items():
            for name, tensor in auto_round.pack(module, quantized).items():
                self.records[name] = TensorRecord("quantized", self.writer.write(name, tensor))
        self.log.extend(result.log)

    def _refuse_non_finite(self, name: str) -> None:
        bad = 0
        for piece in self.reader.view(name).reshape(-1).split(_PIECE):
            bad += int((~torch.isfinite(piece)).sum())
            self.reader.release()
        if bad:
            raise QuantizationError(
                f"{name} of the base has {bad} NaN or infinite values: get a sound checkpoint"
            )

    def _tell(self, on_event: OnEvent, index: int, steps: int, step: int, loss: float) -> None:
        if step + 1 < steps:  # the last one is told when the whole block is done
            on_event(Step(index, self.arch.num_blocks, step + 1, steps, loss))
