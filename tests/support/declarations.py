"""Declarations of auto_round, gptq and awq, and what the doctor's resolvers make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nybble.doctor.engines import ENGINES, Engine, Family
from nybble.doctor.layout.modules import modules
from nybble.doctor.layout.registry import layout_of
from nybble.doctor.layout.spec import Kind, Layout
from nybble.doctor.resolve.built import DENSE, Built, Refusal, Storage
from nybble.doctor.resolve.method import Context, Method

TRUNK = "model.language_model.layers"
BF16 = {"bits": 16, "data_type": "fp"}
IN_BLOCK = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"],
    ["linear_attn.out_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
PORTABLE = {f"-:.*{part}": {} for part in ("mtp.*", "visual.*", "in_proj_(a|b|ba)$", "lm_head.*")}
PORTABLE_EXTRA = {f".*{part}": BF16 for part in ("in_proj_(a|b|ba)$", "mtp.*", "visual.*")}

VLLM = {engine.first: engine for engine in ENGINES if engine.family is Family.VLLM}
NEWEST = VLLM[0, 30]
TRANSFORMERS, SGLANG = ENGINES[-2:]


def inc(**values: Any) -> dict[str, Any]:
    """AutoRound's declaration of INT4 weights; a value of None leaves the key out."""
    block = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "data_type": "int",
    }
    return _with(block, values)


def gptq(**values: Any) -> dict[str, Any]:
    """GPTQ's declaration of INT4 weights."""
    block = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    return _with(block, values)


def awq(**values: Any) -> dict[str, Any]:
    """AWQ's declaration of INT4 weights."""
    block = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    return _with(block, values)


def _with(block: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (block | values).items() if value is not None}


def wrapper_layout() -> Layout:
    """The bundled vision-language model's: three Gated DeltaNet blocks, one of attention, MTP."""
    root = Path(__file__).parents[2]
    config = json.loads((root / "src/nybble/assets/tiny/config.json").read_text())
    layout = layout_of(config)
    assert layout is not None
    return layout


def trunk_linears(layout: Layout) -> frozenset[str]:
    """What nybble quantizes: the decoder's Linears but in_proj_a, in_proj_b and the head."""
    return frozenset(
        name
        for name in layout.linears
        if name.startswith(TRUNK) and not name.endswith(("in_proj_a", "in_proj_b"))
    )


def context(
    block: dict[str, Any],
    engine: Engine = NEWEST,
    packed: frozenset[str] = frozenset(),
    layout: Layout | None = None,
) -> Context:
    """What the engine knows of the declaration."""
    return Context(engine, layout or wrapper_layout(), block, packed)


def builds(method: Method, found: Context) -> dict[str, Built]:
    """What becomes of every module, by its name; the draft's output head is left out."""
    refused = method.refusal(found)
    assert refused is None, refused
    return {
        module.name: DENSE if module.kind is Kind.PLAIN else method.resolve(found, module)
        for module in reversed(modules(found.layout, found.engine))
    }


def summary(method: Method, found: Context) -> dict[str, str]:
    """'Q', 'bf16', an exception's name or 'mixed' for trunk, vision, mtp.fc and mtp.layers.

    Of the trunk, in_proj_a and in_proj_b stand apart as 'ba'.
    """
    groups: dict[str, set[str]] = {}
    for name, built in builds(method, found).items():
        groups.setdefault(_group(name), set()).add(_letter(built))
    return {group: found.pop() if len(found) == 1 else "mixed" for group, found in groups.items()}


def _group(name: str) -> str:
    if "visual" in name:
        return "vision"
    if name.startswith("mtp"):
        return "mtp.fc" if name == "mtp.fc" else "mtp.layers"
    if "lm_head" in name:
        return "head"
    return "ba" if name.endswith(("in_proj_ba", "in_proj_a", "in_proj_b")) else "trunk"


def _letter(built: Built) -> str:
    if isinstance(built, Refusal):
        return built.exception
    assert hasattr(built, "storage"), built
    return "bf16" if built.storage is Storage.DENSE else "Q"
