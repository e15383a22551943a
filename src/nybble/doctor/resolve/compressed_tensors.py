"""compressed-tensors: which group of a declaration applies to a module, in each engine.

Sources: ``compressed_tensors/{compressed_tensors,utils}.py`` of vLLM 0.19, 0.24, 0.28, 0.30, 0.32
and SGLang 0.5.23; ``quantizer_compressed_tensors.py`` of Transformers 5.23 with ``utils/match.py``
of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nybble.doctor.engines import Engine, Family
from nybble.doctor.layout.spec import Kind, Module
from nybble.doctor.resolve.built import DENSE, Scheme, Storage
from nybble.doctor.resolve.ct_declaration import Declaration, read_declaration
from nybble.doctor.resolve.ct_schemes import Group, scheme_of
from nybble.doctor.resolve.fusing import class_of, parts_of
from nybble.doctor.resolve.method import Context
from nybble.doctor.resolve.outcome import EarlyEnd, not_analysed, refused
from nybble.doctor.resolve.reading import ANY, Reader, Resolver, method_read_by

_UTILS = "compressed_tensors/utils.py"
_TORCH_CLASSES = ("Linear", "Module")
"""Classes of an ``nn.Linear`` that an entry may name, in the order in which they count."""
_EXPERT = ("gate_proj", "up_proj", "down_proj")


def _read(context: Context) -> Resolver:
    declared = read_declaration(context)

    def resolve(module: Module) -> Scheme:
        group = _group_of(context, declared, module)
        built = DENSE if group is None else scheme_of(context.engine, module.kind, group)
        if not isinstance(built, Scheme):
            raise EarlyEnd(built)
        _refuse_uneven_groups(context.engine, module, built)
        return built

    return resolve


def _refuse_uneven_groups(engine: Engine, module: Module, built: Scheme) -> None:
    """vLLM raises while it builds such a module, Transformers when it first runs one.

    SGLang is not known to look. Raises EarlyEnd.
    """
    size = built.group_size or -1
    inputs = [linear.shape[1] for linear in module.members if size > 0 and linear.shape[1] % size]
    if built.storage is Storage.PACKED and inputs and engine.family is not Family.SGLANG:
        old = engine.is_vllm(before=(0, 28))
        raise refused(
            engine,
            "AssertionError" if old else "ValueError",
            f"groups of {size} do not divide {inputs[0]} inputs",
            "compressed_tensors_wNa16.py; compressed-tensors 0.20, forward_helpers.py",
        )


_NAME = "compressed-tensors"

COMPRESSED_TENSORS = method_read_by(
    _NAME,
    {
        Family.VLLM: Reader({_NAME: ANY, "compressed_tensors": ANY}, _read, _UTILS),
        Family.SGLANG: Reader({_NAME: ANY}, _read, _UTILS),
        Family.TRANSFORMERS: Reader({_NAME: ANY}, _read, "compressed_tensors 0.20, match.py"),
    },
)
"""quant_method 'compressed-tensors'."""


def _group_of(context: Context, declared: Declaration, module: Module) -> Group | None:
    """The config group that applies; None: the module stays dense."""
    engine = context.engine
    if engine.family is Family.TRANSFORMERS:
        return _transformers_group(declared, module)
    if module.kind is Kind.EXPERTS:
        return _experts_group(engine, declared, module)
    if module.kind is Kind.HEAD and engine.family is Family.SGLANG:
        return _sglang_head_group(engine, declared, module)
    group = _named_group(engine, declared, module.name, parts_of(context, module), module)
    if group is not None and module.kind is Kind.HEAD and engine.is_vllm(before=(0, 24)):
        raise not_analysed("vLLM 0.19 builds the output head dense, 0.22 quantized")
    return group


def _named_group(
    engine: Engine, declared: Declaration, name: str, parts: Sequence[str], module: Module
) -> Group | None:
    """``get_scheme_dict``: unless it is ignored, the group of the first target that matches."""
    if _is_ignored(engine, declared, name, parts) or not declared.groups:
        return None
    for target in _matched_targets(engine, declared, name, parts, module):
        if target is not None:
            return declared.groups[target]
    if engine.family is Family.SGLANG:
        raise refused(engine, "ValueError", f"{name} matches no target of any config group", _UTILS)
    if engine.is_vllm(before=(0, 24)) and module.kind is not Kind.HEAD:
        raise not_analysed("vLLM 0.19 refuses what matches no target, 0.22 builds it dense")
    return None


def _matched_targets(
    engine: Engine, declared: Declaration, name: str, parts: Sequence[str], module: Module
) -> Iterator[str | None]:
    """What each way of matching finds, in the order in which the engine tries them."""
    yield declared.targets.first(name)
    class_name = class_of(engine, module)
    if not engine.is_vllm(since=(0, 28)):
        yield declared.targets.first_class(class_name)
    if parts:
        of_parts = [declared.targets.first(part) for part in parts]
        yield of_parts[0] if None not in of_parts else None
    if engine.is_vllm(since=(0, 28)):
        yield declared.targets.first_class(class_name)
    if module.kind is Kind.EXPERTS and "Linear" in declared.groups:
        # Both engines add the class of the experts to what "Linear" targets.
        yield "Linear"


def _is_ignored(engine: Engine, declared: Declaration, name: str, parts: Sequence[str]) -> bool:
    """``should_ignore_layer``. Raises EarlyEnd if it holds for some of the parts only."""
    by_suffix = engine.family is Family.SGLANG
    ignore = declared.ignore
    if engine.is_vllm(since=(0, 30)):
        if ignore.has(name):
            return True
        is_split = bool(parts)
    else:
        # An exact entry with the fused name counts, a pattern does not.
        is_split = bool(parts) and not ignore.names_exactly(name)
    if not is_split:
        return ignore.has(name, by_suffix)
    of_parts = [ignore.has(part, by_suffix) for part in parts]
    if any(of_parts) and not all(of_parts):
        raise refused(
            engine, "ValueError", f"{name} is fused of parts of which only some are ignored", _UTILS
        )
    return of_parts[0]


def _experts_group(engine: Engine, declared: Declaration, module: Module) -> Group | None:
    """The group of the first expert's three Linears, which all others are built like."""
    groups = [
        _named_group(engine, declared, f"{module.name}.0.{projection}", (), module)
        for projection in _EXPERT
    ]
    if any(group != groups[0] for group in groups):
        raise refused(
            engine, "ValueError", f"{module.name} has experts with unlike schemes", _UTILS
        )
    return groups[0]


def _sglang_head_group(engine: Engine, declared: Declaration, module: Module) -> Group | None:
    """``get_lm_head_scheme``: targets count by name alone, a class such as Linear does not."""
    if _is_ignored(engine, declared, module.name, ()):
        return None
    target = declared.targets.first(module.name, by_suffix=True)
    if target is None:
        return None
    if declared.groups[target].weights.block is not None:
        raise refused(
            engine, "NotImplementedError", "the output head cannot be block-quantized", _UTILS
        )
    return declared.groups[target]


def _transformers_group(declared: Declaration, module: Module) -> Group | None:
    """``apply_quantization_config``: only what is an ``nn.Linear``, by name, pattern or class."""
    if not declared.is_compressed or module.kind is Kind.EXPERTS:
        return None
    if declared.ignore.has(module.name) or any(map(declared.ignore.names_exactly, _TORCH_CLASSES)):
        return None
    target = declared.targets.first_sorted(module.name)
    by_class = (name for name in _TORCH_CLASSES if declared.targets.names_exactly(name))
    target = target if target is not None else next(by_class, None)
    return None if target is None else declared.groups[target]
