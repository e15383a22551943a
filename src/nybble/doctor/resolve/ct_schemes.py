"""Which tensors an engine builds for one config group of compressed-tensors, if it serves it.

Sources: ``get_scheme`` and ``get_moe_method`` of vLLM 0.19 to 0.32 and SGLang 0.5.23, and the
compressors of compressed-tensors 0.20, which Transformers calls.
"""

from __future__ import annotations

from dataclasses import dataclass

from nybble.doctor.engines import Engine, Family
from nybble.doctor.layout.spec import Kind
from nybble.doctor.resolve.built import DENSE, Built, NotAnalysed, Refusal, Scheme, Storage
from nybble.doctor.resolve.ct_arguments import Arguments

_FILE = "compressed_tensors.py"
_HOPPER = NotAnalysed("INT4 weights with 8-bit activations: what is built depends on the GPU")
_FP4 = Scheme(Storage.FP4, 4)
_FP8 = Scheme(Storage.FP8, 8)
_INT8 = Scheme(Storage.INT8)
_ACTIVATION_FORMATS = frozenset(
    {"naive-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized"}
)


@dataclass(frozen=True)
class Group:
    """One config group, as far as it decides what is built."""

    weights: Arguments
    inputs: Arguments | None
    outputs: Arguments | None
    format: str
    """The group's, else the declaration's; '': none that is known."""


def quantizes_activations(engine: Engine, name: str) -> bool:
    """Whether a format is one for which the engine reads ``input_activations``."""
    packed_too = engine.family is Family.SGLANG and name == "pack-quantized"
    return name in _ACTIVATION_FORMATS or packed_too


def scheme_of(engine: Engine, kind: Kind, group: Group) -> Built:
    """What the engine builds a module of this kind as, once a group applies to it."""
    if engine.family is Family.TRANSFORMERS:
        return _transformers(engine, group)
    if engine.family is Family.SGLANG:
        return _sglang_experts(group) if kind is Kind.EXPERTS else _sglang(engine, group)
    if kind is Kind.EXPERTS:
        return _vllm_experts(engine, group)
    built = _vllm(engine, group)
    if kind is Kind.HEAD and isinstance(built, Refusal) and built.exception == "ValueError":
        # Tried as an embedding next.
        weights = group.weights
        if weights.is_static_group_or_channel and weights.type == "int":
            return _packed(weights)
    return built


def _vllm(engine: Engine, group: Group) -> Built:
    """``CompressedTensorsConfig._get_scheme_from_parts``, in its order."""
    weights, inputs = group.weights, group.inputs
    special = _vllm_floats_of_four(engine, group)
    if special is not None:
        return special
    if _is_mxfp8(weights):
        return _mxfp8(engine)
    if _is_w4a8(weights, inputs, "group") and (
        inputs is not None and inputs.symmetric and _are_types(engine, weights, inputs, "float")
    ):
        return _HOPPER
    if _is_fake_quantized(engine, group):
        bits = (2, 4, 8)
        return _with_bits(engine, group, bits)
    is_packed = group.format == "pack-quantized"
    if is_packed and engine.is_vllm(since=(0, 28)) and _is_dynamic_integer(weights, inputs):
        return _with_bits(engine, group, tuple(range(2, 9)))
    if is_packed and inputs is None and weights.is_static_group_or_channel:
        if engine.is_vllm(since=(0, 28)):
            return _with_bits(engine, group, tuple(range(2, 9)))
        if weights.bits in (4, 8):
            return _packed(weights)
    if quantizes_activations(engine, group.format):
        return _vllm_activations(engine, group)
    return _unserved(engine, group)


def _vllm_floats_of_four(engine: Engine, group: Group) -> Built | None:
    """NVFP4 and MXFP4; None: neither."""
    weights, inputs = group.weights, group.inputs
    if _is_nvfp4(weights):
        if inputs is None:
            return _FP4
        if engine.is_vllm(before=(0, 24)):
            served = _is_nvfp4(inputs) and quantizes_activations(engine, group.format)
            return _FP4 if served else None
        if not _is_nvfp4(inputs):
            return _refusal(engine, "ValueError", "NVFP4 weights need NVFP4 activations, or none")
        return _FP4
    return _FP4 if _is_mxfp4(weights) else None


def _vllm_activations(engine: Engine, group: Group) -> Built:
    """The formats of quantized activations."""
    weights, inputs = group.weights, group.inputs
    if _is_fp8(weights, inputs) or _is_fp8_weights(weights, ("tensor", "channel", "block")):
        return _FP8
    if inputs is None:
        return _refusal(engine, "AttributeError", "the weights' type needs input_activations")
    if _is_w8a8(weights, inputs):
        return Scheme(Storage.INT8, 8)
    if _is_w4a8(weights, inputs, "group", "channel") and _are_types(engine, weights, inputs, "int"):
        return _INT8
    return _unserved(engine, group)


