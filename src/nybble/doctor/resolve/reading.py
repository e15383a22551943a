"""What the readings of auto_round, gptq and awq declarations share.

A declaration is hostile, and the engines check little of it: most wrong values end in whatever
Python raises when they are used. So a reading does with a value what the engine does with it, and
``raised_by`` makes a Refusal of what that raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nybble.doctor.engines import Engine, Family, Version
from nybble.doctor.findings import Part
from nybble.doctor.layout.names import engine_name, has_tower, is_qwen3_5, is_qwen3_next
from nybble.doctor.layout.spec import Module
from nybble.doctor.resolve.built import DENSE, Block, Built, Refusal, Scheme, Storage
from nybble.doctor.resolve.method import Context, Method
from nybble.doctor.resolve.outcome import EarlyEnd, not_analysed, once_per_context, refused
from nybble.doctor.resolve.patterns import PatternError, UntriedPattern

Resolver = Callable[[Module], Scheme]
"""Decides one module; raises what the engine raises, or EarlyEnd."""

MARLIN_GROUPS = (-1, 32, 64, 128)
"""Group sizes of the Marlin kernels: utils/marlin_utils.py of vLLM and of SGLang."""

MARLIN_GPTQ = frozenset({(4, True), (8, True)})
"""Bits and symmetry that they have for GPTQ's layout."""

_FEW = 100
"""Entries that are tried one by one; more are a checkpoint's whole list of modules."""

_RAISED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)
_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")
_FUSED = {"qkv_proj": _QKV, "gate_up_proj": _GATE_UP}
ANY: Version = (0, 0)
"""Every release."""

_FUSED_DELTA = {
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}


@dataclass(frozen=True)
class Reader:
    """How one engine reads declarations of a method."""

    names: Mapping[str, Version]
    """What it calls the method, and the first release that does."""
    read: Callable[[Context], Resolver]
    """Takes a declaration and returns what decides its modules."""
    file: str
    """The engine's own, for the evidence."""


def method_read_by(name: str, readers: Mapping[Family, Reader]) -> Method:
    """A Method with one reader for each engine."""

    def read(context: Context) -> Resolver:
        reader = readers[context.engine.family]
        with raised_by(context.engine, reader.file):
            return reader.read(context) if _is_called(reader, context) else _dense

    reading = once_per_context(read)

    def refusal(context: Context) -> Refusal | None:
        found = reading(context)
        return found if isinstance(found, Refusal) else None

    def resolve(context: Context, module: Module) -> Built:
        resolver = reading(context)
        if not callable(resolver):
            return resolver
        try:
            with raised_by(context.engine, readers[context.engine.family].file):
                return DENSE if _keeps_mtp_dense(context, module) else resolver(module)
        except EarlyEnd as end:
            return end.outcome

    return Method(name, refusal, resolve)


def _is_called(reader: Reader, context: Context) -> bool:
    """Whether the engine knows the method by this name; ValueError if it insists on one.

    Transformers minds the case, and loads as if unquantized what it does not know, with a warning
    (``supports_quant_method``).
    """
    engine, name = context.engine, str(context.block.get("quant_method"))
    is_transformers = engine.family is Family.TRANSFORMERS
    since = reader.names.get(name if is_transformers else name.lower())
    if since is not None and engine.first >= since:
        return True
    if is_transformers:
        return False
    raise ValueError(f"Unknown quantization method: {name[:40]}")


def _dense(_module: Module) -> Scheme:
    return DENSE


@contextmanager
def raised_by(engine: Engine, file: str) -> Iterator[None]:
    """Makes an EarlyEnd of what would be raised in the engine's ``file``."""
    try:
        yield
    except UntriedPattern as error:
        raise not_analysed(str(error)) from None
    except PatternError as error:
        raise refused(engine, "re.error", str(error), file) from None
    except _RAISED as error:
        message = " ".join(str(error).split())
        raise refused(engine, type(error).__name__, message[:200], file) from None


