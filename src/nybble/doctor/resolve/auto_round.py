"""AutoRound's declaration (``extra_config``, blocks by name) as vLLM and SGLang read it.

Source: vLLM 0.19 quantization/inc.py, from 0.24 quantization/inc/{inc,config_parser}.py and
inc/schemes; SGLang 0.5.23 quantization/auto_round.py, a copy of vLLM 0.19's with ``fullmatch``.
"""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from itertools import takewhile
from typing import Any

from nybble.doctor.engines import Engine, Family
from nybble.doctor.layout.spec import Kind, Module
from nybble.doctor.resolve.auto_round_loader import read_by_auto_round
from nybble.doctor.resolve.built import DENSE, Scheme, Storage
from nybble.doctor.resolve.method import Context
from nybble.doctor.resolve.outcome import not_analysed
from nybble.doctor.resolve.reading import (
    ANY,
    MARLIN_GPTQ,
    MARLIN_GROUPS,
    Reader,
    Resolver,
    begins_with_any,
    fusions,
    given,
    method_read_by,
    needed,
    renamed,
    scheme,
)

_GPTQ_FORMAT = "auto_round:auto_gptq"
# Sets, as in the engines: a value that cannot be hashed is a TypeError there as here.
_INT_FORMATS = frozenset({_GPTQ_FORMAT, "auto_round:auto_awq"})
_FLOAT_FORMATS = frozenset({"auto_round:fp8", "auto_round:llm_compressor"})
_BACKENDS = frozenset({"auto", "gptq", "gptq:marlin", "awq", "awq:marlin", "marlin"})
_OLD_BITS = frozenset({2, 3, 4, 8})
_BITS = frozenset({2, 3, 4, 5, 6, 7, 8})
_HUMMING_BITS = frozenset({2, 3, 5, 6, 7})
_SPECIAL = frozenset("*+?^$()[]{}|\\")
"""A key with any of these is tried as a pattern; a dot alone does not make one."""

_Config = tuple[Any, Any, Any]
"""Bits, group size and symmetry, before anything has checked them."""


