"""Declarations of compressed-tensors, and the modules of a small model to try them on."""

from __future__ import annotations

from typing import Any

from nybble.doctor.engines import ENGINES, Engine
from nybble.doctor.findings import Part
from nybble.doctor.layout.spec import Kind, Layout, Linear, Module
from nybble.doctor.resolve.built import Built
from nybble.doctor.resolve.method import Context
from nybble.doctor.resolve.methods import method_of

Block = dict[str, Any]

VLLM = tuple(engine for engine in ENGINES if engine.is_vllm())
OLDEST, NEWEST = VLLM[0], VLLM[-1]
TRANSFORMERS, SGLANG = ENGINES[-2:]

INT4: Block = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 128,
    "dynamic": False,
}
INT8: Block = INT4 | {"num_bits": 8, "strategy": "channel", "group_size": None}
FLOAT8: Block = INT8 | {"type": "float"}
TOKENS: Block = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FLOAT_TOKENS: Block = TOKENS | {"type": "float"}
NVFP4: Block = INT4 | {"type": "float", "strategy": "tensor_group", "group_size": 16}
MXFP4: Block = INT4 | {"type": "float", "group_size": 32}

PORTABLE = ("lm_head", "re:.*visual.*", "re:.*mtp.*", r"re:.*linear_attn\.in_proj_(a|b|ba)$")
WITHOUT_MTP = tuple(entry for entry in PORTABLE if "mtp" not in entry)


def group(weights: Any = None, *targets: str, **more: Any) -> Block:
    """A config group; by default all Linears at INT4."""
    return {"targets": list(targets or ("Linear",)), "weights": weights or INT4} | more


def block(*groups: Block, ignore: Any = PORTABLE, name: Any = "pack-quantized") -> Block:
    """A declaration; by default of one group."""
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {f"group_{n}": one for n, one in enumerate(groups or (group(),))},
        "ignore": list(ignore) if isinstance(ignore, tuple) else ignore,
    }


def layout(architecture: str = "Qwen3_5ForConditionalGeneration") -> Layout:
    """A layout without a tensor: rules look at its architecture only."""
    return Layout(
        architecture=architecture,
        tensors={},
        linears={},
        stacks={},
        blocks="model.language_model.layers",
        has_mtp=True,
        is_wrapper=architecture.endswith("ForConditionalGeneration"),
        tied=False,
    )


def module(name: str, *parts: str) -> Module:
    """A module by its name in an engine, with the last names of what it is fused of."""
    kinds = {"lm_head": Kind.HEAD, "experts": Kind.EXPERTS}
    prefix, _, last = name.rpartition(".")
    part = Part.MTP if name.startswith("mtp") else Part.VISION if "visual" in name else Part.TRUNK
    members = tuple(Linear(f"{prefix}.{one}", (128, 128), part) for one in parts or (last,))
    return Module(name, members, kinds.get(last, Kind.LINEAR), part)


def modules(trunk: str = "language_model.model", tower: str = "visual") -> dict[str, Module]:
    """Modules of every kind, fused as in vLLM, by a short name."""
    attention = f"{trunk}.layers.3.self_attn"
    head = "language_model.lm_head" if trunk == "language_model.model" else "lm_head"
    delta = f"{trunk}.layers.0.linear_attn"
    qkv, gate_up = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    return {
        "qkv": module(f"{attention}.qkv_proj", *qkv),
        "o": module(f"{attention}.o_proj"),
        "gate_up": module(f"{trunk}.layers.3.mlp.gate_up_proj", *gate_up),
        "down": module(f"{trunk}.layers.3.mlp.down_proj"),
        "qkvz": module(f"{delta}.in_proj_qkvz", "in_proj_qkv", "in_proj_z"),
        "ba": module(f"{delta}.in_proj_ba", "in_proj_b", "in_proj_a"),
        "experts": module(f"{trunk}.layers.3.mlp.experts"),
        "tower qkv": module(f"{tower}.blocks.0.attn.qkv"),
        "tower fc": module(f"{tower}.blocks.0.mlp.linear_fc1"),
        "head": module(head),
        "mtp fc": module("mtp.fc"),
        "mtp qkv": module("mtp.layers.0.self_attn.qkv_proj", *qkv),
        "mtp down": module("mtp.layers.0.mlp.down_proj"),
    }


def context(declared: Block, engine: Engine = NEWEST, architecture: str | None = None) -> Context:
    """What an engine knows when it reads a declaration."""
    return Context(
        engine, layout(architecture) if architecture else layout(), declared, frozenset()
    )


def built(declared: Block, engine: Engine = NEWEST, **named: Module) -> dict[str, Built]:
    """What the engine builds each module as; all of ``modules`` by default."""
    method = method_of(declared)
    assert method is not None
    known = context(declared, engine)
    return {
        name: method.refusal(known) or method.resolve(known, one)
        for name, one in (named or modules()).items()
    }
