"""Checkpoints of gigabytes with random weights, written piece by piece in seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from support.checkpoints import TEXT_VALUES, tiny_tokenizer, write_json

from nybble.arch.blocks import expected_shapes
from nybble.arch.plan import plan_tensors
from nybble.arch.registry import architecture_of
from nybble.checkpoint.index import open_index
from nybble.checkpoint.writer import TensorSpec
from nybble.engine.declare import declaration
from nybble.packing.formats import FORMATS
from nybble.recipe.schema import Scheme

_STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32"}


def large_config(**values: Any) -> dict[str, Any]:
    """config.json of the text-only form with some values of its own."""
    names = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}
    return {**TEXT_VALUES, **names, **values}


def write_large_base(folder: Path, config: Mapping[str, Any]) -> int:
    """A base of normally distributed weights; returns its size in bytes."""
    shapes = expected_shapes(architecture_of(config))
    return _write(folder, config, [TensorSpec(n, torch.bfloat16, s) for n, s in shapes.items()])


def write_large_int4(folder: Path, base: Path, config: Mapping[str, Any]) -> int:
    """A checkpoint with random codes on the base's shapes, in the format auto_round."""
    arch, stored_as, specs = architecture_of(config), FORMATS["auto_round"], []
    grids = plan_tensors(arch, open_index(base), Scheme()).grids()
    for name, shape in expected_shapes(arch).items():
        module = name.removesuffix(".weight")
        if module in grids:
            specs += stored_as.packed_specs(module, (shape[0], shape[1]), grids[module])
        else:
            specs.append(TensorSpec(name, torch.bfloat16, shape))
    block = stored_as.quantization_config(declaration(arch, grids))
    return _write(folder, {**config, "quantization_config": block}, specs)


def _write(folder: Path, config: Mapping[str, Any], specs: Iterable[TensorSpec]) -> int:
    folder.mkdir()
    tiny_tokenizer().save_pretrained(folder)
    write_json(folder / "config.json", dict(config))
    header: dict[str, Any] = {}
    ordered, end = sorted(specs, key=lambda spec: spec.name), 0
    for spec in ordered:
        start, end = end, end + math.prod(spec.shape) * spec.dtype.itemsize
        values = {"dtype": _STORED[spec.dtype], "shape": list(spec.shape)}
        header[spec.name] = {**values, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (2**23,), dtype=torch.uint8, generator=generator)
    patterns = {
        "weights": _bytes((0.02 * torch.randn(2**22, generator=generator)).bfloat16()),
        "scales": _bytes(torch.full((2**16,), 2.0**-8, dtype=torch.float16)),
        "qzeros": b"\x77" * 2**16,
        "qweight": _bytes(codes),
    }
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in ordered:
            pattern = patterns.get(spec.name.rpartition(".")[2], patterns["weights"])
            left = math.prod(spec.shape) * spec.dtype.itemsize
            while left:
                left -= file.write(pattern[:left])
    return end


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()
