"""One quantized checkpoint in another format: the same codes, scales and kept tensors.

Peak memory: one module's codes and words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nybble.arch.blocks import expected_shapes
from nybble.arch.registry import architecture_in
from nybble.arch.spec import Architecture
from nybble.checkpoint.dtypes import TORCH_DTYPES
from nybble.checkpoint.ondisk import read_object
from nybble.checkpoint.reader import CheckpointReader
from nybble.checkpoint.sidecar import copy_sidecars, write_config
from nybble.checkpoint.staging import refuse_used, staged_folder
from nybble.checkpoint.writer import ShardWriter, TensorSpec, plan_shards
from nybble.core.atomic import write_bytes_atomic
from nybble.core.errors import CheckpointError, RecipeError
from nybble.engine.declare import declaration
from nybble.engine.stored import stored_grids, stored_parts
from nybble.engine.weights import quantized_weight
from nybble.packing.format import Format
from nybble.packing.formats import FORMATS, format_of
from nybble.pipeline.manifest import TensorRecord
from nybble.pipeline.output import MANIFEST
from nybble.pipeline.quantize import QUANT_LOG
from nybble.quant.grid import IntGrid


def convert(source: Path, out: Path, format_name: str, max_shard_gb: float = 5.0) -> None:
    """Writes the quantized checkpoint in folder ``source`` to a new folder ``out``.

    Nothing is rounded: a conversion that would change a weight is refused. ``out`` appears whole
    or not at all. Raises RecipeError for an unknown format, CheckpointError for a source that is
    not quantized, is stored otherwise than it declares or cannot be said in the format,
    OutputError if ``out`` holds anything.
    """
    if format_name not in FORMATS:
        raise RecipeError(f"format {format_name!r} is unknown: give one of {', '.join(FORMATS)}")
    refuse_used(out)
    with CheckpointReader(source) as reader:
        stored_as, target = format_of(reader.config), FORMATS[format_name]
        if stored_as is None:
            raise CheckpointError(f"{source} is not quantized: there is nothing to convert")
        arch = architecture_in(reader.config, reader.index)
        grids = stored_grids(arch, reader.index, reader.config)
        packed, shapes = _packed_modules(arch, reader, grids)
        if not packed:
            raise CheckpointError(
                f"{source} holds no quantized weight: there is nothing to convert"
            )
        block = target.quantization_config(declaration(arch, packed))
        job = _Job(reader, stored_as, target, packed, shapes)
        layout = plan_shards(job.specs(), int(max_shard_gb * 1e9))
        with staged_folder(out) as staging:
            with ShardWriter(staging, layout) as writer:
                records = job.write(writer)
                writer.finish()
            _write_rest(source, staging, reader.config, block, target)
            _write_manifest(source, staging, records, target)
            with CheckpointReader(staging) as result:
                if stored_grids(arch, result.index, result.config) != grids:
                    raise CheckpointError(f"{target.name} does not declare the grids of {source}")


@dataclass(frozen=True)
class _Job:
    """What is read, and how it is written."""

    reader: CheckpointReader
    stored_as: Format
    target: Format
    grids: Mapping[str, IntGrid]
    """Of every quantized module."""
    shapes: Mapping[str, tuple[int, ...]]
    """Dense, by module."""

    def specs(self) -> list[TensorSpec]:
        """Every tensor of the result, in the source's order."""
        specs = []
        for name in self._order():
            if name in self.grids:
                outs, ins = self.shapes[name]
                specs += self.target.packed_specs(name, (outs, ins), self.grids[name])
            else:
                info = self.reader.index.tensors[name]
                specs.append(TensorSpec(name, TORCH_DTYPES[info.dtype], info.shape))
        return specs

    def write(self, writer: ShardWriter) -> dict[str, TensorRecord]:
        """Writes every tensor; returns what became of each."""
        records = {}
        for name in self._order():
            if name in self.grids:
                grid = self.grids[name]
                weight = quantized_weight(self.reader, name, grid, self.stored_as)
                for part, tensor in self.target.pack(name, weight).items():
                    records[part] = TensorRecord("quantized", writer.write(part, tensor))
                self.reader.release()
            else:
                sha256 = writer.write_raw(name, self.reader.raw_chunks(name))
                records[name] = TensorRecord("kept", sha256)
        return records

    def _order(self) -> list[str]:
        """Names of quantized modules and of kept tensors.

        A module stands where its scales do. Files are sorted by item size, and scales have that of
        most kept tensors: so the order survives any number of conversions.
        """
        suffixes = (*self.stored_as.suffixes, *self.stored_as.idle_suffixes)
        owners = {f"{module}.{suffix}": module for module in self.grids for suffix in suffixes}
        last_seen: dict[str, int] = {}
        for place, name in enumerate(self.reader.index.tensors):
            last_seen[owners.get(name, name)] = place
        return sorted(last_seen, key=lambda name: last_seen[name])


def _packed_modules(
    arch: Architecture, reader: CheckpointReader, grids: Mapping[str, IntGrid | None]
) -> tuple[dict[str, IntGrid], dict[str, tuple[int, ...]]]:
    """Grid and dense shape of every quantized module, by its name."""
    packed, shapes = {}, {}
    for parameter, whole in expected_shapes(arch).items():
        grid = grids[parameter]
        if grid is not None:
            for name, shape in stored_parts(arch, reader.index, parameter, whole):
                module = name.removesuffix(".weight")
                packed[module], shapes[module] = grid, shape
    return packed, shapes


def _write_rest(
    source: Path, staging: Path, config: Mapping[str, Any], block: dict[str, Any], target: Format
) -> None:
    dense = {key: value for key, value in config.items() if key != "quantization_config"}
    write_config(staging, dense, block)
    copy_sidecars(source, staging)
    for name, content in target.sidecars(block).items():
        write_bytes_atomic(staging / name, content)
    if (source / QUANT_LOG).is_file():
        write_bytes_atomic(staging / QUANT_LOG, (source / QUANT_LOG).read_bytes())


def _write_manifest(
    source: Path, staging: Path, records: Mapping[str, TensorRecord], target: Format
) -> None:
    """Carries nybble.json over, if there is one, with the hashes of the new tensors."""
    if not (source / MANIFEST).is_file():
        return
    manifest = read_object(source / MANIFEST)
    # Not the job that made the source: `nybble quantize` must not take the result for its own.
    job = f"{manifest.get('job')} converted to {target.name}"
    manifest["job"] = hashlib.sha256(job.encode()).hexdigest()
    manifest["converted_to"] = target.name
    manifest["tensors"] = {name: asdict(record) for name, record in sorted(records.items())}
    write_bytes_atomic(staging / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