def _vllm_experts(engine: Engine, group: Group) -> Built:
    """``CompressedTensorsMoEMethod.get_moe_method``, in its order."""
    weights, inputs = group.weights, group.inputs
    if _is_mxfp4(weights):
        return _FP4
    if _is_mxfp8(weights):
        return _mxfp8(engine)
    if inputs is None and weights.is_static_group_or_channel:
        bits = tuple(range(2, 9)) if engine.is_vllm(since=(0, 28)) else (4, 8)
        if weights.bits in bits and group.format == "pack-quantized":
            return _packed(weights)
        return _refusal(engine, "ValueError", "experts need pack-quantized weights")
    if _is_nvfp4(weights):
        if inputs is None or _is_nvfp4(inputs):
            return _FP4
        return _refusal(engine, "ValueError", "NVFP4 weights need NVFP4 activations, or none")
    if _is_fp8(weights, inputs):
        return _FP8
    if inputs is not None and _is_w8a8(weights, inputs) and inputs.strategy == "token":
        return Scheme(Storage.INT8, 8)
    if inputs is None:
        return _refusal(engine, "AttributeError", "the weights' type needs input_activations")
    if _is_w4a8(weights, inputs, "group", "channel"):
        return NotAnalysed("experts of INT4 weights with 8-bit activations")
    return _refusal(engine, "RuntimeError", f"experts cannot be {_described(group)}")


def _sglang(engine: Engine, group: Group) -> Built:
    """``CompressedTensorsConfig._get_scheme_from_parts`` of SGLang, in its order."""
    weights, inputs = group.weights, group.inputs
    if inputs is None and weights.is_static_group_or_channel and weights.type == "int":
        if group.format == "pack-quantized" and weights.bits in (4, 8):
            return _packed(weights)
        return _refusal(engine, "ImportError", f"{_described(group)} is not supported")
    if not quantizes_activations(engine, group.format):
        return _unserved(engine, group)
    if _is_nvfp4(weights) and (inputs is None or _is_nvfp4(inputs)):
        return _FP4
    if inputs is not None and weights.bits == 4 and weights.type == "float":
        return _unserved(engine, group)
    if _is_fp8(weights, inputs) or _is_fp8_weights(weights, ("tensor", "channel")):
        return _FP8
    if inputs is not None and _is_w8a8(weights, inputs):
        return Scheme(Storage.INT8, 8)
    return _unserved(engine, group)


def _sglang_experts(group: Group) -> Built:
    weights, inputs = group.weights, group.inputs
    if inputs is None and weights.is_static_group_or_channel and weights.type == "int":
        if group.format == "pack-quantized" and weights.bits in (4, 8) and weights.symmetric:
            return _packed(weights)
    elif _is_nvfp4(weights) and (inputs is None or _is_nvfp4(inputs)):
        return _FP4
    elif _is_fp8(weights, inputs):
        return _FP8
    return NotAnalysed(f"experts that are {_described(group)}, in SGLang")


def _transformers(engine: Engine, group: Group) -> Built:
    """``compress_module``: by the group's own format, else the first that can hold the weights.

    The declaration's format plays no part.
    """
    weights, inputs = group.weights, group.inputs
    if weights.dynamic:
        return _refusal(engine, "AttributeError", "weights without fixed scales have none to load")
    if weights.strategy == "attn_head":
        return _refusal(engine, "ValueError", "weights have no scales by head")
    name = group.format or _inferred_format(weights, inputs)
    if name == "pack-quantized":
        return _packed(weights)
    if name in ("int-quantized", "naive-quantized", "float-quantized"):
        if weights.type == "int":
            return Scheme(Storage.INT8, 8) if weights.bits == 8 else _INT8
        if weights.bits == 8:
            return _FP8
    if name in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        return _FP4
    if name == "mxfp8-quantized":
        return _FP8
    return DENSE if name == "dense" else NotAnalysed(f"the format {name!r}, in Transformers")


def _inferred_format(weights: Arguments, inputs: Arguments | None) -> str:
    """``infer_module_format``: the most specific format first."""
    if weights.type == "float":
        if weights.group_size == 32 and (weights.bits != 8 or weights.scale_dtype == "uint8"):
            quantized = "mxfp8-quantized" if weights.bits == 8 else None
            return quantized or f"mxfp{weights.bits}-pack-quantized"
        if weights.bits == 4 and weights.group_size == 16:
            return "nvfp4-pack-quantized"
        return "float-quantized"
    if inputs is not None:
        return "int-quantized"
    return "pack-quantized" if 1 <= weights.bits <= 8 else "naive-quantized"


def _mxfp8(engine: Engine) -> Built:
    return _FP8 if engine.is_vllm(since=(0, 24)) else NotAnalysed("MXFP8, new in vLLM 0.22")


def _packed(weights: Arguments) -> Scheme:
    size = {"channel": -1, "group": weights.group_size}.get(weights.strategy)
    return Scheme(Storage.PACKED, weights.bits, size, weights.symmetric)