def needed(block: Block, *keys: str) -> Any:
    """The value of the first key that is there; raises ValueError, as base_config.py does."""
    for key in keys:
        if key in block:
            return block[key]
    raise ValueError(f"Cannot find any of {list(keys)} in the model's quantization config")


def given(block: Block, *keys: str, default: Any) -> Any:
    """The same, or the default."""
    return next((block[key] for key in keys if key in block), default)


def renamed(context: Context, name: Any) -> str:
    """A name of the declaration as vLLM maps it; AttributeError for what is no text."""
    if not isinstance(name, str):
        raise AttributeError(f"'{type(name).__name__}' object has no attribute 'startswith'")
    return engine_name(context.layout, context.engine, name)


def scheme(storage: Storage, bits: Any, group_size: Any, symmetric: Any) -> Scheme:
    """A packed scheme; TypeError for what no layer could be built with."""
    for number in (bits, group_size):
        if not isinstance(number, int):
            raise TypeError(f"unsupported operand type: {type(number).__name__}")
    return Scheme(storage, int(bits), int(group_size), bool(symmetric))


def fusions(context: Context, module: Module) -> Mapping[str, tuple[str, ...]]:
    """``packed_modules_mapping`` when the module is built: fused name -> names of its parts.

    vLLM's models set it, the draft's its own; in SGLang 0.5.23 only Qwen3-Next's reaches the
    config of these methods (models/qwen3_next.py), so that elsewhere rules see fused names only.
    """
    layout, engine = context.layout, context.engine
    if engine.family is Family.SGLANG:
        return _FUSED if is_qwen3_next(layout) else {}
    if module.part is Part.MTP:
        if is_qwen3_next(layout) and engine.is_vllm(before=(0, 28)):
            return {"qkv_proj": _QKV, "gate_up_proj": ("up_proj", "down_proj")}  # their slip
        return _FUSED
    if is_qwen3_next(layout):
        return _FUSED | {name: (name,) for name in _FUSED_DELTA}
    if is_qwen3_5(layout):
        tower = {"qkv": ("qkv",)} if has_tower(layout) else {}
        return _FUSED | tower | _FUSED_DELTA
    return _FUSED


def parts_by_last_name(name: str, fused: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The names of the parts of a module whose last name is a fused one; none of any other."""
    last = name[name.rfind(".") + 1 :]
    return [name.replace(last, part) for part in fused.get(last, ())]


def contains_any(name: str, entries: frozenset[str]) -> bool:
    """Whether any entry is found in the name, in time that does not grow with many entries."""
    if len(entries) <= _FEW:
        return any(entry in name for entry in entries)
    if name in entries:
        return True
    pieces = {
        name[start : start + length]
        for length in _lengths(entries)
        for start in range(len(name) - length + 1)
    }
    return not entries.isdisjoint(pieces)


@lru_cache(maxsize=8)
def _lengths(entries: frozenset[str]) -> tuple[int, ...]:
    return tuple({len(entry) for entry in entries})


def begins_with_any(name: str, starts: frozenset[str]) -> bool:
    """Whether the name starts with any of these."""
    return any(name[:end] in starts for end in range(len(name) + 1))


def agreed(name: str, hits: list[bool]) -> bool:
    """What all parts of a fused module agree on; raises ValueError, as vLLM does, if they do not.

    Source: ``is_layer_gptq_quantized``, ``is_layer_skipped`` of vLLM 0.19 to 0.32.
    """
    if len(set(hits)) > 1:
        raise ValueError(f"Detected some but not all shards of {name} are quantized")
    return hits[0]


def _keeps_mtp_dense(context: Context, module: Module) -> bool:
    """vLLM's hook, whatever the method: a ``-:`` rule that says 'mtp' drops the layer's config.

    Source: qwen3_5_mtp.py since 0.28 (vllm#48816); fc does not take part.
    """
    if not (context.engine.is_vllm(since=(0, 28)) and is_qwen3_5(context.layout)):
        return False
    if module.part is not Part.MTP or not module.name.startswith("mtp.layers."):
        return False
    return any(key.startswith("-:") and "mtp" in key for key in context.block.get("dynamic", {}))
