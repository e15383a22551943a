"""A declaration of compressed-tensors, read as each engine reads it: groups, targets, ignore.

Sources: ``CompressedTensorsConfig.from_config`` and ``apply_vllm_mapper`` of vLLM 0.19 to 0.32 and
SGLang 0.5.23; ``QuantizationConfig`` and ``QuantizationScheme`` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nybble.doctor.engines import Engine, Family
from nybble.doctor.layout.names import engine_name
from nybble.doctor.resolve.built import Block
from nybble.doctor.resolve.ct_arguments import Arguments, read_arguments
from nybble.doctor.resolve.ct_schemes import Group, quantizes_activations
from nybble.doctor.resolve.method import Context
from nybble.doctor.resolve.outcome import EarlyEnd, not_analysed, refused
from nybble.doctor.resolve.patterns import Patterns

_FILE = "compressed_tensors.py"
_SCHEME_KEYS = frozenset(
    {"targets", "weights", "input_activations", "output_activations", "format"}
)
_FORMATS = frozenset(
    {
        "dense",
        "sparse-bitmask",
        "sparse-24-bitmask",
        "int-quantized",
        "float-quantized",
        "naive-quantized",
        "pack-quantized",
        "marlin-24",
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
        "mxfp6-pack-quantized",
        "mxfp8-quantized",
    }
)
_STATUSES = ("initialized", "calibration", "frozen", "compressed", "decompressed")


class Entries:
    """A list of names and patterns ('re:...'), of which the first that matches counts."""

    def __init__(self, entries: Iterable[str], patterns: Patterns) -> None:
        self._tried = patterns
        self._all = tuple(dict.fromkeys(entries))
        self._places = {
            entry: place for place, entry in enumerate(self._all) if not _is_pattern(entry)
        }
        self._patterns = [
            (place, entry) for place, entry in enumerate(self._all) if _is_pattern(entry)
        ]
        self._by_class: dict[str, str | None] = {}

    def names_exactly(self, name: str) -> bool:
        """Whether an entry is the name itself."""
        return name in self._places

    def has(self, name: str, by_suffix: bool = False) -> bool:
        """Whether any entry matches."""
        return self.first(name, by_suffix) is not None

    def first(self, name: str, by_suffix: bool = False) -> str | None:
        """The first that is the name, or matches it from its start. A suffix ends whole parts.

        Raises PatternError or UntriedPattern, as do all that try patterns.
        """
        spellings = [name]
        if by_suffix:
            spellings += [name[at + 1 :] for at, letter in enumerate(name) if letter == "."]
        places = [self._places[one] for one in spellings if one in self._places]
        exact = min(places, default=len(self._all))
        for place, entry in self._patterns:
            if place > exact:
                break
            if self._tried.match(entry.removeprefix("re:"), name):
                return entry
        return self._all[exact] if places else None

    def first_class(self, name: str) -> str | None:
        """The first that is contained in a class's name, whatever its case, or matches it."""
        if name not in self._by_class:
            self._by_class[name] = next(filter(lambda one: self._fits(one, name), self._all), None)
        return self._by_class[name]

    def first_sorted(self, name: str) -> str | None:
        """The name itself if it is an entry, else the first pattern by the alphabet."""
        if name in self._places:
            return name
        patterns = sorted(entry for _, entry in self._patterns)
        return next((one for one in patterns if self._tried.match(one[3:], name)), None)

    def _fits(self, entry: str, name: str) -> bool:
        if _is_pattern(entry):
            return self._tried.match(entry.removeprefix("re:"), name)
        return entry.lower() in name.lower()


@dataclass(frozen=True)
class Declaration:
    """What an engine keeps of the block."""

    ignore: Entries
    targets: Entries
    groups: Mapping[str, Group]
    """By target."""
    is_compressed: bool
    """Whether Transformers builds compressed modules; the others do not look."""


