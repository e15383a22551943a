"""What each engine builds of a layout's Linears, under the names that rules are matched with.

Read in vLLM 0.19.1, 0.21, 0.23, 0.24, 0.26, 0.28, 0.30 and 0.32 (models/qwen3_5.py,
qwen3_5_mtp.py, qwen3_next.py, qwen3_next_mtp.py, qwen3_vl.py, llama.py, siglip.py and
layers/mamba/gdn), SGLang 0.5.23 (srt/models) and Transformers 5.23.
"""

from __future__ import annotations

from itertools import groupby

from nybble.doctor.engines import Engine, Family
from nybble.doctor.findings import Part
from nybble.doctor.layout.names import (
    built_name,
    has_tower,
    is_gemma,
    is_qwen3_5,
    is_qwen3_next,
)
from nybble.doctor.layout.spec import LM_HEAD, Kind, Layout, Linear, Module

_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "in_proj_qkv": "in_proj_qkvz",
    "in_proj_z": "in_proj_qkvz",
    "in_proj_b": "in_proj_ba",
    "in_proj_a": "in_proj_ba",
}
_EXPERTS = ".experts."
_SIGLIP_MULTIPLE = 64


def builds(layout: Layout, engine: Engine) -> bool:
    """Whether the engine has a class for the architecture.

    vLLM has none for text-only Qwen3.5 before 0.28 (models/registry.py): it falls back on
    Transformers' modelling code, for which no rule is known here.
    """
    is_text_only = is_qwen3_5(layout) and not has_tower(layout)
    return not (is_text_only and engine.is_vllm(before=(0, 28)))


def is_tied(layout: Layout, engine: Engine) -> bool:
    """Whether the engine takes the embedding for the output head, by config.json.

    vLLM asks the decoder's own config for Qwen3.5 and the top level for Gemma 3; SGLang the other
    way round (vllm#51063).
    """
    if engine.family is Family.TRANSFORMERS:
        return layout.tied
    asks_inside = is_gemma(layout) is (engine.family is Family.SGLANG)
    return layout.tied is not (layout.ties_disagree and asks_inside)


def modules(layout: Layout, engine: Engine) -> tuple[Module, ...]:
    """What the engine builds, in that order: tower, decoder, output head, MTP head.

    Empty where it has no class for the architecture (``builds``). Embeddings, convolutions and
    norms, which no rule can quantize, are left out, and so is an output head that is tied: newer
    vLLMs build one, but then put the embedding in the place of its weights.
    """
    if not builds(layout, engine):
        return ()
    fuses = engine.family is not Family.TRANSFORMERS
    groups: dict[tuple[Part, str], list[Linear]] = {}
    for name, (first, *others) in groupby(layout.linears.values(), _holder):
        if not _is_missing(layout, engine, first):
            built = built_name(layout, engine, name)
            group = groups.setdefault((first.part, _fused(built) if fuses else built), [])
            group += (first, *others)
    found = [
        Module(name, tuple(members), _kind(layout, engine, members[0]), part)
        for (part, name), members in groups.items()
    ]
    return (*found, *_draft_head(layout, engine))


def _holder(linear: Linear) -> str:
    """The name of a Linear, or of what holds all experts of its block."""
    block, is_expert, _ = linear.name.partition(_EXPERTS)
    return f"{block}.experts" if is_expert else linear.name


def _is_missing(layout: Layout, engine: Engine, linear: Linear) -> bool:
    if linear.name == LM_HEAD:
        return is_tied(layout, engine)
    return linear.part is Part.MTP and engine.family is Family.TRANSFORMERS


def _fused(name: str) -> str:
    parent, dot, leaf = name.rpartition(".")
    return f"{parent}{dot}{_FUSED.get(leaf, leaf)}"


def _kind(layout: Layout, engine: Engine, linear: Linear) -> Kind:
    """Of the module that a Linear is the first member of."""
    if linear.name == LM_HEAD:
        return _head_kind(layout, engine)
    if _EXPERTS in linear.name:
        return Kind.EXPERTS
    leaf = linear.name.rpartition(".")[2]
    in_transformers = engine.family is Family.TRANSFORMERS
    # Of the two, Transformers builds the second as an ordinary Linear.
    if leaf == "gate" or (leaf == "shared_expert_gate" and not in_transformers):
        return Kind.PLAIN
    if engine.family is Family.SGLANG and (
        linear.name == "mtp.fc" or linear.name.startswith("model.visual.")
    ):
        return Kind.PLAIN
    if (
        engine.is_vllm()
        and leaf in ("fc1", "fc2")
        and any(n % _SIGLIP_MULTIPLE for n in linear.shape)
    ):
        return Kind.PLAIN  # but for bitsandbytes and torchao
    return Kind.LINEAR


def _head_kind(layout: Layout, engine: Engine) -> Kind:
    """vLLM hands some output heads no quantization config; Qwen3.5's gets it since 0.22 or 0.23."""
    is_new = is_qwen3_5(layout) and engine.is_vllm(before=(0, 24))
    is_next = is_qwen3_next(layout) and engine.is_vllm()
    return Kind.PLAIN if is_new or is_next else Kind.HEAD


def _draft_head(layout: Layout, engine: Engine) -> list[Module]:
    """The MTP head's own copy of the output head; its weights are read, then the decoder's used."""
    head = layout.linears.get(LM_HEAD)
    absent = head is None or is_tied(layout, engine) or not layout.has_mtp
    if head is None or absent or engine.family is Family.TRANSFORMERS:
        return []
    name = LM_HEAD
    if engine.family is Family.SGLANG and is_qwen3_next(layout):
        name = "model.shared_head.head"
    return [Module(name, (head,), _head_kind(layout, engine), Part.MTP)]
