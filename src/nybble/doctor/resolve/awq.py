"""AWQ's declaration (a list of modules that stay dense) as each engine reads it.

Source: vLLM 0.19 quantization/{awq,awq_marlin}.py, from 0.24 auto_awq.py, with ``is_layer_skipped``
of utils/quant_utils.py; SGLang 0.5.23 quantization/awq/awq.py; transformers 5.23 AwqConfig and
integrations/awq.py.
"""

from __future__ import annotations

from nybble.doctor.engines import Family
from nybble.doctor.layout.spec import Kind, Module
from nybble.doctor.resolve.built import DENSE, Block, Scheme, Storage
from nybble.doctor.resolve.method import Context
from nybble.doctor.resolve.outcome import not_analysed
from nybble.doctor.resolve.reading import (
    ANY,
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

_FORMATS = ("gemm", "gemv", "gemv_fast", "llm-awq")
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


class _Awq:
    """One declaration, read by vLLM or SGLang."""

    def __init__(self, context: Context) -> None:
        """Raises what the engine's config class raises."""
        block, engine = context.block, context.engine
        self._context = context
        self._bits = needed(block, "w_bit", "bits")
        self._group = needed(block, "q_group_size", "group_size")
        self._zero_point = needed(block, "zero_point")
        self._head = given(block, "lm_head", default=False)
        if self._bits != 4:
            _ = 32 // self._bits  # the engines divide before they look
            raise ValueError(f"Unsupported num_bits = {self._bits}")
        if not engine.is_vllm(since=(0, 24)) and not _is_for_marlin(block):
            raise not_analysed(
                "AWQ weights that Marlin does not take run in float16 kernels here: not analysed"
            )
        declared = given(block, "modules_to_not_convert", default=None) or []
        kept = list(declared)
        if engine.is_vllm() and not kept:
            kept = self._dense_in_files()
        self._declared = frozenset(name for name in declared if isinstance(name, str))
        self._kept = frozenset(renamed(context, name) for name in kept)

    def build(self, module: Module) -> Scheme:
        """What the engine builds the module as."""
        if (module.kind is Kind.HEAD and not self._head) or self._is_kept(module):
            return DENSE
        return scheme(Storage.AWQ, self._bits, self._group, not self._zero_point)

    def _is_kept(self, module: Module) -> bool:
        name, engine = module.name, self._context.engine
        parts: list[str] = []
        if engine.is_vllm() and module.kind is not Kind.EXPERTS:
            parts = parts_by_last_name(name, fusions(self._context, module))
        if parts and engine.is_vllm(since=(0, 24)) and contains_any(name, self._kept):
            return True
        if agreed(name, [contains_any(part, self._kept) for part in parts or [name]]):
            return True
        return self._is_unfit_for_marlin(module) and contains_any(name, self._declared)

    def _is_unfit_for_marlin(self, module: Module) -> bool:
        """Up to 0.23 such a shape falls to awq.py, which knows neither vLLM's names nor parts."""
        outputs, inputs = sum(one.shape[0] for one in module.members), module.members[0].shape[1]
        is_old = self._context.engine.is_vllm(before=(0, 24)) and module.kind is Kind.LINEAR
        return is_old and bool(outputs % 64 or inputs % 128)

    def _dense_in_files(self) -> list[str]:
        """Without a list: all that holds a tensor and none of integers, as ``packed`` tells.

        A parent of bare parameters counts (``linear_attn`` with its A_log), and, as names are
        looked for as substrings, takes all its Linears with it.
        """
        names = {name.rpartition(".")[0] for name in self._context.layout.tensors}
        return sorted(names - self._context.packed)


class _ByTransformers:
    """Every Linear of the model, the tower's too, but for the output head and what is listed."""

    def __init__(self, context: Context) -> None:
        """Raises what AwqConfig raises."""
        block = context.block
        version = block.get("version")
        layout_format = block.get("format", "gemm") if version is None else version.lower()
        if layout_format not in _FORMATS:
            raise ValueError(f"Invalid format {layout_format!r}")
        self._bits, self._group = block.get("bits", 4), block.get("group_size", 128)
        self._zero_point = block.get("zero_point", True)
        if self._bits != 4 or layout_format != "gemm":
            raise not_analysed(f"AWQ of {self._bits} bits as {layout_format!r} is not analysed")
        self._kept = ["lm_head", *(block.get("modules_to_not_convert") or [])]
        self._patterns = context.patterns

    def build(self, module: Module) -> Scheme:
        """What stands in the module's place; experts are no Linears in transformers 5."""
        if module.kind is Kind.EXPERTS or any(self._keeps(key, module.name) for key in self._kept):
            return DENSE
        return scheme(Storage.AWQ, self._bits, self._group, not self._zero_point)

    def _keeps(self, key: str, name: str) -> bool:
        """quantizers_utils.py, ``should_convert_module``."""
        return self._patterns.match(f"(?:{key}){_BOUNDARY}", name) or name.endswith(key)


def _is_for_marlin(block: Block) -> bool:
    """``is_awq_marlin_compatible``, vLLM up to 0.23 and SGLang."""
    is_supported = block.get("bits") == 4 and block.get("group_size") in MARLIN_GROUPS
    return is_supported and bool(block.get("zero_point"))


def _read(context: Context) -> Resolver:
    return _Awq(context).build


def _read_by_transformers(context: Context) -> Resolver:
    return _ByTransformers(context).build


AWQ = method_read_by(
    "awq",
    {
        Family.VLLM: Reader(
            {"awq": ANY, "awq_marlin": ANY, "auto_awq": (0, 24)}, _read, "quantization/auto_awq.py"
        ),
        Family.SGLANG: Reader({"awq": ANY, "awq_marlin": ANY}, _read, "quantization/awq/awq.py"),
        Family.TRANSFORMERS: Reader({"awq": ANY}, _read_by_transformers, "integrations/awq.py"),
    },
)
"""quant_method 'awq'."""
