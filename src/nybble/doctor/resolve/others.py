"""fp8, ModelOpt and bitsandbytes, as far as vLLM's sources make it certain.

Sources: ``fp8.py``, ``modelopt.py``, ``bitsandbytes.py`` and ``utils/quant_utils.py`` of vLLM 0.19,
0.22 to 0.24, 0.28, 0.30 and 0.32. What SGLang and Transformers make of them is not analysed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from nybble.doctor.engines import Engine, Family
from nybble.doctor.layout.names import engine_name, is_qwen3_next
from nybble.doctor.layout.spec import Kind, Module
from nybble.doctor.resolve.built import DENSE, Scheme, Storage
from nybble.doctor.resolve.fusing import parts_of
from nybble.doctor.resolve.method import Context, Method
from nybble.doctor.resolve.outcome import not_analysed, refused
from nybble.doctor.resolve.reading import (
    ANY,
    Reader,
    Resolver,
    contains_any,
    method_read_by,
    needed,
)

_FP8 = Scheme(Storage.FP8, 8)
_FP4 = Scheme(Storage.FP4, 4)
_MOST_WILDCARDS = 1_000
_LONGEST_WILDCARD = 300
_WILD = re.compile(r"[*?\[]")
_ALGORITHMS = {
    "FP8": _FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": _FP8,
    "FP8_PB_WO": _FP8,
    "NVFP4": _FP4,
    "W4A16_NVFP4": _FP4,
    "MXFP8": _FP8,
}
_WITH_EXPERTS = ("FP8", "NVFP4", "MXFP8")


@dataclass(frozen=True)
class Exclusions:
    """What a declaration quantizes, and what it does not."""

    scheme: Scheme
    names: frozenset[str]
    """Entries, in the engine's names."""
    algorithm: str = ""
    """ModelOpt's."""
    wild: tuple[str, ...] = ()
    """Entries with wildcards."""


def _read_fp8(context: Context) -> Exclusions:
    """``Fp8Config.from_config``."""
    engine, block = context.engine, context.block
    activations = needed(block, "activation_scheme")
    if activations not in ("static", "dynamic"):
        raise refused(engine, "ValueError", "activation_scheme is unknown", "fp8.py")
    size = block.get("weight_block_size")
    if size is not None:
        if not isinstance(size, list | str | dict):
            raise refused(engine, "TypeError", "weight_block_size is no list", "fp8.py")
        if len(size) != 2 or activations != "dynamic":
            message = "blocks need two sizes, and dynamic activations"
            raise refused(engine, "ValueError", message, "fp8.py")
    if block.get("store_dtype") is not None:
        raise not_analysed("fp8 with a store_dtype")
    ignored = block.get("ignored_layers") or block.get("modules_to_not_convert") or []
    names = [engine_name(context.layout, engine, name) for name in _texts(engine, ignored)]
    return Exclusions(_FP8, frozenset(names))


def _resolve_fp8(context: Context, found: Exclusions, module: Module) -> Scheme:
    """``Fp8Config.get_quant_method``: no output head, and no entry but whole names."""
    if module.kind is Kind.HEAD or _is_skipped(context, found, module):
        return DENSE
    return found.scheme


def _read_modelopt(context: Context) -> Exclusions:
    """``ModelOptQuantConfigBase.from_config``, in both of ModelOpt's forms."""
    engine, block = context.engine, context.block
    inner = block.get("quantization", block)
    if not isinstance(inner, dict):
        raise refused(engine, "ValueError", "quantization is no object", "modelopt.py")
    algorithm = inner.get("quant_algo")
    if not algorithm:
        raise refused(engine, "ValueError", "quant_algo is missing", "modelopt.py")
    algorithm = algorithm.upper() if isinstance(algorithm, str) else ""
    if algorithm == "MIXED_PRECISION":
        raise not_analysed("ModelOpt's mixed precision")
    is_new = algorithm == "W4A16_NVFP4" and engine.is_vllm(before=(0, 24))
    if algorithm not in _ALGORITHMS or is_new:
        raise refused(engine, "ValueError", "quant_algo is unknown", "modelopt.py")
    if inner is not block and algorithm in ("NVFP4", "MXFP8"):
        keys = ["kv_cache_quant_algo", "exclude_modules"]
        keys += ["group_size"] if algorithm == "NVFP4" else []
        absent = [key for key in keys if key not in inner]
        if absent:
            raise refused(engine, "ValueError", f"{absent[0]} is missing", "modelopt.py")
    excluded = inner.get("ignore" if inner is block else "exclude_modules", [])
    if not isinstance(excluded, list):
        raise refused(engine, "ValueError", "the list of what is excluded is none", "modelopt.py")
    names = [
        engine_name(context.layout, engine, name)
        for entry in _texts(engine, excluded)
        for name in _split_wildcard(entry)
    ]
    wild = tuple(name for name in names if _WILD.search(name))
    if len(wild) > _MOST_WILDCARDS or any(len(name) > _LONGEST_WILDCARD for name in wild):
        raise not_analysed("more, or longer, wildcards than can be tried quickly")
    return Exclusions(_ALGORITHMS[algorithm], frozenset(names), algorithm, wild)


def _split_wildcard(entry: str) -> tuple[str, ...]:
    """'a.b*' stands for 'a.b' and 'a.b.*' (``apply_vllm_mapper``)."""
    if len(entry) >= 2 and entry.endswith("*") and not entry.endswith(".*"):
        return entry[:-1], f"{entry[:-1]}.*"
    return (entry,)