def _with_bits(engine: Engine, group: Group, served: tuple[int, ...]) -> Built:
    """Integers that are packed, or one a byte, if the kernel's table has their bits."""
    weights = group.weights
    if weights.bits not in served:
        return _refusal(engine, "ValueError", f"{weights.bits} bits are not supported")
    if not weights.symmetric and weights.bits not in (4, 8) and engine.is_vllm(before=(0, 30)):
        return _refusal(engine, "ValueError", f"{weights.bits} bits must be symmetric")
    if group.format == "int-quantized":
        return Scheme(Storage.INT8, 8) if weights.bits == 8 else _INT8
    return _packed(weights)


def _is_fake_quantized(engine: Engine, group: Group) -> bool:
    """``_is_wNa8o8_int``: INT8 in and out by fixed scales; in 0.24, also all uncommon widths."""
    weights = group.weights
    formats = ("pack-quantized", "int-quantized")
    is_integer = weights.type == "int" and weights.is_static_group_or_channel
    if not is_integer or group.format not in formats or not engine.is_vllm(since=(0, 24)):
        return False
    is_uncommon = engine.is_vllm(before=(0, 28)) and weights.bits not in (4, 8)
    return is_uncommon or all(map(_is_static_int8, (group.inputs, group.outputs)))


def _is_static_int8(activations: Arguments | None) -> bool:
    if activations is None or activations.dynamic:
        return False
    return (activations.type, activations.strategy, activations.bits) == ("int", "tensor", 8)


def _is_dynamic_integer(weights: Arguments, inputs: Arguments | None) -> bool:
    """``_is_wNaM_int``, of activations with 4 or 8 bits."""
    if inputs is None or weights.type != "int" or not weights.is_static_group_or_channel:
        return False
    is_served = inputs.type == "int" and inputs.symmetric and bool(inputs.dynamic)
    return is_served and inputs.strategy in ("token", "group") and inputs.bits in (4, 8)


def _is_nvfp4(arguments: Arguments) -> bool:
    return arguments.symmetric and (
        (arguments.strategy, arguments.type, arguments.bits, arguments.group_size)
        == ("tensor_group", "float", 4, 16)
    )


def _is_mxfp4(weights: Arguments) -> bool:
    return weights.symmetric and (
        (weights.strategy, weights.type, weights.bits, weights.group_size)
        == ("group", "float", 4, 32)
    )


def _is_mxfp8(weights: Arguments) -> bool:
    return weights.symmetric and (
        (weights.strategy, weights.type, weights.bits, weights.group_size, weights.scale_dtype)
        == ("group", "float", 8, 32, "uint8")
    )


def _is_fp8_weights(weights: Arguments, strategies: tuple[str, ...]) -> bool:
    is_static = weights.symmetric and not weights.dynamic
    return weights.type == "float" and is_static and weights.strategy in strategies


def _is_fp8(weights: Arguments, inputs: Arguments | None) -> bool:
    """``_is_fp8_w8a8``."""
    if inputs is None or inputs.type != "float":
        return False
    served = bool(inputs.dynamic) or (inputs.symmetric and inputs.strategy == "tensor")
    return served and _is_fp8_weights(weights, ("tensor", "channel", "block"))


def _is_w8a8(weights: Arguments, inputs: Arguments) -> bool:
    """``_is_static_tensor_w8a8`` or ``_is_dynamic_token_w8a8``."""
    is_weight = weights.symmetric and not weights.dynamic
    is_input = inputs.strategy == ("token" if inputs.dynamic else "tensor")
    bits = (weights.bits, inputs.bits) == (8, 8)
    return bits and is_weight and is_input and weights.strategy in ("tensor", "channel")


def _is_w4a8(weights: Arguments, inputs: Arguments | None, *strategies: str) -> bool:
    if inputs is None or (weights.bits, inputs.bits) != (4, 8):
        return False
    is_weight = weights.symmetric and not weights.dynamic and weights.strategy in strategies
    return is_weight and inputs.strategy == "token" and bool(inputs.dynamic)


def _are_types(engine: Engine, weights: Arguments, inputs: Arguments, inputs_type: str) -> bool:
    """Whether W4A8 is of these types, which 0.32 looks at and 0.30 did not.

    The rules of the newest release hold for the whole span.
    """
    unchecked = engine.is_vllm(before=(0, 30))
    return unchecked or (weights.type == "int" and inputs.type == inputs_type)


def _described(group: Group) -> str:
    weights = group.weights
    size = f" {weights.group_size}" if weights.group_size else ""
    inputs = f", {group.inputs.type}{group.inputs.bits} activations" if group.inputs else ""
    what = f"{weights.type}{weights.bits} {weights.strategy}{size}{inputs}"
    return f"{what} in format {group.format[:40]!r}"


def _unserved(engine: Engine, group: Group) -> Refusal:
    return _refusal(engine, "NotImplementedError", f"no scheme serves {_described(group)}")


def _refusal(engine: Engine, exception: str, message: str) -> Refusal:
    return Refusal(exception, message, f"{engine.label}, {_FILE}")