class _Inc:
    """One declaration, read by one engine."""

    def __init__(self, context: Context) -> None:
        """Raises what the engine's config class raises."""
        engine, block = context.engine, context.block
        self._context = context
        self._is_sglang = engine.family is Family.SGLANG
        self._is_new = engine.is_vllm(since=(0, 30))
        self._bits = needed(block, "bits")
        self._group = self._normal(needed(block, "group_size"))
        self._sym = given(block, "sym", default=True) if self._is_new else needed(block, "sym")
        if self._bits not in (_BITS if self._is_new else _OLD_BITS):
            raise ValueError(f"Unsupported weight_bits: {self._bits}")
        self._packing, self._backend = _checked_kind(context)
        Fraction(32, self._bits)
        self._scalar(self._group)

        blocks = given(block, "block_name_to_quantize", "to_quant_block_names", default=None)
        blocks = blocks.split(",") if isinstance(blocks, str) else blocks
        self._blocks = [] if blocks is None else [renamed(context, name) for name in blocks]
        extra = given(block, "extra_config", default=None)
        self._extra: dict[str, Any] = (
            {} if extra is None else {renamed(context, name): rule for name, rule in extra.items()}
        )
        self._place = {key: place for place, key in enumerate(self._extra)}
        self._sorted = sorted(self._extra)
        self._patterns = [key for key in self._extra if not _SPECIAL.isdisjoint(key)]
        self._starts = frozenset(self._blocks)
        self._rules: dict[str, str | None] = {}

    def build(self, module: Module) -> Scheme:
        """What the engine builds the module as."""
        if not self._is_sglang:  # inc.py, get_quant_method
            for key in (module.name, f"model.{module.name}"):
                if key in self._extra and self._extra[key].get("bits", 16) >= 16:
                    return DENSE
        bits, group, sym = self._config_of(module)
        if not bits < 16:
            return DENSE
        if "gptq" in self._packing or "gptq" in self._backend:
            return self._gptq(module, bits, group, sym)
        return self._awq(module, bits, group, sym)

    def _config_of(self, module: Module) -> _Config:
        """By exact key, key that ends the name, experts, fused parts, pattern, default."""
        name = module.name
        if name in self._extra:
            return self._entry(name, True)
        if self._context.engine.is_vllm(since=(0, 28)):
            ends = [name[dot + 1 :] for dot, letter in enumerate(name) if letter == "."]
            found = [end for end in ends if end in self._place]
            if found:
                return self._entry(min(found, key=self._place.__getitem__), True)
        quantized = module.kind is not Kind.HEAD
        if self._blocks:
            quantized = begins_with_any(name, self._starts)
        if module.kind is Kind.EXPERTS and not self._context.engine.is_vllm(since=(0, 24)):
            # Since 0.24 the experts' class is no FusedMoE, for which alone the rule asks.
            after = self._sorted[bisect_left(self._sorted, name) :]
            experts = takewhile(lambda key: key.startswith(name), after)
            configs = {self._entry(key, quantized) for key in experts}
            if configs:
                return _the_only(configs, f"Fused MoE layer '{name}'")
        fused = self._fused(module, quantized) if self._extra else None
        return fused or self._entry(name, quantized)

    def _fused(self, module: Module, quantized: bool) -> _Config | None:
        """By the parts of a module whose name *contains* a fused one.

        Up to 0.23 the tower's 'qkv' is found in 'in_proj_qkvz', whose own entries then count for
        nothing; since 0.24 some part has to be configured.
        """
        name = module.name
        for fusion, parts in fusions(self._context, module).items():
            if name.count(fusion) != 1:
                continue
            names = [name.replace(fusion, part) for part in parts]
            asks_first = self._context.engine.is_vllm(since=(0, 24))
            if asks_first and not any(self._rule_for(part) is not None for part in names):
                continue
            configs = {self._entry(part, quantized) for part in names}
            return _the_only(configs, f"Fused module '{name}'")
        return None

    def _entry(self, name: str, quantized: bool) -> _Config:
        default = (self._bits, self._group, self._sym) if quantized else (16, -1, True)
        key = self._rule_for(name)
        if key is None:
            return default
        rule = self._extra[key]
        return (
            rule.get("bits", default[0]),
            self._normal(rule.get("group_size", default[1])),
            rule.get("sym", default[2]),
        )

    def _rule_for(self, name: str) -> str | None:
        """The key of the rule that holds for exactly this name, or matches it."""
        if name not in self._rules:
            self._rules[name] = name if name in self._extra else self._matching(name)
        return self._rules[name]

    def _matching(self, name: str) -> str | None:
        patterns = self._context.patterns
        tried = patterns.fullmatch if self._is_sglang else patterns.search
        return next(
            (key for key in self._patterns if patterns.is_sound(key) and tried(key, name)), None
        )

    def _gptq(self, module: Module, bits: Any, group: Any, sym: Any) -> Scheme:
        engine, group = self._context.engine, self._scalar(group)
        is_marlins = (bits, sym) in MARLIN_GPTQ and group in MARLIN_GROUPS
        if not (is_marlins and self._asks_for_marlin()) and not self._takes_humming(bits):
            if module.kind is Kind.EXPERTS:
                return _by_moe_wna16(scheme(Storage.GPTQ, bits, group, sym))
            if engine.is_vllm(since=(0, 24)):
                raise NotImplementedError(f"INC quantization with bits={bits}, sym={sym}")
            if bits not in _OLD_BITS:
                raise ValueError(f"Currently, only 2/3/4/8-bit is supported for GPTQ, not {bits}")
            if self._is_sglang and given(self._context.block, "desc_act", default=False):
                raise ValueError("AutoRound GPTQ loader supports desc_act=False only")
        return scheme(Storage.GPTQ, bits, group, sym)

    def _awq(self, module: Module, bits: Any, group: Any, sym: Any) -> Scheme:
        packed = scheme(Storage.AWQ, bits, self._scalar(group), sym)
        if bits == 4 or self._takes_humming(bits):
            return packed
        engine = self._context.engine
        falls_back = engine.is_vllm(since=(0, 24)) and (bits != 8 or engine.is_vllm(before=(0, 28)))
        if module.kind is Kind.EXPERTS and falls_back:
            return _by_moe_wna16(packed)
        raise ValueError(f"Unsupported num_bits = {bits} for AWQ")

    def _takes_humming(self, bits: Any) -> bool:
        return self._is_new and bits in _HUMMING_BITS

    def _asks_for_marlin(self) -> bool:
        # Up to 0.23 the backend is not handed on.
        ignored = self._context.engine.is_vllm(before=(0, 24))
        return ignored or self._backend == "auto" or "marlin" in self._backend

    def _normal(self, group: Any) -> Any:
        """config_parser.py, ``_normalize_group_size``."""
        if not self._is_new:
            return group
        if isinstance(group, list):
            if len(group) != 2 or not all(isinstance(value, int) for value in group):
                raise ValueError(f"group_size has to be a 2-D integer sequence, not {group!r}")
            return tuple(group)
        if not isinstance(group, int):
            raise ValueError(f"INC group_size must be an int, not {type(group).__name__}")
        return group

    def _scalar(self, group: Any) -> Any:
        if self._is_new and not isinstance(group, int):
            raise AssertionError("INC int quantization requires scalar group_size")
        return group


