"""GPTQ's declaration (a list of modules, ``dynamic`` rules) as each engine reads it.

Source: vLLM 0.19 quantization/{gptq_marlin,gptq,utils/gptq_utils}.py, from 0.24 auto_gptq.py;
SGLang 0.5.23 quantization/gptq/gptq.py and quantization/utils.py; transformers 5.23 GPTQConfig with
optimum 2.3 gptq/quantizer.py.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from nybble.doctor.engines import Family
from nybble.doctor.layout.names import built_name
from nybble.doctor.layout.spec import Kind, Module
from nybble.doctor.resolve.built import DENSE, Block, Scheme, Storage
from nybble.doctor.resolve.method import Context
from nybble.doctor.resolve.outcome import not_analysed
from nybble.doctor.resolve.reading import (
    ANY,
    MARLIN_GPTQ,
    MARLIN_GROUPS,
    Reader,
    Resolver,
    agreed,
    contains_any,
    fusions,
    given,
    method_read_by,
    needed,
    parts_by_last_name,
    renamed,
    scheme,
)

_FORMATS = ("gptq", "gptq_v2")


class _Gptq:
    """One declaration, read by vLLM or SGLang."""

    def __init__(self, context: Context) -> None:
        """Raises what the engine's config class raises."""
        block, engine = context.block, context.engine
        self._context = context
        dynamic = given(block, "dynamic", default={})
        self._dynamic: dict[str, Any] = {} if dynamic is None else dynamic
        self._bits = needed(block, "bits")
        self._group = needed(block, "group_size")
        self._desc_act = needed(block, "desc_act")
        if engine.is_vllm(before=(0, 24)) and not _is_for_marlin(block):
            Fraction(32, self._bits)
            if self._bits not in [2, 3, 4, 8]:
                raise ValueError(f"Currently, only 2/3/4/8-bit is supported, not {self._bits}")
            raise not_analysed(
                "GPTQ weights that Marlin does not take run in float16 kernels here: not analysed"
            )
        if engine.family is Family.SGLANG and not _is_for_marlin(block):
            raise ValueError("Unknown quantization method: gptq (it is not one for gptq_marlin)")
        self._sym = needed(block, "sym")
        self._head = given(block, "lm_head", default=False)
        if engine.is_vllm(since=(0, 30)):
            self._check_order()
        _check_type(self._bits, self._sym)
        listed = _listed(context) if engine.is_vllm() else []
        self._listed = frozenset(renamed(context, name) for name in listed)

    def build(self, module: Module) -> Scheme:
        """What the engine builds the module as."""
        if module.kind is Kind.HEAD and not self._head:
            return DENSE
        if module.kind is Kind.EXPERTS:
            return self._experts(module)
        is_listed = self._is_listed(module)
        rule = self._rule_for(module.name)
        return self._packed(rule, MARLIN_GROUPS) if is_listed and rule is not False else DENSE

    def _experts(self, module: Module) -> Scheme:
        """No list is asked, in SGLang no rule, nor where other kernels than Marlin's take over."""
        if self._context.engine.family is Family.SGLANG or self._group not in MARLIN_GROUPS:
            return scheme(Storage.GPTQ, self._bits, self._group, self._sym)
        rule = self._rule_for(module.name)
        return DENSE if rule is False else self._packed(rule)

    def _is_listed(self, module: Module) -> bool:
        """Whether it is to be quantized, by the list: an entry is a substring, in vLLM alone."""
        engine = self._context.engine
        # 0.32: what lists nothing could not be read, so everything is.
        if not engine.is_vllm() or (not self._listed and engine.is_vllm(since=(0, 30))):
            return True
        names = parts_by_last_name(module.name, fusions(self._context, module)) or [module.name]
        return agreed(module.name, [contains_any(name, self._listed) for name in names])

    def _rule_for(self, name: str) -> Any:
        """The first rule that matches the name at its start, as it is; False: a negative one."""
        for pattern, rule in self._dynamic.items():
            if pattern.startswith("-:"):
                if self._context.patterns.match(pattern.removeprefix("-:"), name):
                    return False
            elif self._context.patterns.match(pattern.removeprefix("+:"), name):
                # vLLM asks ``== False``, which 0 is too.
                is_false = rule is False or (rule == 0 and self._context.engine.is_vllm())
                return False if is_false else rule
        return {}

    def _packed(self, rule: Any, groups: tuple[int, ...] | None = None) -> Scheme:
        bits = rule.get("bits", self._bits)
        bits = bits if isinstance(bits, int) else self._bits
        group = rule.get("group_size", self._group)
        group = group if isinstance(group, int) else self._group
        sym = rule.get("sym", self._sym)
        sym = sym if isinstance(sym, bool) else self._sym
        _check_type(bits, sym)
        if groups is not None and group not in groups:
            raise ValueError(f"Marlin does not support group_size = {group}")
        return scheme(Storage.GPTQ, bits, group, sym)

    def _check_order(self) -> None:
        """gptq_utils.py, ``normalize_and_validate_gptq_desc_act`` (vllm#54809)."""
        refusal = "GPTQ group activation ordering (desc_act=True) is no longer supported"
        if self._desc_act and self._group != -1:
            raise ValueError(refusal)
        for pattern, rule in self._dynamic.items():
            if pattern.startswith("-:") or not isinstance(rule, dict):
                continue
            is_ordered = rule.get("desc_act", self._desc_act)
            if is_ordered and rule.get("group_size", self._group) != -1:
                raise ValueError(f"{refusal}: dynamic rule {pattern!r}")


