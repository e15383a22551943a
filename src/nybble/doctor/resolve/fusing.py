"""How rules see a fused module: by its own name, by those of its parts, by its class."""

from __future__ import annotations

from nybble.doctor.engines import Engine, Family
from nybble.doctor.layout.spec import Kind, Module
from nybble.doctor.resolve.method import Context
from nybble.doctor.resolve.reading import fusions, parts_by_last_name

_WITHOUT_PARTS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
"""Models whose class in SGLang 0.5.23 has no ``packed_modules_mapping``."""

_CLASSES = {
    "qkv_proj": "QKVParallelLinear",
    "qkv": "QKVParallelLinear",
    "gate_up_proj": "MergedColumnParallelLinear",
    "in_proj_qkvz": "MergedColumnParallelLinear",
    "in_proj_ba": "MergedColumnParallelLinear",
    "o_proj": "RowParallelLinear",
    "out_proj": "RowParallelLinear",
    "down_proj": "RowParallelLinear",
    "proj": "RowParallelLinear",
    "linear_fc2": "RowParallelLinear",
    "fc2": "RowParallelLinear",
}


def parts_of(context: Context, module: Module) -> tuple[str, ...]:
    """The names a fused module stands for in rules; none if the engine does not split its name.

    Source: the models' ``packed_modules_mapping``, in vLLM 0.19 to 0.32 and SGLang 0.5.23.
    """
    if module.kind is not Kind.LINEAR:
        return ()
    if context.engine.family is Family.VLLM:
        return tuple(parts_by_last_name(module.name, fusions(context, module)))
    if context.layout.architecture in _WITHOUT_PARTS or len(module.members) < 2:
        return ()
    prefix = module.name[: module.name.rfind(".") + 1]
    return tuple(prefix + last_of(member.name) for member in module.members)


def class_of(engine: Engine, module: Module) -> str:
    """The name of the class that the engine builds the module with, which targets may name."""
    if engine.family is Family.TRANSFORMERS:
        return "Linear"
    if module.kind is Kind.HEAD:
        return "ParallelLMHead"
    if module.kind is Kind.EXPERTS:
        return "RoutedExperts" if engine.is_vllm(since=(0, 24)) else "FusedMoE"
    return _CLASSES.get(last_of(module.name), "ColumnParallelLinear")


def last_of(name: str) -> str:
    """'q_proj' of 'model.layers.0.self_attn.q_proj'."""
    return name[name.rfind(".") + 1 :]