def read_declaration(context: Context) -> Declaration:
    """Raises EarlyEnd: the engine refuses the declaration, or it is not known what it does."""
    engine, block = context.engine, context.block
    if block.get("transform_config"):
        raise not_analysed("transform_config: weights are stored rotated")
    if engine.family is Family.TRANSFORMERS:
        groups = _transformers_groups(engine, block)
        ignore = block.get("ignore") or []
    else:
        groups = _groups(engine, block)
        ignore = block.get("ignore", [])
        _check_sparsity(engine, block)
        _check_cache(engine, block)
        if engine.family is Family.SGLANG and "linear_fp8_config" in block:
            raise not_analysed("linear_fp8_config")
    names = _texts(engine, ignore, "ignore")
    renamed = {_renamed(context, target): group for target, group in groups.items()}
    return Declaration(
        ignore=Entries((_renamed(context, name) for name in names), context.patterns),
        targets=Entries(renamed, context.patterns),
        groups=renamed,
        is_compressed=block.get("quantization_status") == "compressed",
    )


def _groups(engine: Engine, block: Block) -> dict[str, Group]:
    """``_quantization_scheme_map_from_config``: later groups win, at the place of the first."""
    declared = block.get("config_groups", {})
    if not isinstance(declared, dict):
        raise refused(engine, "AttributeError", "config_groups is no object", _FILE)
    found: dict[str, Group] = {}
    for group in declared.values():
        targets = _targets(engine, group)
        if engine.family is Family.VLLM and len(targets) == 1 and targets[0].endswith("Attention"):
            continue
        if targets:
            found |= dict.fromkeys(targets, _group(engine, group, block.get("format")))
    return found


def _targets(engine: Engine, group: Any) -> list[str]:
    is_vllm = engine.family is Family.VLLM
    if not isinstance(group, dict):
        name = "TypeError" if is_vllm else "AttributeError"
        raise refused(engine, name, "a config group is no object", _FILE)
    if is_vllm and "targets" not in group:
        raise refused(engine, "KeyError", "a config group has no targets", _FILE)
    targets = _texts(engine, group.get("targets"), "targets")
    if "" in targets:
        raise not_analysed("an empty target")
    return targets


def _group(engine: Engine, group: dict[str, Any], format_of_all: Any) -> Group:
    weights = read_arguments(group.get("weights"), engine)
    if engine.is_vllm(since=(0, 30)) and weights.actorder == "group":
        raise refused(
            engine, "ValueError", "actorder group and dynamic are no longer supported", _FILE
        )
    own = group.get("format")
    name = own if own is not None else format_of_all
    name = name if isinstance(name, str) else ""
    is_vllm = engine.family is Family.VLLM
    declared = group.get("input_activations")
    inputs: Arguments | None = None
    if quantizes_activations(engine, name) or (is_vllm and declared):
        if declared:
            inputs = read_arguments(declared, engine)
        elif is_vllm and weights.type != "float":
            raise refused(
                engine, "AssertionError", f"format {name!r} needs input_activations", _FILE
            )
    outputs = group.get("output_activations") if engine.is_vllm(since=(0, 24)) else None
    return Group(weights, inputs, read_arguments(outputs, engine) if outputs else None, name)


def _transformers_groups(engine: Engine, block: Block) -> dict[str, Group]:
    """``QuantizationConfig.model_validate``; without groups and cache scheme, it is not asked."""
    declared, cache = block.get("config_groups"), block.get("kv_cache_scheme")
    if not declared and not cache:
        return {}
    if not isinstance(declared, dict):
        raise _invalid(engine, "config_groups is no object")
    if block.get("quantization_status", "initialized") not in _STATUSES:
        raise _invalid(engine, "quantization_status is unknown")
    if not isinstance(block.get("format", ""), str):
        raise _invalid(engine, "format is no text")
    if cache is not None:
        read_arguments(cache, engine)
    found: dict[str, Group] = {}
    for group in declared.values():
        if isinstance(group, list):
            raise not_analysed("a config group by the name of a preset")
        if not isinstance(group, dict):
            raise _invalid(engine, "a config group is no object")
        scheme = _transformers_group(engine, group)
        targets = _texts(engine, group.get("targets"), "targets")
        found |= {target: scheme for target in targets if scheme is not None}
    return found


