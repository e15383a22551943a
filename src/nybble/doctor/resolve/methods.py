"""Which rules a declaration asks for, and what becomes of one that asks for none that are known.

Sources: ``_verify_quantization`` of vLLM (config/model.py) and SGLang (configs/model_config.py),
``get_hf_quantizer`` of Transformers 5.23, and the tables of names beside each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nybble.doctor.engines import Engine, Family
from nybble.doctor.layout.spec import Module
from nybble.doctor.resolve.auto_round import AUTO_ROUND
from nybble.doctor.resolve.awq import AWQ
from nybble.doctor.resolve.built import DENSE, Block, Built, NotAnalysed, Refusal
from nybble.doctor.resolve.compressed_tensors import COMPRESSED_TENSORS
from nybble.doctor.resolve.gptq import GPTQ
from nybble.doctor.resolve.method import Context, Method
from nybble.doctor.resolve.others import BITSANDBYTES, FP8, MODELOPT

_METHODS = {
    "auto-round": AUTO_ROUND,
    "auto_round": AUTO_ROUND,
    "intel/auto-round": AUTO_ROUND,
    "inc": AUTO_ROUND,
    "gptq": GPTQ,
    "gptq_marlin": GPTQ,
    "auto_gptq": GPTQ,
    "awq": AWQ,
    "awq_marlin": AWQ,
    "auto_awq": AWQ,
    "compressed-tensors": COMPRESSED_TENSORS,
    "fp8": FP8,
    "modelopt": MODELOPT,
    "modelopt_fp4": MODELOPT,
    "bitsandbytes": BITSANDBYTES,
}

_VLLM = frozenset(
    {
        "fbgemm_fp8",
        "fp_quant",
        "modelopt_mxfp8",
        "modelopt_mixed",
        "experts_int8",
        "quark",
        "moe_wna16",
        "torchao",
        "mxfp4",
        "mxfp8",
    }
)
"""What vLLM knows besides, in every release from 0.19 to 0.32."""
_VLLM_UNTIL = {"gguf": (0, 24), "petit_nvfp4": (0, 24), "cpu_awq": (0, 24)}
_VLLM_SINCE = frozenset(
    {
        "humming",
        "gpt_oss_mxfp4",
        "deepseek_v4_fp8",
        "online",
        "fp8_per_tensor",
        "fp8_per_block",
        "fp8_per_channel",
        "int8_per_channel_weight_only",
    }
)
"""What it knows since 0.24."""
_VLLM_DEPRECATED = frozenset({"fbgemm_fp8", "fp_quant"})
_SGLANG = frozenset(
    {
        "mxfp8",
        "minimax_m3_nvfp4",
        "blockwise_int8",
        "modelopt_fp8",
        "nvfp4_online",
        "modelopt_mixed",
        "w8a8_int8",
        "w8a8_fp8",
        "gguf",
        "moe_wna16",
        "w4afp8",
        "petit_nvfp4",
        "quark",
        "quark_mxfp4",
        "auto-round-int8",
        "modelslim",
        "quark_int4fp8_moe",
        "humming",
        "mxfp_w4a8",
        "mxfp4",
    }
)
_TRANSFORMERS = frozenset(
    {
        "gguf",
        "eetq",
        "aqlm",
        "quanto",
        "quark",
        "fouroversix",
        "fp_quant",
        "hqq",
        "fbgemm_fp8",
        "higgs",
        "torchao",
        "bitnet",
        "vptq",
        "spqr",
        "nvfp4",
        "mxfp8",
        "mxfp4",
        "metal",
        "sinq",
        "gemma",
    }
)


def declared_block(
    family: Family, config: Mapping[str, Any], objects: Mapping[str, Mapping[str, Any]]
) -> Block | None:
    """The declaration that an engine finds, wherever it looks for one; None: there is none.

    ``objects`` are the checkpoint's other JSON files. config.json's ``quantization_config`` comes
    first everywhere. vLLM then reads hf_quant_config.json, config.json's ``compression_config``
    and the decoder's own config; SGLang the decoder's, ``compression_config`` and
    hf_quant_config.json; Transformers the decoder's alone.
    """
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    top = config.get("quantization_config")
    file = objects.get("hf_quant_config.json")
    places = {
        Family.VLLM: (
            top,
            file,
            config.get("compression_config"),
            inner.get("quantization_config"),
            inner.get("compression_config"),
        ),
        Family.SGLANG: (
            top,
            inner.get("quantization_config"),
            config.get("compression_config"),
            file,
        ),
        Family.TRANSFORMERS: (top, inner.get("quantization_config")),
    }
    found = next((place for place in places[family] if place is not None), None)
    if not isinstance(found, Mapping):
        return None
    producer = found.get("producer")
    is_modelopt = isinstance(producer, Mapping) and producer.get("name") == "modelopt"
    return {"quant_method": "modelopt"} | dict(found) if is_modelopt else dict(found)


def method_of(block: Block | None) -> Method | None:
    """The rules for a declaration; None: there is none, and every engine builds all dense."""
    if block is None:
        return None
    name = block.get("quant_method")
    if isinstance(name, str):
        found = _METHODS.get(_normal(name))
        return found if found is not None else _unknown(name)
    return _unknown(name)


def _normal(name: str) -> str:
    return name.lower().replace("compressed_tensors", "compressed-tensors")


def _unknown(name: Any) -> Method:
    """For a name that is in no table, or is none."""
    shown = name[:40] if isinstance(name, str) else "none"

    def resolve(context: Context, _module: Module) -> Built:
        refused = _refused(context)
        if refused is not None:
            return refused
        if not _is_heeded(context):
            return DENSE
        return NotAnalysed(f"the rules of quant_method {shown!r}")

    return Method(shown, _refused, resolve)


def _is_heeded(context: Context) -> bool:
    """Whether the engine looks any further into the declaration."""
    name = context.block.get("quant_method")
    if context.engine.family is Family.TRANSFORMERS:
        # Any other is skipped with a warning.
        in_bits = context.block.get("load_in_8bit") or context.block.get("load_in_4bit")
        return bool(in_bits) or name in _TRANSFORMERS
    return bool(name) or context.engine.family is Family.SGLANG


def _refused(context: Context) -> Refusal | None:
    """What the engine makes of a name that has no rules here."""
    engine, block = context.engine, context.block
    name = block.get("quant_method", "")
    if engine.family is Family.TRANSFORMERS:
        if "quant_method" in block and isinstance(name, str):
            return None
        if "quant_method" not in block or name is None:
            return Refusal("ValueError", "there is no quant_method", f"{engine.label}, auto.py")
        return Refusal("TypeError", "quant_method is no text", f"{engine.label}, auto.py")
    where = f"{engine.label}, _verify_quantization"
    if not isinstance(name, str):
        return Refusal("AttributeError", "quant_method is no text", where)
    name = _normal(name)
    if engine.family is Family.VLLM:
        if name in _VLLM_DEPRECATED:
            return Refusal("ValueError", f"{name} is deprecated", where)
        if not name:
            return None
    elif "quant_algo" in block and not name:
        return None  # taken for ModelOpt's
    if name in _known(engine):
        return None
    return Refusal("ValueError", f"the quantization method {name[:40]!r} is unknown", where)


def _known(engine: Engine) -> frozenset[str]:
    if engine.family is Family.SGLANG:
        return _SGLANG
    until = {name for name, last in _VLLM_UNTIL.items() if engine.is_vllm(before=last)}
    since = _VLLM_SINCE if engine.is_vllm(since=(0, 24)) else frozenset()
    return _VLLM | until | since