class _ByOptimum:
    """Transformers' reading: of the decoder's blocks, what ends as the list says."""

    def __init__(self, context: Context) -> None:
        """Raises what GPTQConfig and optimum's GPTQQuantizer raise."""
        block = context.block
        if "bits" not in block:
            raise TypeError("__init__() missing 1 required positional argument: 'bits'")
        self._bits, self._group = block["bits"], block.get("group_size", 128)
        self._sym = block.get("sym", True)
        if self._bits not in [2, 3, 4, 8]:
            raise ValueError(f"Only support quantization to [2,3,4,8] bits, not {self._bits}")
        if self._group != -1 and self._group <= 0:
            raise ValueError("group_size must be greater than 0 or equal to -1")
        if not 0 < block.get("damp_percent", 0.1) < 1:
            raise ValueError("damp_percent must between 0 and 1")
        layout_format = block.get("checkpoint_format")
        layout_format = block.get("format", "gptq") if layout_format is None else layout_format
        if layout_format.lower() not in _FORMATS:
            raise not_analysed(f"the GPTQ format {layout_format!r} is not analysed")
        blocks = block.get("block_name_to_quantize")
        layout, engine = context.layout, context.engine
        self._blocks = built_name(layout, engine, layout.blocks) if blocks is None else blocks
        listed = block.get("modules_in_block_to_quantize")
        self._ends: list[Any] | None = None
        if listed is not None:
            self._ends = sum(listed, [])  # noqa: RUF017 what is no list of lists fails here

    def build(self, module: Module) -> Scheme:
        """What stands in the module's place; experts are no Linears in transformers 5."""
        if module.kind is Kind.EXPERTS or not module.name.startswith(self._blocks):
            return DENSE
        if self._ends is not None and not any(module.name.endswith(end) for end in self._ends):
            return DENSE
        return scheme(Storage.GPTQ, self._bits, self._group, self._sym)


def _listed(context: Context) -> list[Any]:
    """vLLM's list: as declared, else every module with a tensor of integers in the folder."""
    listed = given(context.block, "modules_in_block_to_quantize", default=None) or []
    if isinstance(listed, list) and listed and isinstance(listed[0], list):
        listed = [name for part in listed for name in part]
    return list(listed) if listed else sorted(context.packed)


def _check_type(bits: Any, sym: Any) -> None:
    _ = 32 // bits  # the engines divide before they look
    if (bits, sym) not in MARLIN_GPTQ:
        raise ValueError(f"Unsupported quantization config: bits={bits}, sym={sym}")


def _is_for_marlin(block: Block) -> bool:
    """``is_gptq_marlin_compatible``, vLLM up to 0.23 and SGLang."""
    if block.get("checkpoint_format") == "marlin" or block.get("is_marlin_format"):
        return False
    values = [block.get(key) for key in ("bits", "group_size", "sym", "desc_act")]
    if None in values:
        return False
    return (values[0], values[2]) in MARLIN_GPTQ and values[1] in MARLIN_GROUPS


def _read(context: Context) -> Resolver:
    return _Gptq(context).build


def _read_by_optimum(context: Context) -> Resolver:
    return _ByOptimum(context).build


GPTQ = method_read_by(
    "gptq",
    {
        Family.VLLM: Reader(
            {"gptq": ANY, "gptq_marlin": ANY, "auto_gptq": (0, 24)},
            _read,
            "quantization/auto_gptq.py",
        ),
        Family.SGLANG: Reader(
            {"gptq": ANY, "gptq_marlin": ANY}, _read, "quantization/gptq/gptq.py"
        ),
        Family.TRANSFORMERS: Reader(
            {"gptq": ANY}, _read_by_optimum, "quantization_config.py and optimum 2.3"
        ),
    },
)
"""quant_method 'gptq'."""