def _checked_kind(context: Context) -> tuple[str, str]:
    """Packing format and backend; raises what the engine raises for any it does not serve."""
    engine, block = context.engine, context.block
    data_type = given(block, "data_type", default="int")
    if engine.is_vllm(since=(0, 30)) and data_type == "fp8":
        data_type = "fp"
    packing = given(block, "packing_format", default=_GPTQ_FORMAT)
    if packing is None and engine.is_vllm(since=(0, 30)):
        packing = _GPTQ_FORMAT
    backends = ("backend", "vllm_backend", "sglang_backend")
    keys = backends if engine.family is Family.SGLANG else backends[:2]
    backend = given(block, *keys, default="auto")
    if _is_micro_scaled(engine, data_type):
        raise not_analysed(f"AutoRound's data type {data_type!r} is not analysed")
    if data_type != "int":
        raise ValueError(f"Unsupported data_type: {data_type}")
    if packing not in _INT_FORMATS:
        is_late = engine.is_vllm(since=(0, 30)) and packing in _FLOAT_FORMATS
        message = f"Unsupported packing_format: {packing}"
        raise AssertionError(message) if is_late else ValueError(message)
    if backend not in _BACKENDS:
        raise ValueError(f"Unsupported backend: {backend}")
    return packing, backend


def _is_micro_scaled(engine: Engine, data_type: Any) -> bool:
    """Whether it is a kind of float that the engine serves, by rules of its own."""
    if engine.is_vllm(since=(0, 30)) and data_type == "fp":
        return True
    return engine.is_vllm(since=(0, 26)) and "mx_fp" in data_type


def _the_only(configs: set[_Config], what: str) -> _Config:
    if len(configs) > 1:
        raise ValueError(f"{what} requires consistent quant config")
    return configs.pop()


def _by_moe_wna16(packed: Scheme) -> Scheme:
    if packed.bits in (4, 8):
        return packed
    raise not_analysed(f"experts of {packed.bits} bits are not analysed")


def _read(context: Context) -> Resolver:
    return _Inc(context).build


AUTO_ROUND = method_read_by(
    "auto-round",
    {
        Family.VLLM: Reader({"auto-round": ANY, "inc": ANY}, _read, "quantization/inc"),
        Family.SGLANG: Reader({"auto-round": ANY}, _read, "quantization/auto_round.py"),
        Family.TRANSFORMERS: Reader(
            {"auto-round": ANY},
            read_by_auto_round,
            "auto_round 0.16, inference/convert_model.py",
        ),
    },
)
"""quant_method 'auto-round', and the names that AutoRound has gone by before."""
