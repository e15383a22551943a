"""The main path: a base checkpoint becomes a quantized one, block by block.

Peak memory: one block (its weights, and what the algorithm needs to train them), the
calibration rows' two activation streams, and nothing of the rest of the model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nybble.arch.plan import Quantize, TensorPlan, plan_tensors
from nybble.arch.registry import architecture_in, refuse_other_names
from nybble.arch.spec import Architecture
from nybble.checkpoint.dtypes import TORCH_DTYPES
from nybble.checkpoint.reader import CheckpointReader
from nybble.checkpoint.sidecar import copy_sidecars, write_config
from nybble.checkpoint.staging import staged_folder
from nybble.checkpoint.writer import ShardWriter, TensorSpec, plan_shards
from nybble.core.atomic import write_bytes_atomic
from nybble.core.errors import CheckpointError, RecipeError
from nybble.data.rows import Rows, build_rows
from nybble.engine.declare import declaration
from nybble.engine.device import compute_dtype, resolve_device
from nybble.packing.format import Format
from nybble.packing.formats import FORMATS
from nybble.pipeline.events import OnEvent, ignore
from nybble.pipeline.manifest import (
    Cost,
    RunFacts,
    job_fingerprint,
    peak_rss_bytes,
    write_manifest,
)
from nybble.pipeline.output import MANIFEST, is_finished
from nybble.pipeline.quant_log import write_quant_log
from nybble.pipeline.run import Run
from nybble.pipeline.verify import verify_result
from nybble.recipe.schema import Recipe

QUANT_LOG = "quant_log.csv"


@dataclass(frozen=True)
class QuantizeResult:
    """Where the checkpoint is, and whether this call made it or found it finished."""

    out: Path
    already_finished: bool
    experts: int = 0
    """Routed experts that were quantized, over all blocks."""
    starved_experts: int = 0
    """Those of them that saw too few calibration tokens."""


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
        file_format = FORMATS[recipe.format]
        declared = file_format.quantization_config(declaration(arch, plan.grids()))
        rows = calibration_rows(recipe, model, arch)
        job = job_fingerprint(recipe, reader, rows)
        if is_finished(out, job):
            return QuantizeResult(out, already_finished=True)
        layout = plan_shards(output_specs(plan, file_format), int(recipe.max_shard_gb * 1e9))
        with staged_folder(out) as staging:
            with ShardWriter(staging, layout) as writer:
                run = Run(recipe, file_format, reader, arch, plan, writer, where, {}, {}, [])
                run.quantize_all(rows, on_event)
                run.copy_kept()
                writer.finish()
            write_config(staging, reader.config, declared)
            copy_sidecars(model, staging)
            for name, content in file_format.sidecars(declared).items():
                write_bytes_atomic(staging / name, content)
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
    experts = {
        row.module.rpartition(".")[0]: row.too_few_tokens
        for row in run.log
        if row.part == "experts"
    }
    return QuantizeResult(out, False, len(experts), sum(experts.values()))


def planned(reader: CheckpointReader, recipe: Recipe) -> tuple[Architecture, TensorPlan]:
    """The architecture and every tensor's fate; raises PlanError, RecipeError and friends.

    Refused as well: a plan that engines could not load in the recipe's format.
    """
    if "quantization_config" in reader.config:
        raise CheckpointError(f"{reader.index.folder} is quantized already: give a BF16 base")
    arch = architecture_in(reader.config, reader.index)
    refuse_other_names(arch, reader.index)
    plan, file_format = plan_tensors(arch, reader.index, recipe.scheme), FORMATS[recipe.format]
    if not file_format.dense_experts_apart:
        plan = plan.keeping_stacks()
    refusals = file_format.refusals(declaration(arch, plan.grids()))
    if refusals:
        raise RecipeError(f"format {recipe.format}: {refusals[0]}")
    return arch, plan


def calibration_rows(recipe: Recipe, model: Path, arch: Architecture) -> Rows | None:
    """The calibration rows, tokenized by the model's own tokenizer; None if none are needed."""
    if not recipe.needs_text:
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


def output_specs(plan: TensorPlan, file_format: Format) -> list[TensorSpec]:
    """Every tensor of the result, in the base's order; a quantized weight's parts in its place."""
    specs = []
    for name, fate in plan.fates.items():
        info = plan.infos[name]
        if isinstance(fate, Quantize):
            shape = fate.module_shape(info)
            for module in fate.modules:
                specs += file_format.packed_specs(module, shape, fate.grid)
        elif fate.modules:
            rows = (info.numel // info.shape[-1] // len(fate.modules), info.shape[-1])
            dtype = TORCH_DTYPES[info.dtype]
            specs += [TensorSpec(f"{module}.weight", dtype, rows) for module in fate.modules]
        else:
            specs.append(TensorSpec(name, TORCH_DTYPES[info.dtype], info.shape))
    return specs
