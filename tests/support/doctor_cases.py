"""Cases for the doctor's checks, made of headers alone: no file, no weight.

The model is the bundled one's config: Gated DeltaNet and attention blocks, a vision tower, an MTP
head. Its decoder's Linears are packed as a declaration would have them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from nybble.checkpoint.headers import TensorInfo
from nybble.doctor.case import Case
from nybble.doctor.engines import ENGINES, Engine
from nybble.doctor.findings import Finding, Harm, Part
from nybble.doctor.layout.registry import layout_of
from nybble.doctor.layout.spec import Layout
from nybble.doctor.resolve.patterns import Patterns
from nybble.doctor.simulate import simulate
from nybble.doctor.snapshot import Snapshot
from nybble.doctor.source import Source
from nybble.doctor.stored import stored_linears

CONFIG = Path(__file__).parents[2] / "src" / "nybble" / "assets" / "tiny" / "config.json"
MODEL = "model.safetensors"
BLOCKS = "model.language_model.layers"
GROUP = 128

Headers = dict[str, TensorInfo]

_KEPT = (r".*in_proj_(a|b|ba)$", r".*mtp.*", r".*visual.*")
BLOCKS_OF: Mapping[str, dict[str, Any]] = {
    "auto_round": {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": BLOCKS,
        "extra_config": {rule: {"bits": 16, "data_type": "fp"} for rule in _KEPT},
    },
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "modules_in_block_to_quantize": [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"],
            ["linear_attn.out_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ],
        "dynamic": {f"-:{rule}": {} for rule in (*_KEPT, ".*lm_head.*")},
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": GROUP,
                },
            }
        },
        "ignore": ["lm_head", *(f"re:{rule}" for rule in _KEPT)],
    },
}
"""The declarations of nybble's own results."""
FORMATS = tuple(BLOCKS_OF)


@cache
def tiny_layout() -> Layout:
    """The bundled model's layout."""
    layout = layout_of(tiny_config())
    assert layout is not None
    return layout


def tiny_config() -> dict[str, Any]:
    """The bundled model's config.json."""
    return cast(dict[str, Any], json.loads(CONFIG.read_text(encoding="utf-8")))


def block_of(form: str) -> dict[str, Any]:
    """A declaration of one's own."""
    return copy.deepcopy(BLOCKS_OF[form])


def info(name: str, dtype: str, *shape: int) -> TensorInfo:
    """A tensor of a header; where it lies is not told."""
    return TensorInfo(name, dtype, shape, Path(MODEL), 0, 0)


def put(headers: Headers, name: str, dtype: str, *shape: int) -> None:
    """Adds a tensor, or replaces it where it stands."""
    headers[name] = info(name, dtype, *shape)


def is_quantized(name: str) -> bool:
    """Whether the recipes of nybble quantize a Linear."""
    return name.startswith(f"{BLOCKS}.") and not name.endswith(("in_proj_a", "in_proj_b"))


def pack(headers: Headers, name: str, form: str, bits: int = 4, group: int = GROUP) -> None:
    """Replaces a Linear's tensors by packed ones."""
    outs, ins = tiny_layout().linears[name].shape
    groups = 1 if group == -1 else ins // group
    headers.pop(f"{name}.weight", None)
    if form == "compressed-tensors":
        put(headers, f"{name}.weight_packed", "I32", outs, ins * bits // 32)
        put(headers, f"{name}.weight_scale", "BF16", outs, groups)
        put(headers, f"{name}.weight_shape", "I64", 2)
        return
    put(headers, f"{name}.qweight", "I32", ins * bits // 32, outs)
    put(headers, f"{name}.qzeros", "I32", groups, outs * bits // 32)
    put(headers, f"{name}.scales", "F16", groups, outs)
    if form == "gptq":
        put(headers, f"{name}.g_idx", "I32", ins)


def unpack(headers: Headers, name: str) -> None:
    """Replaces a Linear's tensors by its dense weight, at the end of the file."""
    for tensor in [tensor for tensor in headers if tensor.rpartition(".")[0] == name]:
        del headers[tensor]
    put(headers, f"{name}.weight", "BF16", *tiny_layout().linears[name].shape)


def dense_headers() -> Headers:
    """The base checkpoint's tensors, sorted by name as most writers do."""
    shapes = tiny_layout().tensors
    return {name: info(name, "BF16", *shapes[name]) for name in sorted(shapes)}


def sound_headers(form: str) -> Headers:
    """A sound INT4 checkpoint's tensors, sorted by name."""
    headers = dense_headers()
    for name in tiny_layout().linears:
        if is_quantized(name):
            pack(headers, name, form)
    return dict(sorted(headers.items()))


def snapshot_of(
    files: Mapping[str, Headers],
    block: Any = None,
    config: Mapping[str, Any] | None = None,
    weight_map: Mapping[str, str] | None = None,
) -> Snapshot:
    """What the files of a checkpoint would say."""
    config = {**(tiny_config() if config is None else config)}
    if block is not None:
        config["quantization_config"] = block
    return Snapshot(
        source=cast(Source, None),
        sizes={"config.json": 1, **dict.fromkeys(files, 1)},
        config=config,
        weight_map=weight_map,
        total_size=None,
        objects={},
        headers=files,
        problems=(),
    )


def case_of(
    headers: Headers,
    block: Any = None,
    engines: tuple[Engine, ...] = ENGINES,
    tensor_parallel: int = 1,
) -> Case:
    """The case of a checkpoint of one file."""
    return case_of_snapshot(snapshot_of({MODEL: headers}, block), engines, tensor_parallel)


def case_of_snapshot(
    snapshot: Snapshot, engines: tuple[Engine, ...] = ENGINES, tensor_parallel: int = 1
) -> Case:
    """The case of a snapshot, whose architecture must be known."""
    assert snapshot.config is not None
    layout = layout_of(snapshot.config)
    assert layout is not None
    block = snapshot.config.get("quantization_config")
    return Case(
        snapshot=snapshot,
        block=block,
        layout=layout,
        layout_problem=None,
        stored=stored_linears(layout, snapshot.all_tensors()),
        simulations=tuple(
            simulate(snapshot, layout, block, engine, Patterns()) for engine in engines
        ),
        engines=engines,
        tensor_parallel=tensor_parallel,
    )


Checks = Iterable[Callable[[Case], Iterable[Finding]]]


def findings(checks: Checks, case: Case) -> list[Finding]:
    """All that the checks find."""
    return list(_found(checks, case))


def _found(checks: Checks, case: Case) -> Iterator[Finding]:
    for check in checks:
        yield from check(case)


def outcomes(finding: Finding, part: Part) -> dict[str, tuple[Harm, str | None]]:
    """What a finding does to a part, by the engine's id."""
    return {hit.engine.id: (hit.harm, hit.raises) for hit in finding.hits if hit.part is part}