def _resolve_modelopt(context: Context, found: Exclusions, module: Module) -> Scheme:
    """``ModelOptQuantConfigBase.get_quant_method``."""
    engine = context.engine
    if found.names and _is_excluded(context, found, module):
        return DENSE
    if any(tower in module.name for tower in ("vision_tower", "vision_model")):
        return DENSE
    if module.kind is Kind.HEAD and engine.is_vllm(before=(0, 24)):
        raise not_analysed("vLLM 0.19 builds the output head dense, 0.23 quantized")
    if module.kind is Kind.EXPERTS and found.algorithm not in _WITH_EXPERTS:
        raise not_analysed(f"experts of ModelOpt's {found.algorithm}")
    if module.name == "mtp.fc" and found.scheme is _FP4:
        return _built_fc(context)
    return found.scheme


def _built_fc(context: Context) -> Scheme:
    """The MTP head's first Linear, which FP4 checkpoints store dense and do not exclude.

    Source: ``fc_quant`` of models/qwen3_5_mtp.py (vllm#38832) and qwen3_next_mtp.py.
    """
    is_next = is_qwen3_next(context.layout)
    if context.engine.is_vllm(since=(0, 28) if is_next else (0, 24)):
        return DENSE
    if is_next and context.engine.is_vllm(since=(0, 24), before=(0, 26)):
        return _FP4
    raise not_analysed("some of these releases build mtp.fc quantized, others dense")


def _is_excluded(context: Context, found: Exclusions, module: Module) -> bool:
    """``is_layer_excluded``: whole names, any part of a name, wildcards."""
    if _is_skipped(context, found, module) or contains_any(module.name, found.names):
        return True
    return any(fnmatchcase(module.name, entry) for entry in found.wild)


def _is_skipped(context: Context, found: Exclusions, module: Module) -> bool:
    """``is_layer_skipped``: by whole names, those of the parts of what is fused.

    Raises EarlyEnd if it holds for some of the parts only.
    """
    parts = parts_of(context, module)
    engine = context.engine
    if not parts:
        if module.kind is Kind.EXPERTS:
            return any("experts" in entry and module.name in entry for entry in found.names)
        return module.name in found.names
    if module.name in found.names and engine.is_vllm(since=(0, 24)):
        return True
    of_parts = [part in found.names for part in parts]
    if any(of_parts) and not all(of_parts):
        message = f"{module.name} is fused of parts of which only some are excluded"
        raise refused(engine, "ValueError", message, "utils/quant_utils.py")
    return of_parts[0]


def _read_bitsandbytes(context: Context) -> Exclusions:
    """``BitsAndBytesConfig.from_config``; names are taken as they are, no engine's."""
    engine, block = context.engine, context.block
    if engine.is_vllm(since=(0, 28)):
        raise refused(
            engine, "ValueError", "bitsandbytes is no longer supported", "quantization/__init__.py"
        )
    if not engine.is_vllm(before=(0, 26)):
        raise not_analysed(f"bitsandbytes in {engine.label}, of which some drop it")
    if block.get("bnb_4bit_quant_storage") not in (None, "uint8"):
        raise refused(
            engine, "ValueError", "bnb_4bit_quant_storage is not uint8", "bitsandbytes.py"
        )
    names = _texts(engine, block.get("llm_int8_skip_modules") or [])
    return Exclusions(Scheme(Storage.BNB), frozenset(names))


def _resolve_bitsandbytes(_context: Context, found: Exclusions, module: Module) -> Scheme:
    """``is_layer_skipped_bnb``: an entry is one part of a name, or all up to some dot."""
    if module.kind is Kind.HEAD:
        return DENSE
    if module.kind is Kind.EXPERTS:
        return found.scheme
    parts = module.name.split(".")
    starts = (".".join(parts[: at + 1]) for at in range(len(parts)))
    skipped = not found.names.isdisjoint((*parts, *starts))
    return DENSE if skipped else found.scheme


def _texts(engine: Engine, value: Any) -> list[str]:
    if not isinstance(value, list | str | dict):
        raise refused(engine, "TypeError", "the list of what is not quantized is none", "fp8.py")
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise not_analysed("the list of what is not quantized holds something else than names")
    return value


def _method(
    names: Sequence[str],
    read: Callable[[Context], Exclusions],
    resolve: Callable[[Context, Exclusions, Module], Scheme],
    in_transformers: bool,
) -> Method:
    """A method whose rules are known for vLLM alone; ``names`` are what it calls it."""
    name = names[0]
    known = dict.fromkeys(names, ANY)

    def reader(context: Context) -> Resolver:
        found = read(context)
        return lambda module: resolve(context, found, module)

    def unread(context: Context) -> Resolver:
        raise not_analysed(f"{name} in {context.engine.label}")

    return method_read_by(
        name,
        {
            Family.VLLM: Reader(known, reader, f"{name}.py"),
            Family.SGLANG: Reader(known, unread, f"{name}.py"),
            Family.TRANSFORMERS: Reader(known if in_transformers else {}, unread, f"{name}.py"),
        },
    )


FP8 = _method(["fp8"], _read_fp8, _resolve_fp8, in_transformers=True)
MODELOPT = _method(
    ["modelopt", "modelopt_fp4"], _read_modelopt, _resolve_modelopt, in_transformers=False
)
BITSANDBYTES = _method(
    ["bitsandbytes"], _read_bitsandbytes, _resolve_bitsandbytes, in_transformers=True
)