def _transformers_group(engine: Engine, group: dict[str, Any]) -> Group | None:
    """None: it quantizes no weights."""
    if not _SCHEME_KEYS.issuperset(group):
        unknown = next(key for key in group if key not in _SCHEME_KEYS)
        raise _invalid(engine, f"the key {unknown[:40]!r} is unknown in a config group")
    name = group.get("format")
    if name is not None and (not isinstance(name, str) or name not in _FORMATS):
        raise _invalid(engine, "the format of a config group is unknown")
    keys = ("weights", "input_activations", "output_activations")
    weights, inputs, outputs = (
        None if group.get(key) is None else read_arguments(group[key], engine) for key in keys
    )
    if inputs is not None and inputs.strategy in ("channel", "block"):
        raise refused(engine, "NotImplementedError", f"activations by {inputs.strategy}", _FILE)
    if any(one is not None and one.actorder is not None for one in (inputs, outputs)):
        raise _invalid(engine, "actorder of activations")
    return None if weights is None else Group(weights, inputs, outputs, name or "")


def _check_sparsity(engine: Engine, block: Block) -> None:
    """``_parse_sparsity_config``: gone since 0.24, of which an empty one is the usual trace."""
    sparsity = block.get("sparsity_config")
    if not sparsity:
        return
    if not isinstance(sparsity, dict) or not isinstance(sparsity.get("format"), str):
        raise _invalid(engine, "sparsity_config has no format")
    if engine.is_vllm(since=(0, 24)):
        if sparsity.get("targets"):
            raise refused(engine, "DeprecationWarning", "sparsity is no longer supported", _FILE)
    elif sparsity.get("targets"):
        raise not_analysed("sparsity_config with targets")


def _check_cache(engine: Engine, block: Block) -> None:
    """``validate_kv_cache_scheme``, which every attention of vLLM calls; SGLang goes without."""
    cache = block.get("kv_cache_scheme")
    if cache is None or engine.family is not Family.VLLM:
        return
    if not isinstance(cache, dict):
        raise refused(engine, "AttributeError", "kv_cache_scheme is no object", _FILE)
    faults = (cache.get("type") != "float", cache.get("num_bits") != 8)
    if all(faults) if engine.is_vllm(before=(0, 24)) else any(faults):
        raise refused(engine, "NotImplementedError", "only an FP8 cache is supported", _FILE)
    strategy = cache.get("strategy")
    if strategy not in ("tensor", "attn_head"):
        known = strategy in ("channel", "group", "block", "token", "tensor_group")
        name = "NotImplementedError" if known else "ValueError"
        raise refused(engine, name, "kv_cache_scheme's strategy is not supported", _FILE)
    if not cache.get("symmetric"):
        raise refused(engine, "NotImplementedError", "the cache's scales must be symmetric", _FILE)


def _texts(engine: Engine, value: Any, key: str) -> list[str]:
    is_validated = engine.family is Family.TRANSFORMERS
    name = "ValidationError" if is_validated else "TypeError"
    if isinstance(value, str | dict) and not is_validated:
        raise not_analysed(f"{key} is no list, yet can be iterated over")
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise refused(engine, name, f"{key} is no list of texts", _FILE)
    return value


def _renamed(context: Context, entry: str) -> str:
    """An entry in the engine's names: patterns, and what has no dot, stay as they are."""
    if "." not in entry or _is_pattern(entry):
        return entry
    return engine_name(context.layout, context.engine, entry)


def _is_pattern(entry: str) -> bool:
    return entry.startswith("re:")


def _invalid(engine: Engine, message: str) -> EarlyEnd:
    return refused(engine, "ValidationError", message, _FILE)
